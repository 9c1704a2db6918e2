package contextpack

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// bytesOf are n bytes that depend on a seed.
func bytesOf(seed uint64, n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)}).Read(b)
	return string(b)
}

func TestFolder_UnpacksToWhatItWas(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		dir, out := tempDir(t), tempDir(t)
		defer removeAll(dir)
		defer removeAll(out)
		write(t, dir, map[string]string{"Dockerfile": ""})
		root, err := os.OpenRoot(dir) // so that no link leads a write anywhere else
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close() //nolint:errcheck // nothing was written by it
		name := rapid.SampledFrom([]string{"a", "b", "é", "a b", "..c", "d\xff", "-", strings.Repeat("n", 120)})
		for range rapid.IntRange(0, 12).Draw(t, "files") {
			p := strings.Join(rapid.SliceOfN(name, 1, 4).Draw(t, "path"), "/")
			if root.MkdirAll(filepath.Dir(p), 0o755) != nil {
				continue // something else is where a folder would have to be
			}
			at := time.Unix(rapid.Int64Range(0, 4e9).Draw(t, "time"), 123)
			bits := rapid.SampledFrom([]os.FileMode{0, 0, os.ModeSetuid, os.ModeSetgid, os.ModeSticky}).Draw(t, "bits")
			switch rapid.IntRange(0, 4).Draw(t, "kind") {
			case 0:
				_ = root.Symlink(rapid.SampledFrom([]string{"a", "../../..", "/no/such/file", "nowhere", strings.Repeat("l", 200)}).Draw(t, "target"), p)
			case 1:
				create(root, p, true, "", rapid.SampledFrom([]os.FileMode{0o755, 0o700, 0o555}).Draw(t, "mode")|bits, at)
			default:
				size := rapid.SampledFrom([]int{0, 0, 1, 1, 511, 512, 513, 513, 1000, 3000, 100_000, pieceSize, 2*pieceSize + 700}).Draw(t, "size")
				create(root, p, false, bytesOf(rapid.Uint64().Draw(t, "seed"), size), rapid.SampledFrom([]os.FileMode{0o755, 0o644, 0o444, 0o700}).Draw(t, "mode")|bits, at)
			}
		}
		s := folder(t, dir, Options{})
		done, err := Unpack(ctx, bytes.NewReader(archive(t, s)), out, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		got, want := snapshot(t, out, true), snapshot(t, dir, true)
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("unpacked\n%v\nwant\n%v", got, want)
		}
		if done.Entries != len(want) || s.Entries() != len(want) {
			t.Fatalf("%d of %d entries, want %d", done.Entries, s.Entries(), len(want))
		}
		if again := folder(t, out, Options{}); !bytes.Equal(archive(t, again), archive(t, s)) {
			t.Fatal("the unpacked folder makes another archive")
		}
	})
}

func tempDir(t fatal) string {
	dir, err := os.MkdirTemp("", "contextpack-*")
	if err != nil {
		t.Fatalf("%v", err)
	}
	return dir
}

// project is a folder of n small files and two big ones.
func project(t fatal, n int) string {
	dir := tempDir(t)
	files := map[string]string{"Dockerfile": "FROM scratch", "big/one": bytesOf(1, 5<<20)}
	for i := range n {
		files[fmt.Sprintf("src/%d/file%d.go", i%37, i)] = bytesOf(uint64(i+10), 1000+i*7919%40_000)
	}
	write(t, dir, files)
	return dir
}

func TestFolder_OneChangeIsFewNewChunks(t *testing.T) {
	t.Parallel()
	const files = 300
	dir := project(t, files)
	defer removeAll(dir)
	before := digests(t, folder(t, dir, Options{}))
	if len(before) < 8 {
		t.Fatalf("only %d chunks: nothing can be seen of sharing", len(before))
	}
	rapid.Check(t, func(t *rapid.T) {
		i := rapid.IntRange(0, files-1).Draw(t, "file")
		p := filepath.Join(dir, fmt.Sprintf("src/%d/file%d.go", i%37, i))
		old, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		allowed := 3 // the times, the chunk, and one more when that is cut elsewhere
		switch rapid.SampledFrom([]string{"edit", "grow", "remove", "add", "touch"}).Draw(t, "change") {
		case "edit":
			err = os.WriteFile(p, append([]byte("x"), old[1:]...), 0o644)
		case "grow":
			err = os.WriteFile(p, append(old, bytesOf(7, rapid.IntRange(1, 100_000).Draw(t, "by"))...), 0o644)
		case "remove":
			err = os.Remove(p)
		case "add":
			added := filepath.Join(filepath.Dir(p), rapid.StringMatching(`[a-z]{1,8}`).Draw(t, "name"))
			err = os.WriteFile(added, []byte(bytesOf(8, 30_000)), 0o644)
			defer removeAll(added)
		case "touch":
			at := time.Unix(1e9, 0)
			err = os.Chtimes(p, at, at)
			allowed = 1
		}
		if err != nil {
			t.Fatal(err)
		}
		fresh := 0
		for d := range digests(t, folder(t, dir, Options{})) {
			if _, ok := before[d]; !ok {
				fresh++
			}
		}
		if err := os.WriteFile(p, old, 0o644); err != nil {
			t.Fatal(err)
		}
		if fresh > allowed {
			t.Errorf("%d of %d chunks are new", fresh, len(before))
		}
	})
}

