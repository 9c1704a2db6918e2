package authority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// maxRequest bounds a certificate request, maxRSA its key: larger ones are slow
	// to verify.
	maxRequest     = 16 << 10
	minRSA, maxRSA = 2048, 8192
)

// Certified is what the credentials.AuthInfo of a connection implements whose peer
// has shown a certificate, the one that Renew is asked with.
type Certified interface {
	// Certificate is the peer's leaf, verified; nil for none.
	Certificate() *x509.Certificate
}

// Join exchanges a token for a certificate.
func (a *Authority) Join(ctx context.Context, req *archfarmv1.JoinRequest) (*archfarmv1.JoinResponse, error) {
	if err := a.issues(); err != nil {
		return nil, err
	}
	t, err := identity.ParseToken(req.GetToken())
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	a.tidy()
	// The token first: a stranger gets nothing else looked at.
	name := req.GetName()
	err = a.db.View(func(tx *bolt.Tx) error {
		rec, err := a.admit(tx, t, name)
		if err == nil && name == "" {
			name = rec.Name
		}
		return err
	})
	if name == "" && status.Code(err) == codes.InvalidArgument {
		return nil, err // with a good token that leaves the name to the client, which tries it without one first
	}
	if err != nil {
		return nil, a.refused(ctx, t, name, err)
	}
	key, err := requestedKey(req.GetCertificateRequest())
	if err != nil {
		return nil, a.refused(ctx, t, name, err)
	}
	var leaf *x509.Certificate
	err = a.db.Batch(func(tx *bolt.Tx) (err error) { leaf, err = a.join(tx, t, name, key); return err })
	if err != nil {
		return nil, a.refused(ctx, t, name, internal("joining", err))
	}
	a.cfg.Logger.InfoContext(ctx, "certificate issued", "to", leaf.URIs[0].String(), "token", t, "until", leaf.NotAfter)
	return &archfarmv1.JoinResponse{Certificates: a.chain(leaf), Roots: a.Roots(), Coordinators: a.cfg.Advertise()}, nil
}

// admit returns the record of a token that is good for a name, or if that is empty
// for one of its own. Its uses are not looked at.
func (a *Authority) admit(tx *bolt.Tx, t identity.Token, name string) (*token, error) {
	rec, err := get[token](tx, tokensBucket, t.ID.String())
	if err != nil {
		return nil, err
	}
	hash := sha256.Sum256(t.Secret[:])
	if rec == nil || subtle.ConstantTimeCompare(hash[:], rec.Hash[:]) != 1 {
		return nil, status.Error(codes.Unauthenticated, "the farm does not know this token, perhaps not any more: get a new one (archfarm token create)")
	}
	if a.cfg.Clock().After(rec.Expires) {
		return nil, status.Errorf(codes.Unauthenticated, "the token expired at %s: get a new one (archfarm token create)", rec.Expires.Format(time.RFC3339))
	}
	if name == "" {
		name = rec.Name
	}
	if rec.Name != "" && rec.Name != name {
		return nil, status.Errorf(codes.PermissionDenied, "the token is good for the name %q only, and not for %.200q", rec.Name, name)
	}
	who := rec.identity(name)
	if err := who.Validate(); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	revoked, err := get[revocation](tx, revokedBucket, holder(who))
	if err != nil {
		return nil, err
	}
	if revoked != nil && rec.Seq <= revoked.Seq {
		return nil, status.Errorf(codes.PermissionDenied, "%s was revoked after this token had been made: get a new one (archfarm token create)", who)
	}
	return rec, nil
}

