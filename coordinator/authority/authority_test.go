package authority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	workerKind = archfarmv1.CreateTokenRequest_KIND_WORKER
	clientKind = archfarmv1.CreateTokenRequest_KIND_CLIENT
	adminKind  = archfarmv1.CreateTokenRequest_KIND_ADMIN
)

// rig is an authority whose time the test moves.
type rig struct {
	*Authority
	now time.Time
	log bytes.Buffer
}

func open(t testing.TB, dir string, change func(*Config)) *rig {
	t.Helper()
	r := &rig{now: time.Now()}
	cfg := Config{Dir: dir, Name: "farm-1", Clock: func() time.Time { return r.now }, Logger: slog.New(slog.NewTextHandler(&r.log, nil))}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.Authority, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func socket(t testing.TB) context.Context {
	return identity.NewContext(t.Context(), identity.Identity{Socket: true})
}

func newKeyT(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := newKey()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csr(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (r *rig) token(t testing.TB, req *archfarmv1.CreateTokenRequest) string {
	t.Helper()
	answer, err := r.CreateToken(socket(t), req)
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetToken()
}

func (r *rig) join(t testing.TB, token, name string, key crypto.Signer) (*x509.Certificate, error) {
	t.Helper()
	answer, err := r.Join(t.Context(), &archfarmv1.JoinRequest{Token: token, Name: name, CertificateRequest: csr(t, key)})
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(answer.GetCertificates()[0])
}

type certified struct {
	credentials.TLSInfo
	cert *x509.Certificate
}

func (c certified) Certificate() *x509.Certificate { return c.cert }

func (r *rig) renew(t testing.TB, cert *x509.Certificate, key crypto.Signer) (*x509.Certificate, error) {
	t.Helper()
	ctx := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: certified{cert: cert}})
	answer, err := r.Renew(ctx, &archfarmv1.RenewRequest{CertificateRequest: csr(t, key)})
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(answer.GetCertificates()[0])
}

func TestOpen_KeepsItsCAAndHidesItsKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := open(t, dir, nil)
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	second := open(t, dir, nil)
	if !bytes.Equal(first.Roots()[0], second.Roots()[0]) {
		t.Error("it made another CA")
	}
	for _, name := range []string{"ca/ca.key", "ca/ca.pem", "authority.db"} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	if root := second.issuer.root(); root.NotAfter.Sub(second.now) < caLifetime-time.Hour || !root.MaxPathLenZero {
		t.Errorf("the root is good until %s, path length zero: %v", root.NotAfter, root.MaxPathLenZero)
	}
}

// TestOpen_AfterACrashWhileMakingTheCA has only the key on disk.
func TestOpen_AfterACrashWhileMakingTheCA(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := open(t, dir, nil).Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "ca", "ca.pem")); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir, nil)
	if _, err := again.join(t, again.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind}), "w", newKeyT(t)); err != nil {
		t.Error(err)
	}
}

func TestOpen_RefusesFilesThatDoNotFit(t *testing.T) {
	t.Parallel()
	one, two := t.TempDir(), t.TempDir()
	open(t, one, nil)
	open(t, two, nil)
	pem := func(dir string) string { return filepath.Join(dir, "ca", "ca.pem") }
	key := func(dir string) string { return filepath.Join(dir, "ca", "ca.key") }
	for want, cfg := range map[string]Config{
		"belongs to no certificate":  {CACert: pem(one), CAKey: key(two)},
		"alone is not enough":        {CACert: pem(one)},
		"needs the CA's certificate": {CAKey: key(one)},
		"needs its key":              {CACert: pem(one), TLSCert: pem(one)},
		"there is no certificate in": {CACert: key(one), CAKey: key(one)},
		"there is no private key in": {CACert: pem(one), CAKey: pem(one)},
		"letters":                    {Name: "a/b"},
	} {
		cfg.Dir = t.TempDir()
		if cfg.Name == "" {
			cfg.Name = "farm-1"
		}
		if a, err := Open(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v; want %q", err, want)
			if err == nil {
				_ = a.Close()
			}
		}
	}
}

