package gossip

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/memberlist"
	"pgregory.net/rapid"
)

// key is a key that a reader can tell from others: of 'a', of 'b'.
func key(letter byte) []byte { return bytes.Repeat([]byte{letter}, 32) }

// ring is a keyring written as "ab".
func ring(letters string) Keyring {
	var out Keyring
	for _, l := range []byte(letters) {
		out = append(out, key(l))
	}
	return out
}

func (k Keyring) letters() string {
	var out strings.Builder
	for _, key := range k {
		out.WriteByte(key[0])
	}
	return out.String()
}

func TestKeyring_Changes(t *testing.T) {
	t.Parallel()
	install := func(l byte) func(Keyring) (Keyring, error) {
		return func(k Keyring) (Keyring, error) { return k.Install(key(l)) }
	}
	use := func(l byte) func(Keyring) (Keyring, error) {
		return func(k Keyring) (Keyring, error) { return k.Use(KeyID(key(l))) }
	}
	remove := func(l byte) func(Keyring) (Keyring, error) {
		return func(k Keyring) (Keyring, error) { return k.Remove(KeyID(key(l))) }
	}
	for name, c := range map[string]struct {
		from   string
		change func(Keyring) (Keyring, error)
		want   string
		err    error
	}{
		"install":                   {"a", install('b'), "ab", nil},
		"install what is there":     {"ab", install('b'), "ab", nil},
		"install beyond the bound":  {"abcdefgh", install('i'), "", ErrKeyringFull},
		"use":                       {"abc", use('c'), "cab", nil},
		"use what is in use":        {"ab", use('a'), "ab", nil},
		"use what nobody has":       {"ab", use('c'), "", ErrUnknownKey},
		"remove":                    {"abc", remove('b'), "ac", nil},
		"remove what is in use":     {"ab", remove('a'), "", ErrPrimaryKey},
		"remove what nobody has":    {"ab", remove('c'), "", ErrUnknownKey},
		"remove the only one there": {"a", remove('a'), "", ErrPrimaryKey},
	} {
		before := ring(c.from)
		got, err := c.change(before)
		if !errors.Is(err, c.err) || got.letters() != c.want {
			t.Errorf("%s: %q, %v; want %q, %v", name, got.letters(), err, c.want, c.err)
		}
		if before.letters() != c.from {
			t.Errorf("%s changed the ring that it was given to %q", name, before.letters())
		}
	}
	if _, err := ring("a").Install([]byte("short")); err == nil {
		t.Error("installed a short key")
	}
}

func TestMerge(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		latest string
		others []string
		want   string
	}{
		{"a", nil, "a"},
		{"ab", []string{""}, "ab"},
		{"ab", []string{"a"}, "ab"},
		{"ba", []string{"a"}, "ab"}, // the other does not have b yet
		{"ba", []string{"ab"}, "ba"},
		{"ab", []string{"ba"}, "ab"},
		{"b", []string{"ba"}, "ba"},
		{"b", []string{"a"}, "ba"}, // two farms
		{"cba", []string{"ba", "ab"}, "bca"},
		{"abcde", []string{"efghi"}, "eabcdfgh"},
	} {
		var others []Keyring
		for _, o := range c.others {
			others = append(others, ring(o))
		}
		if got := Merge(ring(c.latest), others...).letters(); got != c.want {
			t.Errorf("%s with %q: %s, want %s", c.latest, c.others, got, c.want)
		}
	}
}

