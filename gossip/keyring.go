package gossip

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/hashicorp/memberlist"

	"github.com/archfarm/archfarm/file"
)

const (
	// keySize makes AES-256.
	keySize = 32
	// maxKeys bounds a keyring: a rotation takes two, and each key more is tried on
	// every packet of a stranger.
	maxKeys = 8
	// maxKeyring bounds a keyring's file.
	maxKeyring = 4 << 10
)

// Why a keyring cannot be changed as asked.
var (
	// ErrUnknownKey tells that no key of the ring has the id.
	ErrUnknownKey = errors.New("no key of the keyring has this id")
	// ErrPrimaryKey tells that the key is the one in use.
	ErrPrimaryKey = errors.New("gossip is encrypted with this key; use another one first")
	// ErrKeyringFull tells that the ring has as many keys as it may.
	ErrKeyringFull = fmt.Errorf("the keyring has %d keys already; remove one first", maxKeys)
)

// Keyring is the keys that a member decrypts gossip with, 16, 24 or 32 bytes each.
// It encrypts with the first, the primary. An empty ring is gossip in the clear.
// Rings are values: what changes one returns another.
type Keyring [][]byte

// NewKey makes a key of 32 random bytes.
func NewKey() []byte {
	key := make([]byte, keySize)
	_, _ = rand.Read(key) // never fails (crypto/rand)
	return key
}

// KeyID names a key without telling it: the first 8 bytes of its SHA-256 sum, in
// hexadecimal.
func KeyID(key []byte) string {
	sum := sha256.Sum256(key)
	return hex.EncodeToString(sum[:8])
}

// Validate says what is wrong with a ring: keys of another size, the same twice,
// or more than 8.
func (k Keyring) Validate() error {
	if len(k) > maxKeys {
		return fmt.Errorf("a keyring of %d keys; at most %d make sense", len(k), maxKeys)
	}
	for i, key := range k {
		if err := memberlist.ValidateKey(key); err != nil {
			return fmt.Errorf("the key has %d bytes; use 16, 24 or 32", len(key))
		}
		if k[:i].Has(key) {
			return fmt.Errorf("the key %s is twice in the keyring", KeyID(key))
		}
	}
	return nil
}

// Has tells whether key is one of the ring.
func (k Keyring) Has(key []byte) bool {
	return slices.ContainsFunc(k, func(own []byte) bool { return subtle.ConstantTimeCompare(own, key) == 1 })
}

// Equal tells whether both have the same keys in the same order.
func (k Keyring) Equal(other Keyring) bool { return slices.EqualFunc(k, other, bytes.Equal) }

// Hears tells whether a member with this ring understands one with the other: no
// member that is encrypted understands one that is not.
func (k Keyring) Hears(other Keyring) bool {
	if len(k) == 0 || len(other) == 0 {
		return len(k) == len(other)
	}
	return k.Has(other[0])
}

// Install returns the ring with one key more, to decrypt with. A key that is there
// already changes nothing.
func (k Keyring) Install(key []byte) (Keyring, error) {
	if k.Has(key) {
		return k, nil
	}
	if len(k) >= maxKeys {
		return nil, ErrKeyringFull
	}
	grown := append(slices.Clone(k), slices.Clone(key))
	return grown, grown.Validate()
}

// Use returns the ring with the key of that id as the one to encrypt with, or
// ErrUnknownKey.
func (k Keyring) Use(id string) (Keyring, error) {
	i := k.index(id)
	if i < 0 {
		return nil, ErrUnknownKey
	}
	return slices.Concat(Keyring{k[i]}, k[:i], k[i+1:]), nil
}

// Remove returns the ring without the key of that id, ErrUnknownKey, or
// ErrPrimaryKey if it is the one in use.
func (k Keyring) Remove(id string) (Keyring, error) {
	switch i := k.index(id); i {
	case -1:
		return nil, ErrUnknownKey
	case 0:
		return nil, ErrPrimaryKey
	default:
		return slices.Concat(k[:i], k[i+1:]), nil
	}
}

func (k Keyring) index(id string) int {
	return slices.IndexFunc(k, func(key []byte) bool { return KeyID(key) == id })
}

