package contextpack

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// fatal is what testing.T and rapid.T have in common.
type fatal interface {
	Helper()
	Fatalf(format string, args ...any)
}

// write makes files, by their paths: "a/" is a folder, "-> b" a link's content. It
// cannot write outside of the folder, whatever links there are.
func write(t fatal, dir string, files map[string]string) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer root.Close() //nolint:errcheck // nothing was written by it
	for _, name := range slices.Sorted(maps.Keys(files)) {
		err := root.MkdirAll(filepath.Dir(name), 0o755)
		switch target, isLink := strings.CutPrefix(files[name], "-> "); {
		case err != nil:
		case strings.HasSuffix(name, "/"):
			err = root.MkdirAll(strings.TrimSuffix(name, "/"), 0o755)
		case isLink:
			err = root.Symlink(target, name)
		default:
			err = root.WriteFile(name, []byte(files[name]), 0o644)
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// create makes a new file or folder with a mode and a time; false when there is
// something already, or a link leads away.
func create(root *os.Root, name string, isDir bool, data string, mode fs.FileMode, at time.Time) bool {
	if isDir {
		if root.Mkdir(name, 0o755) != nil {
			return false
		}
	} else {
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return false
		}
		_, err = f.WriteString(data)
		if f.Close(); err != nil {
			return false
		}
	}
	return root.Chmod(name, mode) == nil && root.Chtimes(name, at, at) == nil
}

// snapshot describes all that is in a folder, with or without times.
func snapshot(t fatal, dir string, times bool) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text := info.Mode().String()
		if info.Mode()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			text = "-> " + target
		}
		if info.Mode().IsRegular() {
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %x", len(b), hash(string(b)))
		}
		if times {
			text += " " + info.ModTime().Truncate(time.Second).UTC().String()
		}
		all[strings.TrimPrefix(p, dir+"/")] = text
		return nil
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	return all
}

// archive is a source's bytes, read chunk by chunk as an upload reads them.
func archive(t fatal, s *Source) []byte {
	t.Helper()
	m, err := s.Manifest(ctx)
	if err != nil {
		t.Fatalf("%v", err)
	}
	if _, err := Check(m, MaxBytes); err != nil {
		t.Fatalf("%v", err)
	}
	var all bytes.Buffer
	for i, c := range m.GetChunks() {
		b, err := s.chunk(nil, i)
		if err != nil {
			t.Fatalf("%v", err)
		}
		if int64(len(b)) != c.GetSize() {
			t.Fatalf("chunk %d has %d bytes, its manifest says %d", i, len(b), c.GetSize())
		}
		all.Write(b)
	}
	if int64(all.Len()) != s.Size() {
		t.Fatalf("%d bytes, the source says %d", all.Len(), s.Size())
	}
	return all.Bytes()
}

func folder(t fatal, dir string, o Options) *Source {
	t.Helper()
	s, err := Folder(dir, o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

func digests(t fatal, s *Source) map[string]int64 {
	t.Helper()
	m, err := s.Manifest(ctx)
	if err != nil {
		t.Fatalf("%v", err)
	}
	all := map[string]int64{}
	for _, c := range m.GetChunks() {
		all[c.GetDigest()] = c.GetSize()
	}
	return all
}

func names(s *Source) []string {
	var all []string
	for _, e := range s.entries[1:] {
		all = append(all, e.name)
	}
	return all
}

func wantEqual(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for k, w := range want {
		if got[k] != w {
			t.Errorf("%s: %s is %q, want %q", what, k, got[k], w)
		}
	}
	for k, g := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %s (%q) is not wanted", what, k, g)
		}
	}
}

func hex(content string) string { return fmt.Sprintf("%x", hash(content)) }