func TestKeyring_FileKeepsThemFromOthers(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "gossip.keyring")
	if got, err := LoadKeyring(path); err != nil || len(got) != 0 {
		t.Errorf("of no file: %d keys, %v", len(got), err)
	}
	for _, letters := range []string{"a", "ba"} {
		if err := StoreKeyring(path, ring(letters)); err != nil {
			t.Fatal(err)
		}
		got, err := LoadKeyring(path)
		if err != nil || got.letters() != letters {
			t.Errorf("%q, %v; want %q", got.letters(), err, letters)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
	if err := StoreKeyring(path, nil); err == nil {
		t.Error("stored an empty ring")
	}
	for _, bad := range []string{"", "\n", "secret!", "c2hvcnQ=", strings.Repeat("YWFhYWFhYWFhYWFhYWFhYQ==\n", 2), strings.Repeat("\n", maxKeyring+1)} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := LoadKeyring(path)
		if err == nil || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
}

func FuzzParseKeyring(f *testing.F) {
	f.Add([]byte("YWFhYWFhYWFhYWFhYWFhYQ==\n"))
	f.Add([]byte("\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseKeyring(data)
		if err == nil && (len(got) == 0 || got.Validate() != nil) {
			t.Errorf("%q gave %d keys: %v", data, len(got), got.Validate())
		}
	})
}

// Any ring can become any other, whatever is between them.
func TestSetKeyring_EndsWithTheRingWanted(t *testing.T) {
	t.Parallel()
	rings := rapid.Map(rapid.SliceOfNDistinct(rapid.ByteRange('a', 'j'), 1, maxKeys, rapid.ID), func(letters []byte) Keyring { return ring(string(letters)) })
	rapid.Check(t, func(t *rapid.T) {
		live := &memberlist.Keyring{}
		for range 4 {
			wanted := rings.Draw(t, "ring")
			if err := setKeyring(live, wanted); err != nil {
				t.Fatal(err)
			}
			got := Keyring(live.GetKeys())
			if !bytes.Equal(got[0], wanted[0]) || len(got) != len(wanted) {
				t.Fatalf("%q became %q", wanted.letters(), got.letters())
			}
			for _, key := range wanted {
				if !got.Has(key) {
					t.Fatalf("%q lacks a key of %q", got.letters(), wanted.letters())
				}
			}
		}
	})
}

// rotation is coordinators whose operators rotate keys, each in their own time, and
// workers that serve all of them. What the parts do is what packages fleet and worker
// do: a change that only adds is made here first, any other by the workers first,
// each of which may refuse it and so undo it.
type rotation struct {
	coordinators []Keyring
	given        [][]Keyring // by worker, by coordinator
	workers      []Keyring
}

func (r *rotation) check(t *rapid.T, step string) {
	members := append(append([]Keyring{}, r.coordinators...), r.workers...)
	for i, a := range members {
		for j, b := range members {
			if !a.Hears(b) {
				t.Fatalf("%s: member %d with %q does not hear %d with %q", step, i, a.letters(), j, b.letters())
			}
		}
	}
}

func (r *rotation) others(w, c int) []Keyring {
	var out []Keyring
	for i, given := range r.given[w] {
		if i != c {
			out = append(out, given)
		}
	}
	return out
}

// direct gives a worker a ring, and tells whether it took it.
func (r *rotation) direct(t *rapid.T, w, c int, next Keyring) bool {
	if Parts(r.given[w][c], next, r.others(w, c)...) {
		return false
	}
	r.given[w][c] = next
	r.workers[w] = Merge(next, r.others(w, c)...)
	r.check(t, "directing")
	return true
}

func (r *rotation) change(t *rapid.T, c int, next Keyring) {
	before := r.coordinators[c]
	if len(next) > len(before) {
		r.coordinators[c] = next
	}
	order := rapid.Permutation([]int{0, 1, 2}).Draw(t, "order")
	for i, w := range order {
		if r.direct(t, w, c, next) {
			continue
		}
		if len(next) > len(before) {
			t.Fatal("a worker refused a key more")
		}
		for _, undone := range order[:i] {
			if !r.direct(t, undone, c, before) {
				t.Fatal("a worker refused what it had")
			}
		}
		return
	}
	r.coordinators[c] = next
	r.check(t, "changing")
}

func TestKeyring_RotatingLosesNobody(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		r := &rotation{coordinators: []Keyring{ring("a"), ring("a")}}
		for range 3 {
			r.given = append(r.given, []Keyring{ring("a"), ring("a")})
			r.workers = append(r.workers, ring("a"))
		}
		t.Repeat(map[string]func(*rapid.T){
			"install": func(t *rapid.T) {
				c := rapid.IntRange(0, 1).Draw(t, "coordinator")
				if next, err := r.coordinators[c].Install(key(rapid.ByteRange('a', 'd').Draw(t, "key"))); err == nil {
					r.change(t, c, next)
				}
			},
			"use": func(t *rapid.T) {
				c := rapid.IntRange(0, 1).Draw(t, "coordinator")
				if next, err := r.coordinators[c].Use(KeyID(key(rapid.ByteRange('a', 'd').Draw(t, "key")))); err == nil {
					r.change(t, c, next)
				}
			},
			"remove": func(t *rapid.T) {
				c := rapid.IntRange(0, 1).Draw(t, "coordinator")
				if next, err := r.coordinators[c].Remove(KeyID(key(rapid.ByteRange('a', 'd').Draw(t, "key")))); err == nil {
					r.change(t, c, next)
				}
			},
			"return": func(t *rapid.T) { // of a worker that was away
				w := rapid.IntRange(0, 2).Draw(t, "worker")
				for c, ring := range r.coordinators {
					r.given[w][c] = ring
					r.workers[w] = Merge(ring, r.others(w, c)...)
				}
				r.check(t, "returning")
			},
		})
	})
}