func TestServerCertificate_CoversHostsAndIsRenewed(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), func(c *Config) { c.Hosts = []string{"farm.example", "10.0.0.5", "0.0.0.0", "::1"} })
	first, err := r.certificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"localhost", "farm-1", "farm.example", "10.0.0.5", "127.0.0.1", "::1"} {
		if err := first.Leaf.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if first.Leaf.VerifyHostname("0.0.0.0") == nil {
		t.Error("it is for every address")
	}
	if root := first.Certificate[len(first.Certificate)-1]; !bytes.Equal(root, r.Roots()[0]) {
		t.Error("the chain does not end with the root")
	}
	r.now = r.now.Add(serverLifetime / 2)
	if same, _ := r.certificate(nil); same != first {
		t.Error("renewed too early")
	}
	r.now = r.now.Add(serverLifetime / 3)
	if other, err := r.certificate(nil); err != nil || other == first || !other.Leaf.NotAfter.After(first.Leaf.NotAfter) {
		t.Errorf("not renewed: %v", err)
	}
}

func TestManagement_IsForAdministrators(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	for _, who := range []identity.Identity{{}, {Kind: identity.Client, Name: "c", Tenant: "t"}, {Kind: identity.Worker, Name: "w"}, {Kind: identity.Anonymous}, {Kind: identity.Coordinator, Socket: true}} {
		ctx := identity.NewContext(t.Context(), who)
		_, create := r.CreateToken(ctx, &archfarmv1.CreateTokenRequest{Kind: workerKind})
		_, list := r.ListTokens(ctx, nil)
		_, del := r.DeleteToken(ctx, &archfarmv1.DeleteTokenRequest{Id: "x"})
		_, revoke := r.Revoke(ctx, &archfarmv1.RevokeRequest{Kind: workerKind, Name: "w"})
		for _, err := range []error{create, list, del, revoke} {
			if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "admin.sock") {
				t.Errorf("%s: %v", who, err)
			}
		}
	}
	alice := identity.NewContext(t.Context(), identity.Identity{Kind: identity.Admin, Name: "alice", Tenant: "default"})
	if _, err := r.ListTokens(alice, nil); err != nil {
		t.Error(err)
	}
}

func TestCreateToken_ChecksWhatIsAsked(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	for want, req := range map[string]*archfarmv1.CreateTokenRequest{
		"say what it is for":     {},
		"belongs to one":         {Kind: workerKind, Pools: []string{"a", "b"}},
		"clients have a tenant":  {Kind: workerKind, Tenant: "t"},
		`pool "a b"`:             {Kind: clientKind, Pools: []string{"a b"}},
		`tenant "a/b"`:           {Kind: clientKind, Tenant: "a/b"},
		`name "a/b"`:             {Kind: clientKind, Name: "a/b"},
		"65 pools":               {Kind: adminKind, Pools: strings.Split(strings.Repeat("p,", 64)+"p", ",")},
		"uses":                   {Kind: workerKind, Uses: maxUses + 1},
		"the token's time":       {Kind: workerKind, Ttl: durationpb.New(-time.Hour)},
		"the certificates' time": {Kind: workerKind, CertificateTtl: durationpb.New(time.Second)},
		"366 days":               {Kind: workerKind, CertificateTtl: &durationpb.Duration{Seconds: 1 << 60}},
	} {
		if _, err := r.CreateToken(socket(t), req); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v; want %q", req, err, want)
		}
	}
	list, err := r.ListTokens(socket(t), nil)
	if err != nil || len(list.GetTokens()) != 0 {
		t.Errorf("tokens %v, %v", list, err)
	}
}

