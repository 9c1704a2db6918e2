package enroll

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// joinTimeout bounds joining at one coordinator.
const joinTimeout = 20 * time.Second

// Request is what Join needs.
type Request struct {
	// Token is the join token's text.
	Token string
	// Kinds are what the caller can be; none: anything.
	Kinds []identity.Kind
	// Coordinators are the addresses to try, in this order; none: the token's own.
	Coordinators []string
	// Name is whom the certificate is for; empty: the one name that the token is good
	// for, if it is for one.
	Name string
	// Dir is where it goes; made when it is not there.
	Dir string
	// Logger and Clock may be nil.
	Logger *slog.Logger
	Clock  func() time.Time
}

// Join exchanges a token for a certificate, and fills a folder with it. The
// coordinator is trusted by the fingerprint in the token. What was in the folder is
// replaced when the answer is there. After an error of the network it may be called
// again, and does not use up the token twice. What the authority, or nobody, would
// answer differently the next time has a GRPCStatus with a code other than
// UNAVAILABLE.
func Join(ctx context.Context, req Request) (*Credentials, error) {
	token, err := identity.ParseToken(req.Token)
	if err != nil {
		return nil, statusError{status.New(codes.InvalidArgument, err.Error())}
	}
	if err := fits(token, req.Kinds); err != nil {
		return nil, err
	}
	if req.Name != "" && !identity.ValidName(req.Name) {
		return nil, statusError{status.Newf(codes.InvalidArgument, "joining as %q: a name has 1 to 128 letters, digits, '.', '_' and '-'", req.Name)}
	}
	addresses := req.Coordinators
	if len(addresses) == 0 {
		addresses = token.Coordinators
	}
	if len(addresses) == 0 {
		return nil, statusError{status.New(codes.InvalidArgument, "the token names no coordinator, so its address must be given")}
	}
	n, err := nextKey(req.Dir, token.ID.String(), req.Name)
	if err != nil {
		return nil, err
	}
	answer, err := ask(ctx, req, token, n.key, addresses)
	if err != nil {
		return nil, err
	}
	if err := n.accept(answer, token); err != nil {
		return nil, fmt.Errorf("joining: the coordinator's answer: %w", err)
	}
	if len(n.coordinators) == 0 {
		n.coordinators = addresses
	}
	if err := n.save(req.Dir); err != nil {
		return nil, err
	}
	creds, err := Load(req.Dir) // which installs it
	if err != nil {
		return nil, err
	}
	creds.Logger, creds.Clock = req.Logger, req.Clock
	return creds, nil
}

func fits(token identity.Token, kinds []identity.Kind) error {
	var names []string
	for _, kind := range kinds {
		if token.Kind == kind {
			return nil
		}
		names = append(names, "--"+string(kind))
	}
	if len(kinds) == 0 {
		return nil
	}
	return statusError{status.Newf(codes.InvalidArgument, "the token is for another kind, --%s: make one with archfarm token create %s", token.Kind, strings.Join(names, " or "))}
}

// ask tries one coordinator after the other, as long as they cannot be reached.
func ask(ctx context.Context, req Request, token identity.Token, key crypto.Signer, addresses []string) (*archfarmv1.JoinResponse, error) {
	csr, err := request(req.Name, key)
	if err != nil {
		return nil, err
	}
	message := &archfarmv1.JoinRequest{Token: req.Token, CertificateRequest: csr, Name: req.Name}
	var errs []error
	for _, a := range addresses {
		answer, err := askOne(ctx, a, token, req.Clock, message)
		if err == nil {
			return answer, nil
		}
		errs = append(errs, fmt.Errorf("joining at %s: %w", a, err))
		if code := status.Code(err); code != codes.Unavailable && code != codes.Unknown && code != codes.DeadlineExceeded {
			break // it has answered, and another would say the same
		}
	}
	return nil, errors.Join(errs...)
}

