package enroll

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// issuer is a CA that renews, as far as a client sees it.
type issuer struct {
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	fails int // times that Renew fails
	calls []time.Time
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	i := &issuer{}
	var err error
	if i.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1e6 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	i.cert = i.sign(t, template, template, i.key.Public())
	return i
}

func (i *issuer) sign(t *testing.T, template, parent *x509.Certificate, key crypto.PublicKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, i.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func (i *issuer) leaf(t *testing.T, name string, key crypto.PublicKey, ttl time.Duration) []byte {
	t.Helper()
	who := identity.Identity{Kind: identity.Worker, Name: name, Pools: []string{identity.DefaultPool}}
	return i.sign(t, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: []*url.URL{who.URI()}, NotBefore: time.Now(), NotAfter: time.Now().Add(ttl),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, i.cert, key).Raw
}

// conn is a connection to the issuer.
type conn struct {
	grpc.ClientConnInterface
	t      *testing.T
	issuer *issuer
	as     string // for whom it answers; empty: for who asks
}

func (c conn) Invoke(_ context.Context, _ string, args, reply any, _ ...grpc.CallOption) error {
	c.issuer.calls = append(c.issuer.calls, time.Now())
	if c.issuer.fails > 0 {
		c.issuer.fails--
		return status.Error(codes.Unavailable, "nobody is there")
	}
	csr, err := x509.ParseCertificateRequest(args.(*archfarmv1.RenewRequest).GetCertificateRequest())
	if err != nil {
		return err
	}
	answer := reply.(*archfarmv1.RenewResponse)
	answer.Certificates = [][]byte{c.issuer.leaf(c.t, cmp.Or(c.as, csr.Subject.CommonName), csr.PublicKey, 24*time.Hour)}
	answer.Roots = [][]byte{c.issuer.cert.Raw}
	return nil
}

// received is a Join that has been answered and not yet installed.
func received(t *testing.T, i *issuer, dir, name string) *next {
	t.Helper()
	n, err := nextKey(dir, "0011223344556677", name)
	if err != nil {
		t.Fatal(err)
	}
	n.certificates = [][]byte{i.leaf(t, name, n.key.Public(), 24*time.Hour)}
	n.roots, n.coordinators = [][]byte{i.cert.Raw}, []string{"farm.example:8372"}
	return n
}

func installed(t *testing.T, i *issuer) *Credentials {
	t.Helper()
	dir := t.TempDir()
	if err := received(t, i, dir, "mac").save(dir); err != nil {
		t.Fatal(err)
	}
	creds, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return creds
}

// TestLoad_AfterACrashAnywhereWhileInstalling writes the files of a second join one
// by one over those of a first, and loads after each.
func TestLoad_AfterACrashAnywhereWhileInstalling(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	order := []string{nextFile, caFile, coordinatorsFile, keyFile, certFile}
	for crash := range len(order) + 1 {
		dir := installed(t, i).Dir()
		n := received(t, i, dir, "second")
		final := t.TempDir()
		if err := errors.Join(n.save(final), install(final, n)); err != nil {
			t.Fatal(err)
		}
		if err := n.save(dir); err != nil {
			t.Fatal(err)
		}
		for _, name := range order[1:max(crash, 1)] {
			data, err := os.ReadFile(filepath.Join(final, name))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		creds, err := Load(dir)
		if err != nil || creds.Identity().Name != "second" {
			t.Fatalf("crash after %v: %v, %v", order[:crash], creds, err)
		}
		if _, err := os.Stat(filepath.Join(dir, nextFile)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", nextFile, err)
		}
	}
}

func TestLoad_WhileJoiningKeepsWhatThereWas(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	creds := installed(t, i)
	first, err := nextKey(creds.Dir(), "8899aabbccddeeff", "new")
	if err != nil {
		t.Fatal(err)
	}
	again, err := nextKey(creds.Dir(), "8899aabbccddeeff", "new")
	if err != nil || !first.key.(*ecdsa.PrivateKey).Equal(again.key) {
		t.Errorf("the same token is tried with another key: %v", err)
	}
	other, err := nextKey(creds.Dir(), "0000000000000000", "new")
	if err != nil || first.key.(*ecdsa.PrivateKey).Equal(other.key) {
		t.Errorf("another token is tried with the same key: %v", err)
	}
	if loaded, err := Load(creds.Dir()); err != nil || loaded.Identity().Name != "mac" {
		t.Errorf("loaded %v, %v", loaded, err)
	}
	if _, err := Load(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an empty folder: %v", err)
	}
}

func TestCredentials_FilesBeingReplacedAreThoseBefore(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	first, second := installed(t, i), installed(t, i)
	creds, err := Files(first.ca, first.cert, first.key)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(second.cert)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(first.cert, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if pair, err := creds.valid(); err != nil || pair.Leaf.Equal(nil) {
		t.Errorf("with the new certificate and the old key: %v", err)
	}
	if _, err := Files(first.ca, first.cert, first.key); err == nil {
		t.Error("started with files that do not fit together")
	}
}

func TestKeepFresh_RenewsInTimeAndTriesAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		creds := installed(t, i)
		started, dials := time.Now(), 0
		i.fails = 3
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { // ends with ctx
			defer close(done)
			creds.KeepFresh(ctx, func(context.Context) (grpc.ClientConnInterface, func(), error) {
				dials++
				return conn{t: t, issuer: i}, func() { dials-- }, nil
			})
		}()
		time.Sleep(16*time.Hour + time.Minute) // of the bubble's clock
		synctest.Wait()
		if len(i.calls) != 4 {
			t.Fatalf("%d calls, want 3 that fail and one", len(i.calls))
		}
		if first := i.calls[0].Sub(started); first < 13*time.Hour || first > 16*time.Hour {
			t.Errorf("renewed after %s of 24 h", first)
		}
		for n := 1; n < 4; n++ {
			least := minBackoff << (n - 1)
			if pause := i.calls[n].Sub(i.calls[n-1]); pause < least || pause > 2*least {
				t.Errorf("try %d after %s, want %s or a little more", n, pause, least)
			}
		}
		if left := time.Until(creds.NotAfter()); left < 20*time.Hour {
			t.Errorf("good for %s", left)
		}
		cancel()
		<-done
		if dials != 0 {
			t.Errorf("%d connections are left open", dials)
		}
	})
}