func TestToken_SecretIsNeitherKeptNorLogged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir, nil)
	text := r.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind})
	if _, err := r.join(t, text, "mac", newKeyT(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.join(t, text, "win", newKeyT(t)); err == nil {
		t.Fatal("used twice")
	}
	if _, err := r.DeleteToken(socket(t), &archfarmv1.DeleteTokenRequest{Id: text}); err == nil || strings.Contains(err.Error(), text) {
		t.Errorf("deleting by the secret: %v", err)
	}
	parsed, err := identity.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile(filepath.Join(dir, "authority.db"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(file, []byte(parsed.ID.String())) || !strings.Contains(r.log.String(), parsed.ID.String()) {
		t.Error("the id is not on record and in the log, so this test sees nothing")
	}
	for where, data := range map[string][]byte{"database": file, "log": r.log.Bytes()} {
		if bytes.Contains(data, parsed.Secret[:]) || bytes.Contains(data, []byte(text[len("archfarm1."):][:40])) ||
			strings.Contains(string(data), fmt.Sprintf("%x", parsed.Secret)) {
			t.Errorf("the %s has the secret", where)
		}
	}
}

// Agents renew at two thirds of what the certificate says is its life.
func TestJoin_AShortLifeIsNotOverAtItsBeginning(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	for _, ttl := range []time.Duration{time.Minute, 2 * time.Minute, 6 * time.Minute, 24 * time.Hour} {
		leaf, err := r.join(t, r.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind, CertificateTtl: durationpb.New(ttl)}), "w-"+ttl.String(), newKeyT(t))
		if err != nil {
			t.Fatal(err)
		}
		if left := renewal(leaf).Sub(leaf.NotAfter.Add(-ttl)); left < ttl/2 {
			t.Errorf("of %s, the first renewal comes after %s", ttl, left)
		}
	}
}

func TestRenew_KnowsWhomAndForgetsTheOldest(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	key := newKeyT(t)
	first, err := r.join(t, r.token(t, &archfarmv1.CreateTokenRequest{Kind: clientKind, Tenant: "acme", CertificateTtl: durationpb.New(time.Hour)}), "ci", key)
	if err != nil {
		t.Fatal(err)
	}
	for range maxPerName + 3 {
		r.now = r.now.Add(time.Second)
		cert, err := r.renew(t, first, key)
		if status.Code(err) == codes.FailedPrecondition {
			break // forgotten
		}
		if err != nil || cert.URIs[0].String() != first.URIs[0].String() || cert.NotAfter.Sub(r.now).Round(time.Minute) != time.Hour {
			t.Fatalf("renewed as %v, %v", cert, err)
		}
	}
	held := 0
	_ = r.db.View(func(tx *bolt.Tx) error {
		held = count(tx, issuedBucket)
		return nil
	})
	if held != maxPerName {
		t.Errorf("%d certificates on record, want %d", held, maxPerName)
	}
	if _, err := r.Revoke(socket(t), &archfarmv1.RevokeRequest{Kind: clientKind, Name: "ci"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Check(first); err == nil {
		t.Error("a forgotten certificate outlives its revocation")
	}
}

func TestPrune_ForgetsWhatHasExpired(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	if _, err := r.join(t, r.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind, Uses: 2}), "mac", newKeyT(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Revoke(socket(t), &archfarmv1.RevokeRequest{Kind: workerKind, Name: "mac"}); err != nil {
		t.Fatal(err)
	}
	r.now = r.now.Add(revocationKept + time.Hour)
	r.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind}) // which tidies
	_ = r.db.View(func(tx *bolt.Tx) error {
		for bucket, want := range map[string]int{"tokens": 1, "certificates": 0, "holders": 0, "revoked": 0} {
			if n := count(tx, []byte(bucket)); n != want {
				t.Errorf("%d %s are left, want %d", n, bucket, want)
			}
		}
		return nil
	})
	if len(r.revoked) != 0 {
		t.Errorf("revoked %v", r.revoked)
	}
}

func TestRequestedKey(t *testing.T) {
	t.Parallel()
	generate := func(bits int) crypto.Signer {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	curve := func(c elliptic.Curve) crypto.Signer {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	forged := csr(t, curve(elliptic.P256()))
	forged[len(forged)-1] ^= 1
	for name, test := range map[string]struct {
		der  []byte
		want string
	}{
		"P-256":     {csr(t, curve(elliptic.P256())), ""},
		"P-384":     {csr(t, curve(elliptic.P384())), ""},
		"Ed25519":   {csr(t, edwards), ""},
		"RSA 2048":  {csr(t, generate(2048)), ""},
		"RSA 1024":  {csr(t, generate(1024)), "2048 to 8192 bits"},
		"P-521":     {csr(t, curve(elliptic.P521())), "P-256 and P-384"},
		"forged":    {forged, "not signed with its own key"},
		"too large": {make([]byte, maxRequest+1), "too many"},
		"nothing":   {nil, "certificate request"},
	} {
		_, err := requestedKey(test.der)
		if test.want == "" && err != nil || test.want != "" && (status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("%s: %v; want %q", name, err, test.want)
		}
	}
}

func FuzzRequestedKey(f *testing.F) {
	f.Add(csr(f, newKeyT(f)))
	f.Add([]byte{0x30, 0x82, 0x3f, 0xff})
	f.Fuzz(func(t *testing.T, der []byte) {
		key, err := requestedKey(der)
		if err == nil {
			if _, err := keySum(key); err != nil {
				t.Errorf("accepted a key that cannot be written: %v", err)
			}
		} else if status.Code(err) != codes.InvalidArgument {
			t.Error(err)
		}
	})
}

// TestAuthority_NoCertificateOutlivesItsReason joins, renews, revokes and lets time
// pass in any order, and compares with what a few lines of model say.
func TestAuthority_NoCertificateOutlivesItsReason(t *testing.T) {
	t.Parallel()
	ca := t.TempDir()
	open(t, ca, nil)
	caCert, caKey := filepath.Join(ca, "ca", "ca.pem"), filepath.Join(ca, "ca", "ca.key")
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			rt.Fatal(err)
		}
		r := open(t, dir, func(c *Config) { c.CACert, c.CAKey = caCert, caKey })
		defer func() { _ = r.Close() }() // it is closed again at the end
		r.db.own.NoSync, r.db.own.MaxBatchDelay = true, 0
		m := &model{r: r, t: t, live: map[string]*x509.Certificate{}, keys: map[string]*ecdsa.PrivateKey{"x": newKeyT(t), "y": newKeyT(t)}}
		m.fresh()
		rt.Repeat(map[string]func(*rapid.T){
			"token":  func(*rapid.T) { m.fresh() },
			"join":   m.join,
			"renew":  m.renew,
			"revoke": m.revoke,
			"wait": func(rt *rapid.T) {
				r.now = r.now.Add(time.Duration(rapid.IntRange(1, 30).Draw(rt, "hours")) * time.Hour)
			},
			"": m.check,
		})
	})
}