// join consumes a use of the token and records what is issued for it, in one
// transaction.
func (a *Authority) join(tx *bolt.Tx, t identity.Token, name string, key crypto.PublicKey) (*x509.Certificate, error) {
	rec, err := a.admit(tx, t, name)
	if err != nil {
		return nil, err
	}
	who, now := rec.identity(name), a.cfg.Clock()
	sum, err := keySum(key)
	if err != nil {
		return nil, err
	}
	again := false // whether it is the same call again, whose answer was lost
	err = eachOf(tx, who, func(_ string, c issued) error {
		switch {
		case now.After(c.NotAfter):
		case c.Key == sum && c.Revoked:
			return status.Errorf(codes.PermissionDenied, "this key of %s has been revoked: make a new one", who)
		case c.Key == sum:
			again = again || c.Token == t.ID.String()
		case !c.Revoked:
			return status.Errorf(codes.AlreadyExists, "somebody has a certificate as %s until %s; if that is gone, or was this machine, run: archfarm %s revoke %s; then join with a new token",
				who, c.NotAfter.Format(time.RFC3339), revokedAs(who.Kind), who.Name)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if !again {
		if rec.Uses == 0 {
			return nil, status.Error(codes.Unauthenticated, "the token has been used up: get a new one (archfarm token create)")
		}
		rec.Uses--
		if err := put(tx, tokensBucket, t.ID.String(), rec); err != nil {
			return nil, err
		}
	}
	return a.issue(tx, issued{Who: who, Key: sum, Token: t.ID.String(), TTL: rec.TTL}, key)
}

func revokedAs(kind identity.Kind) string {
	if kind == identity.Worker {
		return "worker"
	}
	return "client"
}

func (a *Authority) issue(tx *bolt.Tx, rec issued, key crypto.PublicKey) (*x509.Certificate, error) {
	now := a.cfg.Clock()
	leaf, err := a.issuer.sign(rec.Who, key, now, now.Add(rec.TTL), nil)
	if err != nil {
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	}
	rec.NotAfter = leaf.NotAfter
	return leaf, putIssued(tx, serialKey(leaf.SerialNumber), rec)
}

// Renew issues a new certificate for the identity of the caller's present one.
func (a *Authority) Renew(ctx context.Context, req *archfarmv1.RenewRequest) (*archfarmv1.RenewResponse, error) {
	if err := a.issues(); err != nil {
		return nil, err
	}
	present := callersCertificate(ctx)
	if present == nil {
		return nil, status.Error(codes.Unauthenticated, "renewing a certificate: the connection shows none")
	}
	who, err := a.Check(present)
	if err != nil {
		return nil, err
	}
	key, err := requestedKey(req.GetCertificateRequest())
	if err != nil {
		return nil, err
	}
	sum, err := keySum(key)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	a.tidy()
	var leaf *x509.Certificate
	err = a.db.Batch(func(tx *bolt.Tx) error {
		rec, err := getIssued(tx, present.SerialNumber)
		switch {
		case err != nil:
			return err
		case rec == nil:
			return status.Errorf(codes.FailedPrecondition, "renewing the certificate of %s: this coordinator has not issued it; renew it where it was issued, or join with a new token", who)
		case rec.Revoked:
			return revokedError(who)
		}
		leaf, err = a.issue(tx, issued{Who: rec.Who, Key: sum, Token: rec.Token, TTL: rec.TTL}, key)
		return err
	})
	if err != nil {
		return nil, internal("renewing a certificate", err)
	}
	a.cfg.Logger.InfoContext(ctx, "certificate renewed", "of", who.String(), "until", leaf.NotAfter)
	return &archfarmv1.RenewResponse{Certificates: a.chain(leaf), Roots: a.Roots()}, nil
}

// Revoke makes all certificates of a name worthless, and the tokens that there are
// useless for it. A client's name stands for the administrator's of that name too.
func (a *Authority) Revoke(ctx context.Context, req *archfarmv1.RevokeRequest) (*archfarmv1.RevokeResponse, error) {
	caller, err := a.administers(ctx, "revoke certificates")
	if err != nil {
		return nil, err
	}
	who := map[archfarmv1.CreateTokenRequest_Kind][]identity.Kind{
		archfarmv1.CreateTokenRequest_KIND_WORKER: {identity.Worker},
		archfarmv1.CreateTokenRequest_KIND_CLIENT: {identity.Client, identity.Admin},
		archfarmv1.CreateTokenRequest_KIND_ADMIN:  {identity.Admin},
	}[req.GetKind()]
	if len(who) == 0 || !identity.ValidName(req.GetName()) {
		return nil, status.Error(codes.InvalidArgument, "revoking certificates: say whether a worker's or a client's, and its name")
	}
	out := &archfarmv1.RevokeResponse{}
	for _, kind := range who {
		victim := identity.Identity{Kind: kind, Name: req.GetName()}
		n, err := a.revoke(victim)
		if err != nil {
			return nil, internal("revoking certificates", err)
		}
		out.Revoked += n
		a.cfg.Evict(victim)
	}
	a.cfg.Logger.WarnContext(ctx, "certificates revoked", "of", req.GetName(), "kind", who, "number", out.Revoked, "by", caller.String())
	return out, nil
}

// revoke returns how many certificates were good until now.
func (a *Authority) revoke(who identity.Identity) (n uint32, err error) {
	now := a.cfg.Clock()
	var record revocation
	err = a.db.Update(func(tx *bolt.Tx) error {
		marked := map[string]issued{}
		err := eachOf(tx, who, func(serial string, c issued) error {
			if !c.Revoked && !now.After(c.NotAfter) {
				c.Revoked = true
				marked[serial] = c
			}
			return nil
		})
		for serial, c := range marked {
			err = errors.Join(err, put(tx, issuedBucket, serial, c))
		}
		n, record = uint32(len(marked)), revocation{Seq: tx.Bucket(tokensBucket).Sequence(), At: now} // at most maxPerName
		return errors.Join(err, put(tx, revokedBucket, holder(who), record))
	})
	if err != nil {
		return 0, err
	}
	a.mu.Lock()
	a.revoked[holder(who)] = record
	a.mu.Unlock()
	return n, nil
}

func callersCertificate(ctx context.Context) *x509.Certificate {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	if c, ok := p.AuthInfo.(Certified); ok {
		return c.Certificate()
	}
	return nil
}

// requestedKey returns the key of a certificate request, whose holder has signed
// it. Nothing else of the request counts.
func requestedKey(der []byte) (crypto.PublicKey, error) {
	bad := func(why string) error { return status.Error(codes.InvalidArgument, "the certificate request: "+why) }
	if len(der) > maxRequest {
		return nil, bad(fmt.Sprintf("%d bytes are too many, at most %d are read", len(der), maxRequest))
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, bad(err.Error())
	}
	switch key := req.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() && key.Curve != elliptic.P384() {
			return nil, bad("of ECDSA keys, those on P-256 and P-384 are taken")
		}
	case ed25519.PublicKey:
	case *rsa.PublicKey:
		if bits := key.N.BitLen(); bits < minRSA || bits > maxRSA {
			return nil, bad(fmt.Sprintf("an RSA key must have %d to %d bits, and not %d", minRSA, maxRSA, bits))
		}
	default:
		return nil, bad("its key must be of ECDSA (P-256, P-384), Ed25519 or RSA")
	}
	if err := req.CheckSignature(); err != nil {
		return nil, bad("it is not signed with its own key: " + err.Error())
	}
	return req.PublicKey, nil
}

func keySum(key crypto.PublicKey) ([sha256.Size]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	return sha256.Sum256(der), err
}

// serve makes the coordinator's own certificate.
func (i *issuer) serve(cfg Config, now time.Time) (*tls.Certificate, error) {
	if i.key == nil {
		return nil, errors.New("the CA's key is not here, so a server certificate and its key must be")
	}
	key, err := newKey()
	if err != nil {
		return nil, err
	}
	who := identity.Identity{Kind: identity.Coordinator, Name: cfg.Name}
	if err := who.Validate(); err != nil {
		return nil, fmt.Errorf("the coordinator's certificate: %w", err)
	}
	leaf, err := i.sign(who, key.Public(), now, now.Add(serverLifetime), namesOf(cfg.Name, cfg.Hosts))
	if err != nil {
		return nil, err
	}
	chain := append([][]byte{leaf.Raw}, i.intermediates()...)
	return &tls.Certificate{Certificate: append(chain, i.root().Raw), PrivateKey: key, Leaf: leaf}, nil
}

// tidy prunes now and then. What is left of an error is pruned the next time.
func (a *Authority) tidy() {
	a.mu.Lock()
	due := a.cfg.Clock().Sub(a.pruned) >= pruneEvery
	if due {
		a.pruned = a.cfg.Clock()
	}
	a.mu.Unlock()
	if due {
		if err := a.prune(); err != nil {
			a.cfg.Logger.Warn("expired certificates and tokens stay on record", "error", err)
		}
	}
}

// refused logs who could not join, at most once a second: anybody may try. Tries
// are not limited, because a secret of 128 bits is not guessed, and a limit would
// keep honest machines out.
func (a *Authority) refused(ctx context.Context, t identity.Token, name string, err error) error {
	if n := a.failures.add(a.cfg.Clock()); n > 0 {
		from := ""
		if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
			from = p.Addr.String()
		}
		a.cfg.Logger.WarnContext(ctx, "somebody could not join", "name", fmt.Sprintf("%.200q", name), "from", from, "token", t, "times", n, "error", err)
	}
	return err
}

// failures counts what is not worth a line of log each.
type failures struct {
	mu    sync.Mutex
	count int
	told  time.Time
}

// add returns how many there were since they were told last; 0: not to be told now.
func (f *failures) add(now time.Time) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count++
	if now.Sub(f.told) < time.Second {
		return 0
	}
	n := f.count
	f.count, f.told = 0, now
	return n
}
