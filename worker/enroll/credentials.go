// Package enroll gets certificates from the farm's authority, keeps them in a
// folder, renews them and dials with them. Agents use it, and so do the command
// line's clients. A folder holds:
//
//	ca.pem         roots that coordinators are verified with
//	cert.pem       the certificate, leaf first
//	key.pem        its private key, PKCS #8, readable by its owner only
//	coordinators   their addresses, host:port, one a line
//	next.pem       only while joining: the key, then also what belongs to it
package enroll

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/archfarm/archfarm/file"
	"github.com/archfarm/archfarm/identity"
)

const (
	caFile           = "ca.pem"
	certFile         = "cert.pem"
	keyFile          = "key.pem"
	coordinatorsFile = "coordinators"
	tokenFile        = "token" // the id of the token that the certificate was given for
	nextFile         = "next.pem"

	// maxFile bounds what is read of any of the files.
	maxFile = 1 << 20
)

// Credentials are a certificate and its key, in files that are read at every dial,
// so that a renewal takes effect without a word, whoever did it.
type Credentials struct {
	ca, cert, key string
	dir           string // empty for an operator's own files, which are not renewed

	// Logger is told of renewals; Clock is the time. Both may be set before use.
	Logger *slog.Logger
	Clock  func() time.Time

	mu   sync.Mutex
	last *tls.Certificate // what was read last and fitted together
}

// Load returns the credentials in a folder that Join has filled. The error is
// fs.ErrNotExist when there are none.
func Load(dir string) (*Credentials, error) {
	if err := finish(dir); err != nil {
		return nil, err
	}
	return check(&Credentials{
		ca: filepath.Join(dir, caFile), cert: filepath.Join(dir, certFile), key: filepath.Join(dir, keyFile), dir: dir,
	})
}

// Files returns credentials in an operator's own PEM files. Whoever made them
// also renews them.
func Files(ca, cert, key string) (*Credentials, error) {
	return check(&Credentials{ca: ca, cert: cert, key: key})
}

func check(c *Credentials) (*Credentials, error) {
	if _, err := c.pair(); err != nil {
		return nil, err
	}
	if _, err := c.roots(); err != nil {
		return nil, err
	}
	return c, nil
}

// Identity is who the certificate says its holder is; the zero value when the
// files cannot be read any more.
func (c *Credentials) Identity() identity.Identity {
	pair, err := c.pair()
	if err != nil {
		return identity.Identity{Kind: identity.Anonymous}
	}
	who, err := identity.Of(pair.Leaf)
	if err != nil {
		return identity.Identity{Kind: identity.Anonymous}
	}
	return who
}

// NotAfter is when the certificate expires; zero when the files cannot be read.
func (c *Credentials) NotAfter() time.Time {
	pair, err := c.pair()
	if err != nil {
		return time.Time{}
	}
	return pair.Leaf.NotAfter
}

// Dir is the folder of Load or Join; empty for Files.
func (c *Credentials) Dir() string { return c.dir }

// Coordinators are the addresses that came with the certificate, host:port.
func (c *Credentials) Coordinators() []string { return Coordinators(c.dir) }

// Coordinators are the addresses in a folder that Join has filled; none if there
// are none.
func Coordinators(dir string) []string {
	if dir == "" {
		return nil
	}
	data, err := file.Read(filepath.Join(dir, coordinatorsFile), maxFile)
	if err != nil {
		return nil
	}
	return strings.Fields(string(data))
}

// JoinedWith tells whether the certificate in a folder, or the one that it was
// renewed from, was given for this very token.
func JoinedWith(dir, text string) bool {
	token, err := identity.ParseToken(text)
	if err != nil {
		return false
	}
	id, err := file.Read(filepath.Join(dir, tokenFile), maxFile)
	return err == nil && strings.TrimSpace(string(id)) == token.ID.String()
}

// TLS is for dialing a coordinator. It verifies the server as
// identity.VerifyCoordinator does and shows the certificate; both are read from
// the files at each dial.
func (c *Credentials) TLS() *tls.Config {
	return &tls.Config{
		MinVersion:           tls.VersionTLS13,
		NextProtos:           []string{"h2"},
		InsecureSkipVerify:   true, // VerifyConnection verifies, but for the host's name
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.valid() },
		VerifyConnection: func(state tls.ConnectionState) error {
			roots, err := c.roots()
			if err != nil {
				return err
			}
			return identity.VerifyCoordinator(state, roots, c.now())
		},
	}
}

// valid returns the certificate unless it has expired. Servers would only say "bad
// certificate".
func (c *Credentials) valid() (*tls.Certificate, error) {
	pair, err := c.pair()
	if err != nil {
		return nil, err
	}
	if c.now().After(pair.Leaf.NotAfter) {
		return nil, fmt.Errorf("the %s in %s expired at %s: %s", describe(pair.Leaf), c.cert, pair.Leaf.NotAfter.Format(time.RFC3339), c.remedy())
	}
	return pair, nil
}

func (c *Credentials) remedy() string {
	if c.dir == "" {
		return "put a new one there"
	}
	return "join again with a new token (archfarm token create)"
}

func describe(leaf *x509.Certificate) string {
	who, err := identity.Of(leaf)
	if err != nil {
		return "certificate"
	}
	return string(who.Kind) + "'s certificate"
}

// pair reads the certificate and its key. While somebody replaces the two files,
// and they do not fit together, it is what they were before.
func (c *Credentials) pair() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pair, err := identity.LoadPair(c.cert, c.key)
	switch {
	case err == nil:
		c.last = pair
	case c.last == nil:
		return nil, err
	}
	return c.last, nil
}

func (c *Credentials) roots() (*x509.CertPool, error) {
	data, err := file.Read(c.ca, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading the farm's root certificate: %w", err)
	}
	certs, err := identity.ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("reading the farm's root certificate %s: %w", c.ca, err)
	}
	pool := x509.NewCertPool()
	for _, cert := range certs {
		pool.AddCert(cert)
	}
	return pool, nil
}

func (c *Credentials) now() time.Time {
	if c.Clock != nil {
		return c.Clock()
	}
	return time.Now()
}

func (c *Credentials) logger() *slog.Logger {
	return cmp.Or(c.Logger, slog.New(slog.DiscardHandler))
}

// finish completes what a Join that was interrupted has received.
func finish(dir string) error {
	data, err := file.Read(filepath.Join(dir, nextFile), maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading what is left of joining: %w", err)
	}
	next, err := parseNext(data)
	if err != nil || len(next.certificates) == 0 { // joining again makes it good
		return nil // a folder without credentials is not broken
	}
	return install(dir, next)
}
