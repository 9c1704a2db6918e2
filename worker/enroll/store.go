package enroll

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/archfarm/archfarm/file"
	"github.com/archfarm/archfarm/identity"
)

const (
	keyBlock         = "PRIVATE KEY" // PKCS #8 (RFC 5958)
	rootBlock        = "ARCHFARM ROOT"
	certificateBlock = "CERTIFICATE"
	tokenHeader      = "Token"
	nameHeader       = "Name"
	coordinators     = "Coordinators"
)

// next is what next.pem holds: the key that a token is being used with, and, once
// the authority has answered, everything that belongs into the folder.
type next struct {
	token, name  string // the token's id, and the name asked for
	key          crypto.Signer
	certificates [][]byte // DER, leaf first
	roots        [][]byte
	coordinators []string
}

// nextKey returns the key to join with. A token that was tried before, perhaps by
// a process that died with the answer, is tried again with the same key, which
// does not use it up twice.
func nextKey(dir, token, name string) (*next, error) {
	if data, err := file.Read(filepath.Join(dir, nextFile), maxFile); err == nil {
		if n, err := parseNext(data); err == nil && n.token == token && n.name == name {
			n.certificates, n.roots, n.coordinators = nil, nil, nil
			return n, nil
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	n := &next{token: token, name: name, key: key}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder for certificates: %w", err)
	}
	return n, n.save(dir)
}

func (n *next) save(dir string) error {
	key, err := encodeKey(n.key, map[string]string{tokenHeader: n.token, nameHeader: n.name, coordinators: strings.Join(n.coordinators, " ")})
	if err != nil {
		return err
	}
	out := append(key, identity.EncodeCertificates(n.certificates...)...)
	for _, root := range n.roots {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: rootBlock, Bytes: root})...)
	}
	return writeFile(dir, nextFile, out, 0o600)
}

func parseNext(data []byte) (*next, error) {
	n := &next{}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		switch block.Type {
		case keyBlock:
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return nil, err
			}
			n.key, _ = key.(crypto.Signer)
			n.token, n.name = block.Headers[tokenHeader], block.Headers[nameHeader]
			n.coordinators = strings.Fields(block.Headers[coordinators])
		case certificateBlock:
			n.certificates = append(n.certificates, block.Bytes)
		case rootBlock:
			n.roots = append(n.roots, block.Bytes)
		}
	}
	if n.key == nil {
		return nil, errors.New("there is no key in it")
	}
	return n, nil
}

// install makes the folder's files those of n. It may be interrupted anywhere:
// next.pem goes last, and whoever loads the folder next does the rest.
func install(dir string, n *next) error {
	key, err := encodeKey(n.key, nil)
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		data []byte
		mode os.FileMode
	}{
		{caFile, identity.EncodeCertificates(n.roots...), 0o644},
		{coordinatorsFile, []byte(strings.Join(append(n.coordinators, ""), "\n")), 0o644},
		{tokenFile, []byte(n.token + "\n"), 0o644},
		{keyFile, key, 0o600},
		{certFile, identity.EncodeCertificates(n.certificates...), 0o644},
	} {
		if err := writeFile(dir, f.name, f.data, f.mode); err != nil {
			return err
		}
	}
	if err := os.Remove(filepath.Join(dir, nextFile)); err != nil {
		return fmt.Errorf("tidying up after joining: %w", err)
	}
	return nil
}

func encodeKey(key crypto.Signer, headers map[string]string) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("writing a key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: keyBlock, Headers: headers, Bytes: der}), nil
}

// writeFile replaces a file at once, and durably. What is there already, and the
// same, stays.
func writeFile(dir, name string, data []byte, mode os.FileMode) error {
	path := filepath.Join(dir, name)
	if present, err := file.Read(path, maxFile); err == nil && bytes.Equal(present, data) {
		return nil
	}
	return file.Replace(path, data, mode)
}