func TestKeepFresh_SaysWhenItIsTooLate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		creds := installed(t, newIssuer(t))
		var log strings.Builder
		creds.Logger = slog.New(slog.NewTextHandler(&log, nil))
		time.Sleep(25 * time.Hour)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		creds.KeepFresh(ctx, func(context.Context) (grpc.ClientConnInterface, func(), error) {
			t.Error("dialed with an expired certificate")
			return nil, nil, fs.ErrClosed
		})
		if !strings.Contains(log.String(), "join again with a new token") {
			t.Errorf("log: %s", log.String())
		}
	})
}

func TestRenew_RefusesAnAnswerForSomebodyElse(t *testing.T) {
	t.Parallel()
	i := newIssuer(t)
	creds := installed(t, i)
	before, err := os.ReadFile(creds.cert)
	if err != nil {
		t.Fatal(err)
	}
	stranger := newIssuer(t)
	err = creds.Renew(t.Context(), liar{conn{t: t, issuer: stranger}, i.cert.Raw})
	if err == nil || !strings.Contains(err.Error(), "the coordinator's answer") {
		t.Errorf("a chain that does not lead to the roots: %v", err)
	}
	err = creds.Renew(t.Context(), conn{t: t, issuer: i, as: "other"})
	if err == nil || !strings.Contains(err.Error(), "for somebody else") {
		t.Errorf("another's certificate: %v", err)
	}
	if after, _ := os.ReadFile(creds.cert); string(after) != string(before) {
		t.Error("the certificate was replaced")
	}
}

// liar answers with other roots.
type liar struct {
	conn
	root []byte
}

func (l liar) Invoke(ctx context.Context, method string, args, reply any, options ...grpc.CallOption) error {
	err := l.conn.Invoke(ctx, method, args, reply, options...)
	reply.(*archfarmv1.RenewResponse).Roots = [][]byte{l.root}
	return err
}
