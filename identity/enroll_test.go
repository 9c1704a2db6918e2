package identity_test

// The coordinator's and the workers' side of certificates do not import each
// other: here they meet, over real TLS and gRPC.

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/authority"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/enroll"
)

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Now()} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// farm is an authority behind a real server.
type farm struct {
	*authority.Authority
	t       *testing.T
	address string
	dir     string
	clock   *clock
	evicted chan identity.Identity
	// lose makes the server lose the answers of Join after doing what they say.
	lose bool
}

func newFarm(t *testing.T, change func(*authority.Config)) *farm {
	t.Helper()
	f := &farm{t: t, clock: newClock(), dir: t.TempDir(), evicted: make(chan identity.Identity, 8)}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.address = listener.Addr().String()
	cfg := authority.Config{
		Dir: f.dir, Name: "farm-1", Clock: f.clock.Now, Advertise: func() []string { return []string{f.address} },
		Evict: func(who identity.Identity) { f.evicted <- who },
	}
	if change != nil {
		change(&cfg)
	}
	if f.Authority, err = authority.Open(cfg); err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(serverCreds{credentials.NewTLS(f.ServerTLS())}), grpc.UnaryInterceptor(f.identify))
	archfarmv1.RegisterAuthorityServiceServer(server, f.Authority)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(listener) }() // ends with the server
	t.Cleanup(func() {
		server.Stop()
		<-done
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *farm) identify(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	p, _ := peer.FromContext(ctx)
	who := identity.Identity{Kind: identity.Anonymous}
	if cert := p.AuthInfo.(authInfo).Certificate(); cert != nil {
		var err error
		if who, err = f.Check(cert); err != nil {
			return nil, err
		}
	}
	answer, err := handler(identity.NewContext(ctx, who), req)
	if err == nil && f.lose && strings.HasSuffix(info.FullMethod, "/Join") {
		return nil, status.Error(codes.Unavailable, "the answer is lost")
	}
	return answer, err
}

// serverCreds tell the caller's certificate.
type serverCreds struct {
	credentials.TransportCredentials
}

func (c serverCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return conn, authInfo{info.(credentials.TLSInfo)}, nil
}

type authInfo struct{ credentials.TLSInfo }

func (i authInfo) Certificate() *x509.Certificate {
	if len(i.State.PeerCertificates) == 0 {
		return nil
	}
	return i.State.PeerCertificates[0]
}

// admin is somebody at the coordinator's socket.
func admin(t *testing.T) context.Context {
	return identity.NewContext(t.Context(), identity.Identity{Socket: true})
}

func (f *farm) token(req *archfarmv1.CreateTokenRequest) string {
	f.t.Helper()
	if req.GetKind() == 0 {
		req.Kind = archfarmv1.CreateTokenRequest_KIND_WORKER
	}
	answer, err := f.CreateToken(admin(f.t), req)
	if err != nil {
		f.t.Fatal(err)
	}
	return answer.GetToken()
}

func (f *farm) join(token, name, dir string) (*enroll.Credentials, error) {
	return enroll.Join(f.t.Context(), enroll.Request{Token: token, Name: name, Dir: dir, Clock: f.clock.Now})
}

func (f *farm) mustJoin(req *archfarmv1.CreateTokenRequest, name string) *enroll.Credentials {
	f.t.Helper()
	creds, err := f.join(f.token(req), name, f.t.TempDir())
	if err != nil {
		f.t.Fatal(err)
	}
	return creds
}

func (f *farm) dial(config *tls.Config) *grpc.ClientConn {
	f.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+f.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// call makes a call that a certificate is needed for, on a connection of its own,
// and returns the error; nil when the certificate was good: the call itself is
// refused for another reason.
func (f *farm) call(config *tls.Config) error {
	return called(archfarmv1.NewAuthorityServiceClient(f.dial(config)).ListTokens(f.t.Context(), &archfarmv1.ListTokensRequest{}))
}

func called(_ *archfarmv1.ListTokensResponse, err error) error {
	if status.Code(err) == codes.PermissionDenied && !strings.Contains(err.Error(), "without a certificate") {
		return nil
	}
	return err
}

func refused(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("was not refused; want an error with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q; want one with %q", err, part)
		}
	}
}

