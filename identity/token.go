package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"slices"
	"strings"
)

const (
	// tokenPrefix begins every join token; the number is that of the format.
	tokenPrefix = "archfarm1."
	// MaxToken bounds a token's text.
	MaxToken = 4 << 10
	// maxTokenAddress bounds an address in it, maxTokenAddresses their number.
	maxTokenAddress, maxTokenAddresses = 300, 16
)

// Token is a join token: what somebody needs to get a certificate, and to know
// that it is the farm which gives it.
//
// Its text is "archfarm1." and, in base64url without padding, the id, the secret,
// the fingerprint, the coordinators' addresses separated by commas, and the CRC-32
// (IEEE, big endian) of all that; between fingerprint and addresses a letter for the
// kind.
type Token struct {
	ID     TokenID
	Secret [16]byte
	// Kind is what one becomes with it, for a better error than the authority's,
	// which does not ask the token.
	Kind Kind
	// Fingerprint is the SHA-256 sum of the root certificate, in DER.
	Fingerprint [sha256.Size]byte
	// Coordinators are where to use it, host:port.
	Coordinators []string
}

// TokenID names a token without telling its secret.
type TokenID [8]byte

// String is the id in hexadecimal, as lists of tokens show it.
func (id TokenID) String() string { return hex.EncodeToString(id[:]) }

// NewToken makes a token with a secret of its own. Addresses that are too long or
// too many for it are left out.
func NewToken(kind Kind, root *x509.Certificate, coordinators []string) Token {
	t := Token{Kind: kind, Fingerprint: Fingerprint(root)}
	_, _ = rand.Read(t.ID[:]) // never fails
	_, _ = rand.Read(t.Secret[:])
	for _, address := range coordinators {
		if tokenAddress(address) && len(t.Coordinators) < maxTokenAddresses {
			t.Coordinators = append(t.Coordinators, address)
		}
	}
	return t
}

// Fingerprint is the SHA-256 sum of a certificate.
func Fingerprint(cert *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(cert.Raw) }

// Text is the token with its secret. Show it to whom it is for, and nobody else.
func (t Token) Text() string {
	data := slices.Concat(t.ID[:], t.Secret[:], t.Fingerprint[:], []byte{letterOf(t.Kind)}, []byte(strings.Join(t.Coordinators, ",")))
	data = binary.BigEndian.AppendUint32(data, crc32.ChecksumIEEE(data))
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(data)
}

// String names the token without its secret.
func (t Token) String() string { return "token " + t.ID.String() }

// GoString names the token without its secret.
func (t Token) GoString() string { return t.String() }

// LogValue names the token without its secret.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.ID.String()) }

// ParseToken reads a token's text. Its errors do not quote it.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	encoded, found := strings.CutPrefix(text, tokenPrefix)
	switch {
	case len(text) > MaxToken:
		return Token{}, fmt.Errorf("the join token is longer than %d characters", MaxToken)
	case !found && strings.HasPrefix(text, "archfarm"):
		return Token{}, errors.New("the join token is of a kind that this version does not know: use the coordinator's version")
	case !found:
		return Token{}, errors.New("the join token does not begin with " + tokenPrefix + ": copy the whole line that archfarm token create has printed")
	}
	data, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	var t Token
	fixed := len(t.ID) + len(t.Secret) + len(t.Fingerprint) + 1
	if err != nil || len(data) < fixed+crc32.Size {
		return Token{}, errDamaged
	}
	data, sum := data[:len(data)-crc32.Size], data[len(data)-crc32.Size:]
	if binary.BigEndian.Uint32(sum) != crc32.ChecksumIEEE(data) {
		return Token{}, errDamaged
	}
	r := bytes.NewBuffer(data)
	for _, field := range [][]byte{t.ID[:], t.Secret[:], t.Fingerprint[:]} {
		copy(field, r.Next(len(field)))
	}
	letter, _ := r.ReadByte()
	t.Kind = map[byte]Kind{'w': Worker, 'c': Client, 'a': Admin}[letter]
	if r.Len() > 0 {
		t.Coordinators = strings.Split(r.String(), ",")
	}
	if len(t.Coordinators) > maxTokenAddresses || slices.ContainsFunc(t.Coordinators, func(a string) bool { return !tokenAddress(a) }) {
		return Token{}, errDamaged
	}
	if t.Text() != text { // DecodeString skips line breaks
		return Token{}, errDamaged
	}
	return t, nil
}

func letterOf(kind Kind) byte {
	if kind == "" {
		return 0
	}
	return kind[0]
}

var errDamaged = errors.New("the join token is damaged: copy the whole line that archfarm token create has printed")

// tokenAddress keeps to what stands in a host's name, an IP address and a port.
func tokenAddress(a string) bool {
	return a != "" && len(a) <= maxTokenAddress && !strings.ContainsFunc(a, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune(".-_:%[]", r)
	})
}
