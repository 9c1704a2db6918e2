package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/archfarm/archfarm/file"
	"github.com/archfarm/archfarm/identity"
)

const (
	// caLifetime is that of the embedded CA.
	caLifetime = 10 * 365 * 24 * time.Hour
	// serverLifetime is that of the coordinator's own certificate, which it makes
	// again at every start and at two thirds of this.
	serverLifetime = 30 * 24 * time.Hour
	// clockSkew is how far a certificate's beginning lies back, for machines whose
	// clock is behind.
	clockSkew = 5 * time.Minute

	// maxFile bounds the files that are read.
	maxFile = 1 << 20
)

// issuer is the certificate authority. Its zero key cannot issue.
type issuer struct {
	cert *x509.Certificate // whose key signs
	key  crypto.Signer     // nil: verifies only
	// above are the certificates from cert up to a root, without cert when that is
	// the root.
	above []*x509.Certificate
	roots []*x509.Certificate
}

// root is what tokens name by its fingerprint.
func (i *issuer) root() *x509.Certificate { return i.roots[0] }

// pool holds the roots.
func (i *issuer) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, cert := range i.roots {
		pool.AddCert(cert)
	}
	return pool
}

// intermediates follow a leaf that this issuer has signed; roots are not among them.
func (i *issuer) intermediates() [][]byte {
	var out [][]byte
	for _, cert := range append([]*x509.Certificate{i.cert}, i.above...) {
		if !slices.ContainsFunc(i.roots, cert.Equal) {
			out = append(out, cert.Raw)
		}
	}
	return out
}

func selfSigned(cert *x509.Certificate) bool {
	return bytes.Equal(cert.RawIssuer, cert.RawSubject) && cert.CheckSignatureFrom(cert) == nil
}

// sign issues a certificate of an identity to the holder of a key.
func (i *issuer) sign(who identity.Identity, key crypto.PublicKey, from, until time.Time, server *serverNames) (*x509.Certificate, error) {
	if until.After(i.cert.NotAfter) {
		until = i.cert.NotAfter
	}
	if !until.After(from) {
		return nil, fmt.Errorf("the farm's own CA certificate expires at %s: it can issue nothing any more", i.cert.NotAfter.Format(time.RFC3339))
	}
	template := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: commonName(who)},
		URIs:         []*url.URL{who.URI()},
		NotBefore:    from.Add(-min(clockSkew, until.Sub(from)/10)), // of a short life, little: it is renewed at two thirds
		NotAfter:     until,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if server != nil {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		template.DNSNames, template.IPAddresses = server.dns, server.ips
	}
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, key, i.key)
	if err != nil {
		return nil, fmt.Errorf("signing the certificate of %s: %w", who, err)
	}
	return x509.ParseCertificate(der)
}

// commonName is for people who look at a certificate; at most 64 characters fit
// (X.520, ub-common-name).
func commonName(who identity.Identity) string { return who.Name[:min(len(who.Name), 64)] }

// serial is a random number of 127 bits (RFC 5280, section 4.1.2.2).
func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return n.Add(n, big.NewInt(1))
}

// serverNames are what clients that verify host names may call the coordinator.
type serverNames struct {
	dns []string
	ips []net.IP
}

func namesOf(name string, hosts []string) *serverNames {
	out := &serverNames{}
	seen := map[string]bool{}
	for _, host := range append([]string{"localhost", name, "127.0.0.1", "::1"}, hosts...) {
		if ip := net.ParseIP(host); ip != nil {
			if !ip.IsUnspecified() && !seen[ip.String()] {
				out.ips = append(out.ips, ip)
			}
			seen[ip.String()] = true
		} else if host != "" && !seen[host] {
			out.dns = append(out.dns, host)
			seen[host] = true
		}
	}
	return out
}