// shut is refused in the handshake. Clients of TLS 1.3 may find the connection
// closed before they have read why.
func shut(t *testing.T, err error) {
	t.Helper()
	if status.Code(err) != codes.Unavailable {
		t.Errorf("error %v; want a handshake that fails", err)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	for alert, want := range map[string]string{
		"remote error: tls: bad certificate":               "revoked",
		"remote error: tls: expired certificate":           "clocks",
		"remote error: tls: unknown certificate authority": "another farm",
	} {
		refused(t, enroll.Explain(status.Error(codes.Unavailable, alert)), want, alert)
	}
	if err := enroll.Explain(fs.ErrClosed); err != fs.ErrClosed { //nolint:errorlint // the same
		t.Error(err)
	}
}

func TestJoin_NamelessTakesTheTokensName(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	if got := f.mustJoin(&archfarmv1.CreateTokenRequest{Name: "mac"}, "").Identity().Name; got != "mac" {
		t.Errorf("joined as %q", got)
	}
	_, err := f.join(f.token(&archfarmv1.CreateTokenRequest{}), "", t.TempDir())
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a token for any name, without a name: %v", err)
	}
}

func TestJoin_WorkerGetsItsCertificateAndMayCall(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	dir := filepath.Join(t.TempDir(), "new", "folder")
	creds, err := f.join(f.token(&archfarmv1.CreateTokenRequest{Pools: []string{"office"}}), "mac-2", dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := creds.Identity().URI().String(); got != "spiffe://archfarm/worker/mac-2/pool/office" {
		t.Errorf("identity %s", got)
	}
	if left := creds.NotAfter().Sub(f.clock.Now()); left < 23*time.Hour || left > 24*time.Hour {
		t.Errorf("the certificate is good for %s, want a day", left)
	}
	if list := creds.Coordinators(); len(list) != 1 || list[0] != f.address {
		t.Errorf("coordinators %v", list)
	}
	for name, mode := range map[string]fs.FileMode{"key.pem": 0o600, "cert.pem": 0o644, "ca.pem": 0o644, "coordinators": 0o644, "token": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want mode %v", name, info, err, mode)
		}
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 5 {
		t.Errorf("the folder has %v", entries)
	}
	loaded, err := enroll.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.call(loaded.TLS()); err != nil {
		t.Error(err)
	}
}

func TestJoin_IsRefused(t *testing.T) {
	t.Parallel()
	f, other := newFarm(t, nil), newFarm(t, nil)
	worker := &archfarmv1.CreateTokenRequest{}
	expired := f.token(&archfarmv1.CreateTokenRequest{Uses: 5})
	f.clock.Add(2 * time.Hour)
	used := f.token(worker)
	if _, err := f.join(used, "first", t.TempDir()); err != nil {
		t.Fatal(err)
	}
	deleted := f.token(worker)
	parsed, _ := identity.ParseToken(deleted)
	if _, err := f.DeleteToken(admin(t), &archfarmv1.DeleteTokenRequest{Id: parsed.ID.String()}); err != nil {
		t.Fatal(err)
	}
	guessed, _ := identity.ParseToken(f.token(worker))
	guessed.Secret[3] ^= 1
	elsewhere, _ := identity.ParseToken(other.token(worker))
	elsewhere.Coordinators = []string{f.address}
	for name, test := range map[string]struct {
		token string
		as    string
		want  string
	}{
		"token expired":        {expired, "w", "expired at"},
		"token used up":        {used, "second", "used up"},
		"token deleted":        {deleted, "w", "does not know this token"},
		"secret guessed":       {guessed.Text(), "w", "does not know this token"},
		"name of somebody":     {f.token(worker), "first", "archfarm worker revoke first"},
		"name for another":     {f.token(&archfarmv1.CreateTokenRequest{Name: "mac"}), "win", `the name "mac" only`},
		"name malformed":       {f.token(worker), "a/pool/b", "letters"},
		"another farm's token": {elsewhere.Text(), "w", "another CA"},
		"token cut off":        {f.token(worker)[:60], "w", "damaged"},
	} {
		dir := t.TempDir()
		_, err := f.join(test.token, test.as, dir)
		refused(t, err, test.want)
		if err != nil && strings.Contains(err.Error(), test.token) {
			t.Errorf("%s: the error tells the token", name)
		}
		if _, err := enroll.Load(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the folder afterwards: %v", name, err)
		}
	}
}

func TestJoin_TokenOfAnotherKind(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	token := f.token(&archfarmv1.CreateTokenRequest{})
	_, err := enroll.Join(t.Context(), enroll.Request{Token: token, Name: "ci", Dir: t.TempDir(), Kinds: []identity.Kind{identity.Client, identity.Admin}})
	refused(t, err, "--worker", "token create --client or --admin")
	// One that lies about its kind makes its holder what the authority knows, which
	// the holder notices; the certificate would be a worker's.
	lie, _ := identity.ParseToken(token)
	lie.Kind = identity.Client
	_, err = f.join(lie.Text(), "ci", t.TempDir())
	refused(t, err, "certificate of worker ci")
}

func TestJoin_OneUseIsForOneOfMany(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	token := f.token(&archfarmv1.CreateTokenRequest{})
	results := make(chan error)
	const many = 12
	for i := range many {
		dir := t.TempDir()
		go func() { _, err := f.join(token, "w"+string(rune('a'+i)), dir); results <- err }()
	}
	won := 0
	for range many {
		if err := <-results; err == nil {
			won++
		} else {
			refused(t, err, "used up")
		}
	}
	if won != 1 {
		t.Errorf("%d joined with a token for one", won)
	}
}

func TestJoin_AnswerLost(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	token, dir := f.token(&archfarmv1.CreateTokenRequest{}), t.TempDir()
	f.lose = true
	_, err := f.join(token, "mac", dir)
	refused(t, err, "lost")
	f.lose = false
	if _, err := f.join(token, "mac", t.TempDir()); err == nil {
		t.Fatal("somebody else, with another key, could use the token too")
	}
	creds, err := f.join(token, "mac", dir)
	if err != nil {
		t.Fatal("trying again with the same key:", err)
	}
	if err := f.call(creds.TLS()); err != nil {
		t.Error(err)
	}
}

func TestRevoke_EndsWhatIsAndLetsAFreshTokenIn(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	spare := f.token(&archfarmv1.CreateTokenRequest{Uses: 3})
	creds, bystander := f.mustJoin(&archfarmv1.CreateTokenRequest{}, "mac"), f.mustJoin(&archfarmv1.CreateTokenRequest{}, "amd")
	open := archfarmv1.NewAuthorityServiceClient(f.dial(creds.TLS()))
	if err := called(open.ListTokens(t.Context(), &archfarmv1.ListTokensRequest{})); err != nil {
		t.Fatal(err)
	}
	answer, err := f.Revoke(admin(t), &archfarmv1.RevokeRequest{Kind: archfarmv1.CreateTokenRequest_KIND_WORKER, Name: "mac"})
	if err != nil || answer.GetRevoked() != 1 {
		t.Fatalf("Revoke: %v, %v", answer, err)
	}
	if who := <-f.evicted; who.Kind != identity.Worker || who.Name != "mac" {
		t.Errorf("evicted %v", who)
	}
	err = called(open.ListTokens(t.Context(), &archfarmv1.ListTokensRequest{}))
	refused(t, err, "has been revoked")
	if status.Code(err) != codes.Unauthenticated {
		t.Errorf("a call over the open connection: code %v", status.Code(err))
	}
	shut(t, f.call(creds.TLS()))
	if err := creds.Renew(t.Context(), f.dial(creds.TLS())); err == nil {
		t.Error("renewed what has been revoked")
	}
	if err := f.call(bystander.TLS()); err != nil {
		t.Error("somebody else:", err)
	}
	_, err = f.join(spare, "mac", t.TempDir())
	refused(t, err, "was revoked after this token")
	if _, err := f.join(spare, "arm", t.TempDir()); err != nil {
		t.Error("another name with the same token:", err)
	}
	back := f.mustJoin(&archfarmv1.CreateTokenRequest{}, "mac")
	if err := f.call(back.TLS()); err != nil {
		t.Error("with a fresh token:", err)
	}
	shut(t, f.call(creds.TLS()))
}

func TestRevoke_SurvivesARestart(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	creds := f.mustJoin(&archfarmv1.CreateTokenRequest{Kind: archfarmv1.CreateTokenRequest_KIND_CLIENT}, "ci")
	if _, err := f.Revoke(admin(t), &archfarmv1.RevokeRequest{Kind: archfarmv1.CreateTokenRequest_KIND_CLIENT, Name: "ci"}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := authority.Open(authority.Config{Dir: f.dir, Name: "farm-1", Clock: f.clock.Now})
	if err != nil {
		t.Fatal(err)
	}
	f.Authority = again // closed by the farm
	cert, err := creds.TLS().GetClientCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Check(cert.Leaf)
	refused(t, err, "revoked")
}

func TestCertificate_ExpiresBetweenCallsAndDials(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	creds := f.mustJoin(&archfarmv1.CreateTokenRequest{}, "mac")
	open := archfarmv1.NewAuthorityServiceClient(f.dial(creds.TLS()))
	if err := called(open.ListTokens(t.Context(), &archfarmv1.ListTokensRequest{})); err != nil {
		t.Fatal(err)
	}
	f.clock.Add(24*time.Hour + time.Minute)
	refused(t, called(open.ListTokens(t.Context(), &archfarmv1.ListTokensRequest{})), "expired at", "new token")
	refused(t, f.call(creds.TLS()), "the worker's certificate", "expired at", "join again with a new token")
	stubborn := creds.TLS()
	pair, err := tls.LoadX509KeyPair(files(creds, "cert.pem"), files(creds, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	stubborn.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	shut(t, f.call(stubborn))
	// Its name is free again.
	if _, err := f.join(f.token(&archfarmv1.CreateTokenRequest{}), "mac", t.TempDir()); err != nil {
		t.Error(err)
	}
}

func files(c *enroll.Credentials, name string) string { return filepath.Join(c.Dir(), name) }

// ca is a CA of a test's own.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t *testing.T, name string, above *ca) *ca {
	t.Helper()
	return sign(t, above, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
}

func sign(t *testing.T, above *ca, template *x509.Certificate) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if above == nil {
		above = &ca{template, key}
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(365*24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, above.cert, key.Public(), above.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{cert, key}
}

func (c *ca) leaf(t *testing.T, uri string, usage x509.ExtKeyUsage, hosts ...string) *ca {
	t.Helper()
	template := &x509.Certificate{KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, DNSNames: hosts}
	if uri != "" {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = []*url.URL{u}
	}
	return sign(t, c, template)
}

// write puts the certificates, its own first, and its key into files.
func (c *ca) write(t *testing.T, above ...*ca) (cert, key string) {
	t.Helper()
	dir := t.TempDir()
	der := [][]byte{c.cert.Raw}
	for _, a := range above {
		der = append(der, a.cert.Raw)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, data := range map[string][]byte{cert: identity.EncodeCertificates(der...), key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func (c *ca) files(t *testing.T, roots string, above ...*ca) *enroll.Credentials {
	t.Helper()
	cert, key := c.write(t, above...)
	creds, err := enroll.Files(roots, cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

func TestHandshake_ForgedCertificates(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	good := f.mustJoin(&archfarmv1.CreateTokenRequest{}, "mac")
	roots := files(good, "ca.pem")
	real, err := os.ReadFile(roots)
	if err != nil {
		t.Fatal(err)
	}
	list, err := identity.ParseCertificates(real)
	if err != nil {
		t.Fatal(err)
	}
	lookalike := sign(t, nil, &x509.Certificate{Subject: list[0].Subject, RawSubject: list[0].RawSubject, SubjectKeyId: list[0].SubjectKeyId, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	forged := lookalike.leaf(t, "spiffe://archfarm/worker/mac/pool/default", x509.ExtKeyUsageClientAuth).files(t, roots, lookalike)
	shut(t, f.call(forged.TLS()))
	// A worker that issues a certificate with its own.
	pair, err := tls.LoadX509KeyPair(files(good, "cert.pem"), files(good, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	worker := &ca{pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)}
	promoted := worker.leaf(t, "spiffe://archfarm/admin/mac/tenant/default", x509.ExtKeyUsageClientAuth).files(t, roots, worker)
	shut(t, f.call(promoted.TLS()))
	refused(t, f.call(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true}), "without a certificate")
}

func TestHandshake_WorkerPosesAsCoordinator(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	good := f.mustJoin(&archfarmv1.CreateTokenRequest{}, "mac")
	pair, err := tls.LoadX509KeyPair(files(good, "cert.pem"), files(good, "key.pem"))
	if err != nil {
		t.Fatal(err)
	}
	state := tls.ConnectionState{PeerCertificates: []*x509.Certificate{pair.Leaf}, ServerName: "farm-1"}
	refused(t, good.TLS().VerifyConnection(state), "not one of this farm's")
	// Nor with a CA that leaves the use open.
	root := newCA(t, "root", nil)
	rootFile, _ := root.write(t)
	open := root.leaf(t, "spiffe://archfarm/worker/mac/pool/default", x509.ExtKeyUsageAny)
	creds := open.files(t, rootFile)
	state.PeerCertificates = []*x509.Certificate{open.cert}
	refused(t, creds.TLS().VerifyConnection(state), "worker mac, and no coordinator")
}

func TestRenew_TakesEffectAtTheNextDialAndKeepsWhoOneIs(t *testing.T) {
	t.Parallel()
	f := newFarm(t, nil)
	creds := f.mustJoin(&archfarmv1.CreateTokenRequest{Pools: []string{"office"}}, "mac")
	before := creds.NotAfter()
	f.clock.Add(16 * time.Hour)
	if err := creds.Renew(t.Context(), f.dial(creds.TLS())); err != nil {
		t.Fatal(err)
	}
	if got := creds.NotAfter().Sub(before).Round(time.Minute); got != 16*time.Hour {
		t.Errorf("it is good for %s longer, want 16 h", got)
	}
	f.clock.Add(20 * time.Hour) // the first has expired
	if err := f.call(creds.TLS()); err != nil {
		t.Error(err)
	}
	if got := creds.Identity().Pools; len(got) != 1 || got[0] != "office" {
		t.Errorf("pools %v", got)
	}
	refused(t, creds.Renew(t.Context(), f.dial(&tls.Config{MinVersion: tls.VersionTLS13, InsecureSkipVerify: true})), "shows none")
}

func TestOwnCA_WithAnIntermediate(t *testing.T) {
	t.Parallel()
	root := newCA(t, "company root", nil)
	middle := newCA(t, "farm CA", root)
	f := newFarm(t, func(cfg *authority.Config) { cfg.CACert, cfg.CAKey = middle.write(t, root) })
	creds := f.mustJoin(&archfarmv1.CreateTokenRequest{}, "mac")
	if err := f.call(creds.TLS()); err != nil {
		t.Fatal(err)
	}
	if err := creds.Renew(t.Context(), f.dial(creds.TLS())); err != nil {
		t.Error(err)
	}
	rootFile, _ := root.write(t)
	own := middle.leaf(t, "spiffe://archfarm/worker/by-hand/pool/office", x509.ExtKeyUsageClientAuth).files(t, rootFile, middle)
	if err := f.call(own.TLS()); err != nil {
		t.Error("a certificate that the company issued itself:", err)
	}
	refused(t, own.Renew(t.Context(), f.dial(own.TLS())), "operator's own")
	stranger := middle.leaf(t, "spiffe://company/payroll", x509.ExtKeyUsageClientAuth).files(t, rootFile, middle)
	shut(t, f.call(stranger.TLS()))
	if _, err := f.Revoke(admin(t), &archfarmv1.RevokeRequest{Kind: archfarmv1.CreateTokenRequest_KIND_WORKER, Name: "by-hand"}); err != nil {
		t.Fatal(err)
	}
	shut(t, f.call(own.TLS()))
}

func TestOwnCA_WithoutItsKeyIssuesNothing(t *testing.T) {
	t.Parallel()
	root := newCA(t, "company root", nil)
	rootFile, _ := root.write(t)
	for name, server := range map[string]*ca{
		"with an identity":   root.leaf(t, "spiffe://archfarm/coordinator/farm-1", x509.ExtKeyUsageServerAuth),
		"with a host's name": root.leaf(t, "", x509.ExtKeyUsageServerAuth, "farm.example"),
	} {
		f := newFarm(t, func(cfg *authority.Config) {
			cfg.CACert = rootFile
			cfg.TLSCert, cfg.TLSKey = server.write(t)
		})
		client := root.leaf(t, "spiffe://archfarm/client/ci/tenant/acme", x509.ExtKeyUsageClientAuth).files(t, rootFile)
		config := client.TLS()
		config.ServerName = "farm.example"
		if err := f.call(config); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		config = client.TLS()
		config.ServerName = "elsewhere.example"
		if err := f.call(config); (err == nil) != (len(server.cert.URIs) > 0) {
			t.Errorf("%s, dialed by another name: %v", name, err)
		}
		_, err := f.CreateToken(admin(t), &archfarmv1.CreateTokenRequest{Kind: archfarmv1.CreateTokenRequest_KIND_WORKER})
		refused(t, err, "no CA key")
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: code %v", name, status.Code(err))
		}
	}
}
