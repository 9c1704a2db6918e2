// Package seal encrypts what a coordinator keeps of others: secrets and credentials
// of jobs, stored secrets.
package seal

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/archfarm/archfarm/file"
)

// Errors of Unseal.
var (
	// ErrOtherKey tells that none of the file's keys sealed the data.
	ErrOtherKey = errors.New("sealed by a key that is not there")
	// ErrAltered tells that the data were altered, or sealed for another place.
	ErrAltered = errors.New("altered, or sealed for another place")
)

const (
	// version is the first byte of what is sealed: XChaCha20-Poly1305
	// (draft-irtf-cfrg-xchacha-01), whose nonces may be chosen at random for any
	// number of messages.
	version = 1
	idSize  = 8
	header  = 1 + idSize
	// Overhead is by how many bytes sealed data are longer.
	Overhead = header + chacha20poly1305.NonceSizeX + chacha20poly1305.Overhead

	maxFile = 64 << 10
)

// Key seals with a file's first key, and unseals with any of them. It does not show
// when printed.
type Key struct {
	path string
	keys []key
}

type key struct {
	id   [idSize]byte
	aead cipher.AEAD
}

// Open reads a file of keys, and makes one with a new key (mode 0600) where there is
// none. The caller has the folder for itself.
//
// Each line is a key, 32 bytes in hexadecimal digits or base64 (openssl rand -hex
// 32); lines that are empty or begin with '#' don't count. To change keys, put the
// new one first and leave the others there for as long as something is sealed by them
// (Reseal).
func Open(path string) (*Key, error) {
	k, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return k, err
	}
	fresh := make([]byte, chacha20poly1305.KeySize)
	_, _ = rand.Read(fresh) // never fails
	text := "# Key of the secrets that this coordinator stores. Without it they are lost.\n" + hex.EncodeToString(fresh) + "\n"
	if err := file.Replace(path, []byte(text), 0o600); err != nil {
		return nil, fmt.Errorf("making a key for secrets: %w", err)
	}
	return Load(path)
}

// Load reads a file of keys as Open does, and fails with fs.ErrNotExist where there
// is none.
func Load(path string) (*Key, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("reading the key for secrets: %w", err)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return nil, fmt.Errorf("reading the key for secrets: everyone on this machine may use %s (mode %04o): chmod 600 it", path, info.Mode().Perm())
	}
	text, err := file.Read(path, maxFile)
	if err != nil {
		return nil, fmt.Errorf("reading the key for secrets: %w", err)
	}
	k := &Key{path: path}
	number := 0
	for line := range strings.Lines(string(text)) {
		number++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		raw, err := decode(line)
		if err != nil {
			return nil, fmt.Errorf("reading the key for secrets: %s, line %d: %w", path, number, err)
		}
		k.keys = append(k.keys, raw)
	}
	if len(k.keys) == 0 {
		return nil, fmt.Errorf("reading the key for secrets: %s has no key: restore it from a backup; only if nothing was sealed yet, write one with openssl rand -hex 32", path)
	}
	return k, nil
}

// decode reads one key. Errors do not show it.
func decode(line string) (key, error) {
	raw, err := hex.DecodeString(line)
	if err != nil || len(raw) != chacha20poly1305.KeySize {
		raw, err = base64.StdEncoding.DecodeString(line)
	}
	if err != nil || len(raw) != chacha20poly1305.KeySize {
		return key{}, fmt.Errorf("this is no key: want %d bytes in hexadecimal digits or base64 (openssl rand -hex 32)", chacha20poly1305.KeySize)
	}
	if bytes.Count(raw, raw[:1]) == len(raw) {
		return key{}, errors.New("this key is one byte repeated: make one with openssl rand -hex 32")
	}
	aead, err := chacha20poly1305.NewX(raw)
	if err != nil {
		return key{}, err
	}
	sum := sha256.Sum256(append([]byte("archfarm: id of a key for secrets\x00"), raw...))
	return key{id: [idSize]byte(sum[:idSize]), aead: aead}, nil
}

// ID of the key that seals: 16 hexadecimal digits, from which the key cannot be
// told.
func (k *Key) ID() string { return hex.EncodeToString(k.keys[0].id[:]) }

// Has tells whether the file holds the key of this ID: what it sealed can be
// unsealed.
func (k *Key) Has(id string) bool {
	return slices.ContainsFunc(k.keys, func(one key) bool { return hex.EncodeToString(one.id[:]) == id })
}

// Path of the file.
func (k *Key) Path() string { return k.path }

// String names the key without showing it.
func (k *Key) String() string { return "key " + k.ID() + " of " + k.path }

// GoString is String.
func (k *Key) GoString() string { return k.String() }

// Seal encrypts. Only Unseal with the same context reads it: what it belongs to, as
// the tenant and the job, so that nothing sealed can be put elsewhere.
func (k *Key) Seal(plain, context []byte) ([]byte, error) {
	one := k.keys[0]
	out := make([]byte, header+chacha20poly1305.NonceSizeX, len(plain)+Overhead)
	out[0] = version
	copy(out[1:], one.id[:])
	nonce := out[header:]
	if _, err := rand.Read(nonce); err != nil {
		return nil, fmt.Errorf("sealing: %w", err)
	}
	return one.aead.Seal(out, nonce, plain, bind(out[:header], context)), nil
}

// Unseal decrypts what Seal returned. Errors are ErrOtherKey and ErrAltered.
func (k *Key) Unseal(sealed, context []byte) ([]byte, error) {
	if len(sealed) < Overhead {
		return nil, fmt.Errorf("unsealing: %d bytes are too few: %w", len(sealed), ErrAltered)
	}
	if sealed[0] != version {
		return nil, fmt.Errorf("unsealing: version %d of the format is unknown here, which a newer archfarm may have written: %w", sealed[0], ErrAltered)
	}
	id := [idSize]byte(sealed[1:header])
	i := slices.IndexFunc(k.keys, func(one key) bool { return one.id == id })
	if i < 0 {
		return nil, fmt.Errorf("unsealing: the key %x is not in %s, whose first is %s: restore the file, or add the other key as a further line: %w", id, k.path, k.ID(), ErrOtherKey)
	}
	nonce, box := sealed[header:header+chacha20poly1305.NonceSizeX], sealed[header+chacha20poly1305.NonceSizeX:]
	plain, err := k.keys[i].aead.Open(nil, nonce, box, bind(sealed[:header], context))
	if err != nil {
		return nil, fmt.Errorf("unsealing with the key %x of %s: %w", id, k.path, ErrAltered)
	}
	return plain, nil
}

// Reseal returns what the first key has sealed as it is, and anything else sealed anew
// by it. Errors as Unseal.
func (k *Key) Reseal(sealed, context []byte) ([]byte, error) {
	if len(sealed) >= header && sealed[0] == version && [idSize]byte(sealed[1:header]) == k.keys[0].id {
		return sealed, nil
	}
	plain, err := k.Unseal(sealed, context)
	if err != nil {
		return nil, err
	}
	return k.Seal(plain, context)
}

// bind is the additional data: all that is not encrypted, and the context.
func bind(header, context []byte) []byte {
	return append(slices.Clip(slices.Clone(header)), context...)
}

// Context joins the parts of a context so that no two lists of parts are alike.
func Context(parts ...string) []byte {
	var out []byte
	for _, part := range parts {
		out = fmt.Appendf(out, "%d:%s", len(part), part)
	}
	return out
}