type model struct {
	r       *rig
	t       *testing.T
	keys    map[string]*ecdsa.PrivateKey
	text    string
	uses    int
	expires time.Time
	barred  bool // mac was revoked after the token had been made
	live    map[string]*x509.Certificate
	dead    []*x509.Certificate
}

func (m *model) fresh() {
	m.text, m.uses, m.barred = m.r.token(m.t, &archfarmv1.CreateTokenRequest{Kind: workerKind, Uses: 2, Ttl: durationpb.New(48 * time.Hour)}), 2, false
	m.expires = m.r.now.Add(48 * time.Hour)
}

// holder is whose certificate of mac is good.
func (m *model) holder() string {
	for key, cert := range m.live {
		if !m.r.now.After(cert.NotAfter) {
			return key
		}
	}
	return ""
}

func (m *model) join(rt *rapid.T) {
	key := rapid.SampledFrom([]string{"x", "y"}).Draw(rt, "key")
	cert, err := m.r.join(m.t, m.text, "mac", m.keys[key])
	owner := m.holder()
	if err != nil {
		return // the model is about what must not happen
	}
	if m.r.now.After(m.expires) || m.barred || owner != "" && owner != key {
		rt.Fatalf("%s joined; expired %v, barred %v, while %q holds the name", key, m.r.now.After(m.expires), m.barred, owner)
	}
	if owner == "" {
		if m.uses--; m.uses < 0 {
			rt.Fatal("joined with a token that was used up")
		}
	}
	m.live = map[string]*x509.Certificate{key: cert}
}

