package identity

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/archfarm/archfarm/file"
)

// maxPEM bounds files with certificates and keys.
const maxPEM = 1 << 20

// LoadPair reads a certificate and its key, PEM files; what stands above the
// certificate follows it. Leaf is set.
func LoadPair(certPath, keyPath string) (*tls.Certificate, error) {
	cert, err := file.Read(certPath, maxPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate: %w", err)
	}
	key, err := file.Read(keyPath, maxPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate's key: %w", err)
	}
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("reading the certificate %s and its key %s: %w", certPath, keyPath, err)
	}
	if pair.Leaf, err = x509.ParseCertificate(pair.Certificate[0]); err != nil {
		return nil, err
	}
	return &pair, nil
}

// VerifyCoordinator checks what a server has shown: that its certificate leads to
// one of the roots, is valid now and names a coordinator. The host's name does not
// count, because coordinators are reached by many and move; it does for a server
// certificate of the operator's own that names no identity of the farm.
func VerifyCoordinator(state tls.ConnectionState, roots *x509.CertPool, now time.Time) error {
	if len(state.PeerCertificates) == 0 {
		return errors.New("the server has shown no certificate")
	}
	leaf, above := state.PeerCertificates[0], x509.NewCertPool()
	for _, cert := range state.PeerCertificates[1:] {
		above.AddCert(cert)
	}
	options := x509.VerifyOptions{Roots: roots, Intermediates: above, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if len(leaf.URIs) == 0 {
		options.DNSName = state.ServerName
	}
	if _, err := leaf.Verify(options); err != nil {
		return fmt.Errorf("the server's certificate is not one of this farm's: %w", err)
	}
	if len(leaf.URIs) == 0 && state.ServerName != "" {
		return nil
	}
	who, err := Of(leaf)
	if err != nil {
		return err
	}
	if who.Kind != Coordinator {
		return fmt.Errorf("the server is %s, and no coordinator", who)
	}
	return nil
}

// ParseCertificates reads the certificates of a PEM file, and skips whatever else
// it holds. A file without any is an error.
func ParseCertificates(data []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("there is no certificate in it (PEM, -----BEGIN CERTIFICATE-----)")
	}
	return certs, nil
}

// EncodeCertificates writes certificates as ParseCertificates reads them.
func EncodeCertificates(der ...[]byte) []byte {
	var out []byte
	for _, cert := range der {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})...)
	}
	return out
}