func askOne(ctx context.Context, where string, token identity.Token, clock func() time.Time, message *archfarmv1.JoinRequest) (*archfarmv1.JoinResponse, error) {
	target, err := address.Parse(where)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, joinTimeout)
	defer cancel()
	var refusal atomic.Pointer[error] // why the server is not trusted, which gRPC would wrap beyond recognition
	conn, err := grpc.NewClient("passthrough:///farm", grpc.WithTransportCredentials(credentials.NewTLS(pinned(token, clock, &refusal))),
		grpc.WithAuthority(target.Addr), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return target.Dial(ctx) }))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	answer, err := archfarmv1.NewAuthorityServiceClient(conn).Join(ctx, message)
	if why := refusal.Load(); err != nil && why != nil {
		return nil, *why
	}
	return answer, plain(err)
}

// plain makes a status' error read like one, and keeps its code.
func plain(err error) error {
	if err == nil {
		return nil
	}
	return statusError{status.Convert(err)}
}

type statusError struct{ status *status.Status }

func (e statusError) Error() string              { return e.status.Message() }
func (e statusError) GRPCStatus() *status.Status { return e.status }

// pinned trusts the farm whose root the token names. That root is in the chain
// which coordinators show.
func pinned(token identity.Token, clock func() time.Time, refusal *atomic.Pointer[error]) *tls.Config {
	now := time.Now
	if clock != nil {
		now = clock
	}
	return &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true, // VerifyConnection verifies
		VerifyConnection: func(state tls.ConnectionState) error {
			err := verifyPinned(state, token, now())
			if err != nil {
				refusal.Store(&err)
			}
			return err
		},
	}
}

func verifyPinned(state tls.ConnectionState, token identity.Token, now time.Time) error {
	for _, cert := range state.PeerCertificates {
		if identity.Fingerprint(cert) == token.Fingerprint {
			roots := x509.NewCertPool()
			roots.AddCert(cert)
			return identity.VerifyCoordinator(state, roots, now)
		}
	}
	return statusError{status.New(codes.FailedPrecondition, "the server is not of the farm that the token was made for (another CA): check the address, and that nobody is in between; if the coordinator's data was lost, make a new token")}
}

// request is a certificate request; of it, the authority takes the key.
func request(name string, key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name[:min(len(name), 64)]}}, key)
	if err != nil {
		return nil, fmt.Errorf("asking for a certificate: %w", err)
	}
	return der, nil
}

// accept takes what the authority has answered, if it is what was asked for.
func (n *next) accept(answer *archfarmv1.JoinResponse, token identity.Token) error {
	leaf, err := checkAnswer(answer.GetCertificates(), answer.GetRoots(), n.key)
	if err != nil {
		return err
	}
	who, err := identity.Of(leaf)
	if err != nil {
		return err
	}
	if n.name != "" && who.Name != n.name || who.Kind != token.Kind {
		return fmt.Errorf("it is a certificate of %s", who)
	}
	n.certificates, n.roots = answer.GetCertificates(), answer.GetRoots()
	n.coordinators = nil
	for _, a := range answer.GetCoordinators() {
		if _, err := address.Parse(a); err == nil {
			n.coordinators = append(n.coordinators, a)
		}
	}
	return nil
}

// checkAnswer returns the leaf of a chain that leads to one of the roots and
// belongs to a key.
func checkAnswer(chain, roots [][]byte, key crypto.Signer) (*x509.Certificate, error) {
	if len(chain) == 0 || len(roots) == 0 {
		return nil, errors.New("there is no certificate in it")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(leaf.PublicKey) {
		return nil, errors.New("it is a certificate for another key")
	}
	options := x509.VerifyOptions{KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, CurrentTime: leaf.NotBefore}
	if options.Intermediates, err = poolOf(chain[1:]); err != nil {
		return nil, err
	}
	if options.Roots, err = poolOf(roots); err != nil {
		return nil, err
	}
	// Whether it is valid now, the server's clock and this one may see differently.
	for _, cert := range chain[1:] {
		if above, err := x509.ParseCertificate(cert); err == nil && above.NotBefore.After(options.CurrentTime) {
			options.CurrentTime = above.NotBefore
		}
	}
	_, err = leaf.Verify(options)
	return leaf, err
}

func poolOf(certs [][]byte) (*x509.CertPool, error) {
	pool := x509.NewCertPool()
	for _, der := range certs {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		pool.AddCert(cert)
	}
	return pool, nil
}
