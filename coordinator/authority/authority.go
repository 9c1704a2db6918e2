// Package authority is the farm's certificate authority: it makes join tokens,
// exchanges them for certificates, renews and revokes these, and says at each call
// whether a certificate is still good.
//
// The CA is embedded, in DATA_DIR/ca, or the operator's own. What it has issued,
// and which tokens are good, is in DATA_DIR/authority.db; of a token's secret there
// is only a hash.
package authority

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Config is what an authority needs.
type Config struct {
	// Dir is the coordinator's data folder.
	Dir string
	// Name is the coordinator's, for its certificate.
	Name string
	// Hosts are the DNS names and IP addresses that clients use for it, beside
	// localhost and Name.
	Hosts []string
	// CACert and CAKey are the operator's own CA, PEM files; the certificate's file
	// may also hold what is above it. Empty: the embedded CA.
	CACert, CAKey string
	// TLSCert and TLSKey are the operator's own server certificate. With CACert and
	// without CAKey, the authority verifies certificates, but issues none.
	TLSCert, TLSKey string
	// Advertise returns the coordinators' addresses, host:port, that tokens name;
	// nil: none.
	Advertise func() []string
	// Evict ends the connections of whom Revoke has revoked; nil: it does not.
	Evict func(identity.Identity)
	// Logger is told who joined; nil: nobody is. Clock is the time; nil: time.Now.
	Logger *slog.Logger
	Clock  func() time.Time
	// Shared tells that a predecessor has the database, too, and has called Share.
	Shared bool
}

// Authority is the farm's certificate authority. Its methods may be called
// concurrently.
type Authority struct {
	archfarmv1.UnimplementedAuthorityServiceServer
	cfg    Config
	issuer *issuer
	db     *database

	following sync.Mutex
	unfollow  func() // nil: nobody is followed

	failures failures

	mu sync.Mutex
	// revoked are the names of which some certificates are worthless.
	revoked map[string]revocation
	// server is the coordinator's own certificate.
	server *tls.Certificate
	pruned time.Time
}

// Open reads the CA and the database, and makes what is not there yet. Close the
// authority after use.
func Open(cfg Config) (_ *Authority, err error) {
	cfg.Logger = cmp.Or(cfg.Logger, slog.New(slog.DiscardHandler))
	if cfg.Clock == nil {
		cfg.Clock = time.Now
	}
	if cfg.Advertise == nil {
		cfg.Advertise = func() []string { return nil }
	}
	if cfg.Evict == nil {
		cfg.Evict = func(identity.Identity) {}
	}
	if (cfg.TLSCert == "") != (cfg.TLSKey == "") {
		return nil, errors.New("a server certificate of your own needs its key, and the other way round")
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the data folder: %w", err)
	}
	a := &Authority{cfg: cfg}
	if a.issuer, err = openIssuer(cfg); err != nil {
		return nil, err
	}
	if _, err := a.certificate(nil); err != nil {
		return nil, err
	}
	if a.db, a.revoked, err = openDB(filepath.Join(cfg.Dir, "authority.db"), cfg.Shared); err != nil {
		return nil, err
	}
	if err := a.prune(); err != nil {
		return nil, errors.Join(err, a.db.share())
	}
	if cfg.Shared {
		a.follow()
	}
	return a, nil
}

// Close closes the database. Nothing may be called afterwards.
func (a *Authority) Close() error {
	a.leave()
	return a.db.share() // which keeps nothing open
}

// ServerTLS is for the coordinator's listeners: TLS 1.3, HTTP/2, and a client's
// certificate is verified if there is one. Who has none may connect; only Join is
// for them.
func (a *Authority) ServerTLS() *tls.Config {
	return &tls.Config{
		MinVersion:     tls.VersionTLS13,
		NextProtos:     []string{"h2"},
		GetCertificate: a.certificate,
		ClientAuth:     tls.VerifyClientCertIfGiven,
		ClientCAs:      a.issuer.pool(),
		Time:           a.cfg.Clock,
		// A resumed connection would carry the certificate of the first.
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil
			}
			_, err := a.Check(state.PeerCertificates[0])
			return err
		},
	}
}