func (m *model) renew(rt *rapid.T) {
	for key, cert := range m.live {
		next, err := m.r.renew(m.t, cert, m.keys[key])
		if expired := m.r.now.After(cert.NotAfter); expired != (err != nil) {
			rt.Fatalf("renewing: %v; expired: %v", err, expired)
		}
		if err == nil {
			m.live[key] = next
		}
	}
	for _, cert := range m.dead {
		if _, err := m.r.renew(m.t, cert, m.keys["x"]); err == nil {
			rt.Fatal("renewed what has been revoked")
		}
	}
}

func (m *model) revoke(rt *rapid.T) {
	if _, err := m.r.Revoke(socket(m.t), &archfarmv1.RevokeRequest{Kind: workerKind, Name: "mac"}); err != nil {
		rt.Fatal(err)
	}
	for _, cert := range m.live {
		m.dead = append(m.dead, cert)
	}
	m.live, m.barred = map[string]*x509.Certificate{}, true
}

func (m *model) check(rt *rapid.T) {
	for _, cert := range m.dead {
		if _, err := m.r.Check(cert); err == nil {
			rt.Fatal("a revoked certificate is good")
		}
	}
	for _, cert := range m.live {
		if _, err := m.r.Check(cert); (err != nil) != m.r.now.After(cert.NotAfter) {
			rt.Fatalf("a certificate until %s is %v at %s", cert.NotAfter, err, m.r.now)
		}
	}
}

func TestJoin_AKeyDoesNotSpareOthersTokensNorOutliveItsRevocation(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	key, one := newKeyT(t), &archfarmv1.CreateTokenRequest{Kind: workerKind}
	if _, err := r.join(t, r.token(t, one), "mac", key); err != nil {
		t.Fatal(err)
	}
	used := r.token(t, one)
	if _, err := r.join(t, used, "other", newKeyT(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.join(t, used, "mac", key); err == nil || !strings.Contains(err.Error(), "used up") {
		t.Errorf("with the key of another token's certificate: %v", err)
	}
	if _, err := r.Revoke(socket(t), &archfarmv1.RevokeRequest{Kind: workerKind, Name: "mac"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.join(t, r.token(t, one), "mac", key); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a fresh token with a revoked key: %v", err)
	}
	if _, err := r.join(t, r.token(t, one), "mac", newKeyT(t)); err != nil {
		t.Errorf("a fresh token with a fresh key: %v", err)
	}
}

// TestJoin_AThousandAtOnce is what a farm's first minute looks like; it has a
// minute, and takes about a second.
func TestJoin_AThousandAtOnce(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir(), nil)
	const many = 1000
	token := r.token(t, &archfarmv1.CreateTokenRequest{Kind: workerKind, Uses: many})
	request, errs := csr(t, newKeyT(t)), make(chan error, many)
	start := time.Now()
	for n := range many {
		go func() {
			_, err := r.Join(t.Context(), &archfarmv1.JoinRequest{Token: token, Name: fmt.Sprintf("w%d", n), CertificateRequest: request})
			errs <- err
		}()
	}
	for range many {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(start)
	t.Logf("%d joined in %s", many, took)
	if took > time.Minute {
		t.Errorf("joining took %s", took)
	}
	if _, err := r.join(t, token, "more", newKeyT(t)); err == nil {
		t.Error("one more than the token is good for")
	}
}