// Merge returns the ring of a member that several others, who may be at different
// steps of a rotation, gave theirs, the latest first. It has every key, and
// encrypts with the first of the latest ring that all others have too, so that all
// of them hear it; if there is none, as the latest does. Of more than 8 keys it has
// the first 8.
func Merge(latest Keyring, others ...Keyring) Keyring {
	var merged Keyring
	for _, ring := range slices.Concat([]Keyring{latest}, others) {
		for _, key := range ring {
			if !merged.Has(key) {
				merged = append(merged, key)
			}
		}
	}
	for i, key := range latest {
		if !slices.ContainsFunc(others, func(o Keyring) bool { return len(o) > 0 && !o.Has(key) }) {
			merged = slices.Concat(Keyring{key}, merged[:i], merged[i+1:])
			break
		}
	}
	return merged[:min(len(merged), maxKeys)]
}

// Parts tells whether members that understood each other would no more, if one of
// them changed its ring from before to after: whether it is too early for that.
func Parts(before, after Keyring, others ...Keyring) bool {
	return slices.ContainsFunc(others, func(o Keyring) bool {
		return o.Hears(before) && !o.Hears(after) || before.Hears(o) && !after.Hears(o)
	})
}

// LoadKeyring reads a ring from a file as StoreKeyring writes it: one key a line,
// in base64, the one to encrypt with first. A file that is not there is an empty
// ring.
func LoadKeyring(path string) (Keyring, error) {
	data, err := file.Read(path, maxKeyring)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the gossip keyring: %w", err)
	}
	ring, err := parseKeyring(data)
	if err != nil {
		return nil, fmt.Errorf("reading the gossip keyring %s: %w", path, err)
	}
	return ring, nil
}

func parseKeyring(data []byte) (Keyring, error) {
	if len(data) > maxKeyring {
		return nil, fmt.Errorf("it is larger than %d bytes", maxKeyring)
	}
	var ring Keyring
	for i, line := range bytes.Split(bytes.TrimSpace(data), []byte("\n")) {
		key, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(line)))
		if err != nil || len(key) == 0 {
			return nil, fmt.Errorf("line %d is not a key in base64", i+1) // and does not tell what it is
		}
		ring = append(ring, key)
	}
	return ring, ring.Validate()
}

// StoreKeyring writes a ring to a file that only its owner may read. After a crash
// there is the former ring or this one.
func StoreKeyring(path string, ring Keyring) error {
	err := ring.Validate()
	if len(ring) == 0 {
		err = errors.New("it has no key")
	}
	if err != nil {
		return fmt.Errorf("storing the gossip keyring: %w", err)
	}
	var data []byte
	for _, key := range ring {
		data = append(base64.StdEncoding.AppendEncode(data, key), '\n')
	}
	if err := file.Replace(path, data, 0o600); err != nil {
		return fmt.Errorf("storing the gossip keyring: %w", err)
	}
	return nil
}

// Keys returns the ring in use, empty when gossip is in the clear.
func (n *Node) Keys() Keyring { return slices.Clone(Keyring(n.keyring.GetKeys())) }

// SetKeyring changes the keys at once, without losing a member that has a key in
// common. Gossip that is in the clear can become encrypted, but not the other way.
func (n *Node) SetKeyring(keys [][]byte) error {
	wanted := Keyring(keys)
	if err := wanted.Validate(); err != nil {
		return fmt.Errorf("changing the gossip keys: %w", err)
	}
	n.keying.Lock()
	defer n.keying.Unlock()
	if len(wanted) == 0 {
		if len(n.Keys()) == 0 {
			return nil
		}
		return errors.New("changing the gossip keys: none is left, and gossip would be in the clear")
	}
	if wanted.Equal(n.Keys()) {
		return nil
	}
	if err := setKeyring(n.keyring, wanted); err != nil {
		return fmt.Errorf("changing the gossip keys: %w", err)
	}
	n.poke() // members that could not be understood may be by now
	return nil
}

// setKeyring first understands all, then speaks the new key, then forgets the old
// ones. memberlist hands its list of keys out uncopied, and shifts it in place where
// a key is removed that is not the last: keys behind such a one are taken from the
// end and put back, an instant later.
func setKeyring(ring *memberlist.Keyring, wanted Keyring) error {
	for _, key := range wanted {
		if err := ring.AddKey(slices.Clone(key)); err != nil {
			return err
		}
	}
	if err := ring.UseKey(wanted[0]); err != nil {
		return err
	}
	keys := slices.Clone(Keyring(ring.GetKeys()))
	surplus := slices.IndexFunc(keys, func(key []byte) bool { return !wanted.Has(key) })
	if surplus < 0 {
		return nil
	}
	for _, key := range slices.Backward(keys[surplus:]) {
		if err := ring.RemoveKey(key); err != nil {
			return err
		}
	}
	for _, key := range keys[surplus:] {
		if wanted.Has(key) {
			if err := ring.AddKey(key); err != nil {
				return err
			}
		}
	}
	return nil
}