// Check returns who the holder of a certificate is, which a handshake has verified,
// as long as it has not expired or been revoked since. It is cheap enough for
// every call. Errors have the code UNAUTHENTICATED.
func (a *Authority) Check(cert *x509.Certificate) (identity.Identity, error) {
	who, err := identity.Of(cert)
	if err != nil {
		return identity.Identity{}, refusal(err.Error())
	}
	if a.cfg.Clock().After(cert.NotAfter) {
		return identity.Identity{}, unauthenticated("the certificate of %s expired at %s: join again with a new token", who, cert.NotAfter.Format(time.RFC3339))
	}
	a.mu.Lock()
	at, some := a.revoked[holder(who)]
	a.mu.Unlock()
	if some && a.isRevoked(cert, at) {
		return identity.Identity{}, revokedError(who)
	}
	return who, nil
}

func revokedError(who identity.Identity) error {
	return unauthenticated("the certificate of %s has been revoked: join again with a new token", who)
}

// refusal is an error with the code UNAUTHENTICATED that reads well where it is
// wrapped, and in the log of a handshake.
type refusal string

func unauthenticated(format string, args ...any) error { return refusal(fmt.Sprintf(format, args...)) }

func (r refusal) Error() string { return string(r) }

// GRPCStatus is what callers get.
func (r refusal) GRPCStatus() *status.Status { return status.New(codes.Unauthenticated, string(r)) }

// isRevoked tells certificates that a name got after it was revoked from those
// before.
func (a *Authority) isRevoked(cert *x509.Certificate, at revocation) bool {
	var rec *issued
	if err := a.db.View(func(tx *bolt.Tx) (err error) { rec, err = getIssued(tx, cert.SerialNumber); return err }); err != nil {
		return true
	}
	if rec != nil {
		return rec.Revoked
	}
	return !cert.NotBefore.After(at.At) // another authority issued it
}

// certificate is the server's, with the root at the end of its chain: who joins
// knows nothing but the root's fingerprint.
func (a *Authority) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.cfg.TLSCert != "" {
		pair, err := ownServer(a.cfg.TLSCert, a.cfg.TLSKey)
		if err != nil && a.server == nil {
			return nil, err
		}
		if err == nil { // else it is being replaced, or the operator finds out soon
			pair.Certificate = append(pair.Certificate, a.issuer.root().Raw)
			a.server = pair
		}
		return a.server, nil
	}
	now := a.cfg.Clock()
	if a.server != nil && now.Before(renewal(a.server.Leaf)) {
		return a.server, nil
	}
	server, err := a.issuer.serve(a.cfg, now)
	if err != nil {
		return nil, err
	}
	a.server = server
	return a.server, nil
}

// renewal is when two thirds of a certificate's life are over.
func renewal(cert *x509.Certificate) time.Time {
	return cert.NotBefore.Add(cert.NotAfter.Sub(cert.NotBefore) * 2 / 3)
}

// Roots are the certificates that the farm's certificates lead to, in DER.
func (a *Authority) Roots() [][]byte {
	var out [][]byte
	for _, cert := range a.issuer.roots {
		out = append(out, cert.Raw)
	}
	return out
}

// administers refuses everybody but administrators.
func (a *Authority) administers(ctx context.Context, what string) (identity.Identity, error) {
	who := identity.FromContext(ctx)
	if !who.Administers() {
		return who, status.Errorf(codes.PermissionDenied, "%s may not %s: use the coordinator's socket %s or an administrator's certificate",
			who, what, filepath.Join(a.cfg.Dir, "admin.sock"))
	}
	return who, nil
}

// chain is what follows from a leaf, as Join and Renew return it.
func (a *Authority) chain(leaf *x509.Certificate) [][]byte {
	return slices.Concat([][]byte{leaf.Raw}, a.issuer.intermediates())
}