// openIssuer reads the operator's own CA, or the embedded one, which it makes when
// there is none.
func openIssuer(cfg Config) (*issuer, error) {
	switch {
	case cfg.CACert == "" && (cfg.CAKey != "" || cfg.TLSCert != ""):
		return nil, errors.New("a key or a server certificate of your own needs the CA's certificate too")
	case cfg.CACert == "":
		dir := filepath.Join(cfg.Dir, "ca")
		if err := ensureCA(dir, cfg); err != nil {
			return nil, err
		}
		return readIssuer(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key"))
	case cfg.CAKey == "" && cfg.TLSCert == "":
		return nil, errors.New("the CA's certificate alone is not enough: give its key, or a server certificate and its key")
	}
	return readIssuer(cfg.CACert, cfg.CAKey)
}

// readIssuer reads a CA: certificates in any order, one of them the key's.
func readIssuer(certPath, keyPath string) (*issuer, error) {
	certs, err := readCertificates(certPath)
	if err != nil {
		return nil, err
	}
	i := &issuer{cert: certs[0]}
	for _, cert := range certs {
		if !cert.IsCA {
			return nil, fmt.Errorf("reading the CA %s: %s is no CA's certificate (basic constraints)", certPath, cert.Subject)
		}
		if selfSigned(cert) {
			i.roots = append(i.roots, cert)
		}
	}
	if keyPath != "" {
		if i.key, err = readKey(keyPath); err != nil {
			return nil, err
		}
		if i.cert = certificateOf(i.key, certs); i.cert == nil {
			return nil, fmt.Errorf("reading the CA: the key %s belongs to no certificate in %s", keyPath, certPath)
		}
	}
	if len(i.roots) == 0 { // an intermediate that is trusted as it is
		i.roots = []*x509.Certificate{i.cert}
	}
	for _, cert := range certs {
		if !cert.Equal(i.cert) {
			i.above = append(i.above, cert)
		}
	}
	if i.key == nil {
		return i, nil
	}
	return i, i.verify(certPath)
}

// verify makes sure that what the issuer signs leads to its root.
func (i *issuer) verify(path string) error {
	above := x509.NewCertPool()
	for _, cert := range i.above {
		above.AddCert(cert)
	}
	options := x509.VerifyOptions{Roots: i.pool(), Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, CurrentTime: i.cert.NotBefore}
	chains, err := i.cert.Verify(options)
	if err != nil {
		return fmt.Errorf("reading the CA %s: the key's certificate does not lead to the root in the file: %w", path, err)
	}
	top := chains[0][len(chains[0])-1]
	i.roots = append([]*x509.Certificate{top}, slices.DeleteFunc(i.roots, top.Equal)...)
	return nil
}

func certificateOf(key crypto.Signer, certs []*x509.Certificate) *x509.Certificate {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	for _, cert := range certs {
		if ok && public.Equal(cert.PublicKey) {
			return cert
		}
	}
	return nil
}

// ensureCA makes the embedded CA. The certificate is written last: a key without
// one, after a crash, is replaced, because nothing was signed with it.
func ensureCA(dir string, cfg Config) error {
	certPath, keyPath := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "ca.key")
	if _, err := os.Stat(certPath); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the CA's folder: %w", err)
	}
	key, err := newKey()
	if err != nil {
		return err
	}
	now := cfg.Clock()
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "archfarm CA", OrganizationalUnit: []string{commonName(identity.Identity{Name: cfg.Name})}},
		NotBefore:             now.Add(-clockSkew),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return fmt.Errorf("making the CA's certificate: %w", err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("writing the CA's key: %w", err)
	}
	if err := file.Replace(keyPath, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600); err != nil {
		return fmt.Errorf("writing the CA's key: %w", err)
	}
	if err := file.Replace(certPath, identity.EncodeCertificates(der), 0o600); err != nil {
		return fmt.Errorf("writing the CA's certificate: %w", err)
	}
	return nil
}

func newKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	return key, nil
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	data, err := file.Read(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading a certificate: %w", err)
	}
	certs, err := identity.ParseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate %s: %w", path, err)
	}
	return certs, nil
}

// readKey reads a private key of any of the formats that tls.LoadX509KeyPair does.
func readKey(path string) (crypto.Signer, error) {
	data, err := file.Read(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading a key: %w", err)
	}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if key, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
			if signer, ok := key.(crypto.Signer); ok {
				return signer, nil
			}
		}
		if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
			return key, nil
		}
		if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("reading the key %s: there is no private key in it that could be used (PEM, without a passphrase)", path)
}

// ownServer reads the operator's own server certificate.
func ownServer(certPath, keyPath string) (*tls.Certificate, error) {
	pair, err := identity.LoadPair(certPath, keyPath)
	if err != nil {
		return nil, fmt.Errorf("the server certificate: %w", err)
	}
	if who, err := identity.Of(pair.Leaf); len(pair.Leaf.URIs) > 0 && (err != nil || who.Kind != identity.Coordinator) {
		return nil, fmt.Errorf("the server certificate %s has a URI that is no coordinator's: use spiffe://%s/coordinator/NAME, or none", certPath, identity.TrustDomain)
	}
	return pair, nil
}