func TestFolder_AFreshCheckoutIsOneNewChunk(t *testing.T) {
	t.Parallel()
	dir := project(t, 300)
	defer removeAll(dir)
	before := digests(t, folder(t, dir, Options{}))
	other := project(t, 300)
	defer removeAll(other)
	later := time.Now().Add(time.Hour)
	for name := range snapshot(t, other, false) {
		if err := os.Chtimes(filepath.Join(other, name), later, later); err != nil {
			t.Fatal(err)
		}
	}
	var size int64
	fresh := 0
	for d, n := range digests(t, folder(t, other, Options{})) {
		if _, ok := before[d]; !ok {
			fresh++
			size += n
		}
	}
	if fresh != 1 || size > 4096 {
		t.Errorf("%d new chunks of %d bytes, want one small one with the times", fresh, size)
	}
}

func TestLayout_CutsEverythingOnceAndInBounds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		parts := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) part {
			size := rapid.OneOf(rapid.Int64Range(0, 5000), rapid.Int64Range(0, 3<<20), rapid.Int64Range(0, 50<<20)).Draw(t, "size")
			return part{rapid.String().Draw(t, "name"), rapid.Int64Range(1, 20).Draw(t, "header") * block, size}
		}), 1, 50).Draw(t, "parts")
		var at []segment
		for _, c := range layout(parts) {
			if n := c.size(); n < 1 || n > MaxChunk {
				t.Fatalf("a chunk of %d bytes", n)
			}
			at = append(at, c...)
		}
		i, off := 0, int64(0)
		for _, s := range at[:len(at)-1] {
			if s.part != i || s.from != off || s.from != 0 && s.from < parts[i].header {
				t.Fatalf("%+v: want part %d from %d, never within a header", s, i, off)
			}
			if off = s.to; off == parts[i].header+padded(parts[i].size) {
				i, off = i+1, 0
			}
		}
		if i != len(parts) || at[len(at)-1] != (segment{end, 0, trailer}) {
			t.Fatalf("%d of %d parts, then %+v", i, len(parts), at[len(at)-1])
		}
	})
}

func TestSource_TellsWhichFileChanged(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(p string) error{
		"rewritten": func(p string) error { return os.WriteFile(p, []byte("changed"), 0o644) },
		"removed":   os.Remove,
		"a link":    func(p string) error { return errors.Join(os.Remove(p), os.Symlink("/no/such/file", p)) },
		"a pipe":    func(p string) error { return errors.Join(os.Remove(p), syscall.Mkfifo(p, 0o644)) },
		"chmod":     func(p string) error { return os.Chmod(p, 0o600) },
		"same size and time": func(p string) error {
			info, err := os.Stat(p)
			return errors.Join(err, os.WriteFile(p, []byte("DATA"), 0o644), os.Chtimes(p, info.ModTime(), info.ModTime()))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			write(t, dir, map[string]string{"Dockerfile": "", "sub/file": "data"})
			s := folder(t, dir, Options{})
			m, err := s.Manifest(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := change(filepath.Join(dir, "sub/file")); err != nil {
				t.Fatal(err)
			}
			for i := range m.GetChunks() {
				if _, err = s.chunk(nil, i); err != nil {
					break
				}
			}
			var changed *ChangedError
			if !errors.As(err, &changed) || !strings.Contains(changed.Name, "sub/file") {
				t.Errorf("%v, want that sub/file changed", err)
			}
		})
	}
}

func TestFolder_SpecialFiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"Dockerfile": "", "data": "hard"})
	socket, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	if err := os.Link(filepath.Join(dir, "data"), filepath.Join(dir, "hard")); err != nil {
		t.Fatal(err)
	}
	s := folder(t, dir, Options{})
	if want := []string{"Dockerfile", "data", "hard"}; !slices.Equal(names(s), want) {
		t.Errorf("sent %q, want %q", names(s), want)
	}
	out := t.TempDir()
	if _, err := Unpack(ctx, bytes.NewReader(archive(t, s)), out, Limits{}); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(out, "hard")); string(b) != "hard" {
		t.Errorf("the hard link is %q, %v", b, err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Folder(dir, Options{}); err == nil || !strings.Contains(err.Error(), "pipe is a named pipe") {
		t.Errorf("%v, want that pipe is refused", err)
	}
	write(t, dir, map[string]string{".dockerignore": "pipe"})
	folder(t, dir, Options{})
}

func TestManifest_EncodesOneWay(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"Dockerfile": ""})
	m, err := folder(t, dir, Options{}).Manifest(ctx)
	if err != nil {
		t.Fatal(err)
	}
	text := string(Encode(m))
	back, err := Decode([]byte(text))
	if err != nil || Digest(back) != Digest(m) {
		t.Fatalf("%v, %v", back, err)
	}
	for _, bad := range []string{"", "x" + text, text + "\n", strings.TrimSuffix(text, "\n"), strings.Replace(text, " ", " +", 3), text + "sha256:0 01\n"} {
		if m, err := Decode([]byte(bad)); err == nil {
			t.Errorf("%q is %v", bad, m)
		}
	}
	m.Chunks[0].Size = MaxChunk + 1
	if _, err := Check(m, MaxBytes); err == nil {
		t.Error("too big a chunk is allowed")
	}
	m.Chunks[0].Size = 100
	if _, err := Check(m, 99); err == nil {
		t.Error("too big a context is allowed")
	}
	m.Chunks[0].Digest = "sha256:ABC"
	if _, err := Check(m, MaxBytes); err == nil {
		t.Error("a bad digest is allowed")
	}
}
