package seal_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/seal"
)

func open(t *testing.T, path string) *seal.Key {
	t.Helper()
	k, err := seal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func write(t *testing.T, lines ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secrets.key")
	if err := os.WriteFile(path, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const hexA, hexB = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", "ff0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

func TestOpen_MakesAKeyOnce(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "secrets.key")
	if _, err := seal.Load(path); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("loading what is not there: %v", err)
	}
	first := open(t, path)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the file: %v, %v", info, err)
	}
	box, err := first.Seal([]byte("hunter2"), []byte("a"))
	if err != nil {
		t.Fatal(err)
	}
	again := open(t, path)
	if got, err := again.Unseal(box, []byte("a")); err != nil || string(got) != "hunter2" || again.ID() != first.ID() || len(again.ID()) != 16 {
		t.Errorf("after opening again: %q, %v, %s and %s", got, err, first.ID(), again.ID())
	}
	if other := open(t, filepath.Join(t.TempDir(), "secrets.key")); other.ID() == first.ID() {
		t.Error("two new keys are alike")
	}
}

func TestOpen_RefusesWhatIsNoKey(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		lines []string
		mode  os.FileMode
		says  string
	}{
		"empty":        {nil, 0o600, "has no key"},
		"comments":     {[]string{"# a", ""}, 0o600, "has no key"},
		"short":        {[]string{hexA[:62]}, 0o600, "line 1"},
		"second":       {[]string{hexA, "hunter2"}, 0o600, "line 2"},
		"zeros":        {[]string{strings.Repeat("0", 64)}, 0o600, "repeated"},
		"for everyone": {[]string{hexA}, 0o604, "chmod 600"},
		"large":        {[]string{strings.Repeat("#\n", 40<<10)}, 0o600, "larger"},
	} {
		path := write(t, c.lines...)
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		_, err := seal.Open(path)
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v, want it to say %q and the path", name, err, c.says)
		}
	}
}

func TestKey_Rotation(t *testing.T) {
	t.Parallel()
	old := open(t, write(t, hexA))
	box, err := old.Seal([]byte("x"), nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := hex.DecodeString(hexB)
	if err != nil {
		t.Fatal(err)
	}
	both := open(t, write(t, "# new", base64.StdEncoding.EncodeToString(raw), hexA))
	only := open(t, write(t, hexB))
	if both.ID() != only.ID() || !both.Has(old.ID()) || only.Has(old.ID()) || both.ID() == old.ID() {
		t.Errorf("ids: old %s, both %s, only %s", old.ID(), both.ID(), only.ID())
	}
	if got, err := both.Unseal(box, nil); err != nil || string(got) != "x" {
		t.Errorf("by the old key: %q, %v", got, err)
	}
	if _, err := only.Unseal(box, nil); !errors.Is(err, seal.ErrOtherKey) || !strings.Contains(err.Error(), only.Path()) || !strings.Contains(err.Error(), old.ID()) {
		t.Errorf("without the old key: %v", err)
	}
	if box, err = both.Seal([]byte("y"), nil); err != nil {
		t.Fatal(err)
	}
	if got, err := only.Unseal(box, nil); err != nil || string(got) != "y" {
		t.Errorf("the first key does not seal: %q, %v", got, err)
	}
}

func TestKey_DoesNotShow(t *testing.T) {
	t.Parallel()
	k := open(t, write(t, hexA))
	raw, err := hex.DecodeString(hexA)
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		shown := fmt.Sprintf(verb, k)
		for _, form := range []string{hexA, string(raw), "1, 2, 3", "1 2 3", "0x1, 0x2"} {
			if strings.Contains(shown, form) {
				t.Errorf("%s: %s", verb, shown)
			}
		}
	}
}

func TestUnseal_PropertyOnlyWhatWasSealedForThePlace(t *testing.T) {
	t.Parallel()
	k := open(t, write(t, hexA))
	rapid.Check(t, func(t *rapid.T) {
		plain, place := rapid.SliceOf(rapid.Byte()).Draw(t, "plain"), rapid.SliceOf(rapid.Byte()).Draw(t, "place")
		box, err := k.Seal(plain, place)
		if err != nil || len(box) != len(plain)+seal.Overhead {
			t.Fatalf("%d bytes of %d, %v", len(box), len(plain), err)
		}
		if got, err := k.Unseal(box, place); err != nil || !bytes.Equal(got, plain) {
			t.Fatalf("%q, %v", got, err)
		}
		if again, err := k.Seal(plain, place); err != nil || bytes.Equal(again, box) {
			t.Fatalf("sealing twice gives the same, %v", err)
		}
		other := rapid.SliceOf(rapid.Byte()).Filter(func(b []byte) bool { return !bytes.Equal(b, place) }).Draw(t, "other place")
		if _, err := k.Unseal(box, other); !errors.Is(err, seal.ErrAltered) {
			t.Fatalf("at another place: %v", err)
		}
		i, bit := rapid.IntRange(0, len(box)-1).Draw(t, "byte"), rapid.IntRange(0, 7).Draw(t, "bit")
		box[i] ^= 1 << bit
		if got, err := k.Unseal(box, place); !errors.Is(err, seal.ErrAltered) && !errors.Is(err, seal.ErrOtherKey) {
			t.Fatalf("altered at %d: %q, %v", i, got, err)
		}
		if got, err := k.Unseal(box[:i], place); err == nil {
			t.Fatalf("cut: %q", got)
		}
	})
}

func TestContext_PartsDoNotRunTogether(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, parts := range [][]string{{}, {""}, {"", ""}, {"ab"}, {"a", "b"}, {"a1:b"}, {"", "ab"}} {
		c := string(seal.Context(parts...))
		if seen[c] {
			t.Errorf("%q has another's context", parts)
		}
		seen[c] = true
	}
}

func FuzzUnseal(f *testing.F) {
	path := filepath.Join(f.TempDir(), "secrets.key")
	k, err := seal.Open(path)
	if err != nil {
		f.Fatal(err)
	}
	box, err := k.Seal([]byte("a"), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(box[:seal.Overhead])
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, raw []byte) {
		if got, err := k.Unseal(raw, nil); err == nil {
			t.Errorf("forged: %q", got)
		}
	})
}

func TestReseal_ByTheFirstKey(t *testing.T) {
	t.Parallel()
	context := []byte("a")
	old := open(t, write(t, hexA))
	box, err := old.Seal([]byte("hunter2"), context)
	if err != nil {
		t.Fatal(err)
	}
	if same, err := old.Reseal(box, context); err != nil || !bytes.Equal(same, box) {
		t.Errorf("of the first key already: %x, %v", same, err)
	}
	anew, err := open(t, write(t, hexB, hexA)).Reseal(box, context)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := open(t, write(t, hexB)).Unseal(anew, context); err != nil || string(got) != "hunter2" {
		t.Errorf("with the new key alone: %q, %v", got, err)
	}
	if _, err := open(t, write(t, hexB)).Reseal(box, context); !errors.Is(err, seal.ErrOtherKey) {
		t.Errorf("without the old key: %v", err)
	}
	if _, err := open(t, write(t, hexB, hexA)).Reseal(box, []byte("b")); !errors.Is(err, seal.ErrAltered) {
		t.Errorf("of another place: %v", err)
	}
}
