package contextpack

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tarOf writes an archive as it is told, however wrong.
func tarOf(t fatal, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		data := h.Uname // what is in the file
		h.Uname, h.Size = "", int64(len(data))
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%v", err)
		}
		if _, err := w.Write([]byte(data)); err != nil {
			t.Fatalf("%v", err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatalf("%v", err)
	}
	return b.Bytes()
}

func hostile(t fatal) map[string][]byte {
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Uname: "evil"} }
	link := func(name, to string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	dir := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name} }
	return map[string][]byte{
		"absolute":              tarOf(t, file("/no/such/evil")),
		"parent":                tarOf(t, file("../evil")),
		"parent in between":     tarOf(t, dir("a/"), file("a/../../evil")),
		"the root":              tarOf(t, dir("./")),
		"through a link":        tarOf(t, link("a", ".."), file("a/evil")),
		"through an inner link": tarOf(t, dir("d/"), link("a", "d"), file("a/evil")),
		"onto a link":           tarOf(t, link("a", "../evil"), file("a")),
		"folder onto a link":    tarOf(t, link("a", ".."), dir("a/"), file("a/evil")),
		"link over a folder":    tarOf(t, dir("a/"), link("a", ".."), file("a/evil")),
		"twice":                 tarOf(t, file("a"), file("a")),
		"hard link":             tarOf(t, tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "/no/such/file"}),
		"device":                tarOf(t, tar.Header{Typeflag: tar.TypeChar, Name: "a", Devmajor: 1, Devminor: 3}),
		"pipe":                  tarOf(t, tar.Header{Typeflag: tar.TypeFifo, Name: "a"}),
		"no folder":             tarOf(t, file("a/b")),
		"a file as folder":      tarOf(t, file("a"), file("a/b")),
		"empty element":         tarOf(t, dir("a/"), file("a//b")),
		"late times":            tarOf(t, file("a"), tar.Header{Typeflag: timesKind, Name: timesName}),
		"bad times":             tarOf(t, tar.Header{Typeflag: timesKind, Name: timesName, Uname: "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"}, file("a")),
		"too few times":         tarOf(t, tar.Header{Typeflag: timesKind, Name: timesName, Uname: "\x02"}, file("a"), file("b")),
		"too many times":        tarOf(t, tar.Header{Typeflag: timesKind, Name: timesName, Uname: "\x02\x02"}, file("a")),
		"many times":            tarOf(t, tar.Header{Typeflag: timesKind, Name: timesName, Uname: strings.Repeat("\x02", 1000)}),
		"long":                  tarOf(t, file(strings.Repeat("a", maxName+1))),
		"too many":              tarOf(t, file("1"), file("2"), file("3"), file("4"), file("5"), file("6"), file("7"), file("8"), file("9"), file("10"), file("11")),
		"too big":               tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "a", Uname: strings.Repeat("x", 10_000)}),
		"cut off":               tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "a", Uname: strings.Repeat("x", 1000)})[:900],
		"no archive":            []byte(strings.Repeat("nonsense", 1000)),
	}
}

var tight = Limits{Entries: 10, Bytes: 5000}

// inABox unpacks into a folder with files around it, and tells what became of those.
func inABox(t fatal, archive []byte) (out string, err error) {
	t.Helper()
	box := tempDir(t)
	write(t, box, map[string]string{"in/": "", "evil": "harmless", "beside/x": "x"})
	before := snapshot(t, box, true)
	out = filepath.Join(box, "in")
	_, err = Unpack(ctx, bytes.NewReader(archive), out, tight)
	after := snapshot(t, box, true)
	for name := range after {
		if strings.HasPrefix(name, "in/") || name == "in" {
			delete(after, name)
		}
	}
	delete(before, "in")
	if fmt.Sprint(after) != fmt.Sprint(before) {
		t.Fatalf("outside of the folder is %v, was %v", after, before)
	}
	return box, err
}

func TestUnpack_RefusesWhatIsHostile(t *testing.T) {
	t.Parallel()
	for name, archive := range hostile(t) {
		box, err := inABox(t, archive)
		if err == nil {
			t.Errorf("%s: unpacked %v", name, snapshot(t, filepath.Join(box, "in"), false))
		} else {
			t.Logf("%s: %v", name, err)
		}
		removeAll(box)
	}
}

func TestUnpack_KeepsModesLinksAndTimes(t *testing.T) {
	t.Parallel()
	at := time.Unix(1e9, 0)
	out := t.TempDir()
	_, err := Unpack(ctx, bytes.NewReader(tarOf(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o555, ModTime: at},
		tar.Header{Typeflag: tar.TypeReg, Name: "d/su", Mode: 0o4711, ModTime: at, Uname: "x"},
		tar.Header{Typeflag: tar.TypeReg, Name: "d/unreadable", Mode: 0o001, ModTime: at},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "out", Linkname: "/no/such/file", ModTime: at},
	)), out, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	when := " " + at.UTC().String()
	wantEqual(t, "unpacked", snapshot(t, out, true), map[string]string{
		"d":            "dr-xr-xr-x" + when,
		"d/su":         fmt.Sprintf("urwx--x--x 1 %x", hash("x")) + when,
		"d/unreadable": fmt.Sprintf("-r-------x 0 %x", hash("")) + when,
		"out":          "-> /no/such/file" + when,
	})
	_ = os.Chmod(filepath.Join(out, "d"), 0o700) // for its removal
}

func FuzzUnpack(f *testing.F) {
	for _, archive := range hostile(f) {
		f.Add(archive)
	}
	dir := f.TempDir()
	write(f, dir, map[string]string{"Dockerfile": "FROM scratch", "a/b": "x", "a/l": "-> b"})
	f.Add(archive(f, folder(f, dir, Options{})))
	f.Fuzz(func(t *testing.T, archive []byte) {
		box, err := inABox(t, archive)
		defer removeAll(box)
		size, n := 0, 0
		_ = filepath.WalkDir(filepath.Join(box, "in"), func(p string, d os.DirEntry, err error) error {
			if err != nil {
				t.Fatal(err)
			}
			info, err := d.Info()
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case info.Mode().IsRegular():
				size += int(info.Size())
			case !info.IsDir() && info.Mode()&os.ModeSymlink == 0:
				t.Errorf("%s is a %s", p, info.Mode())
			}
			n++
			return nil
		})
		if size > int(tight.Bytes) || n-1 > tight.Entries {
			t.Errorf("%d bytes in %d files (%v)", size, n-1, err)
		}
	})
}

// removeAll removes read-only folders too, following no link.
func removeAll(dir string) {
	if root, err := os.OpenRoot(dir); err == nil {
		defer root.Close() //nolint:errcheck // nothing was written by it
		_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, _ error) error {
			if rel, err := filepath.Rel(dir, p); err == nil && d != nil && d.IsDir() {
				_ = root.Chmod(rel, 0o700)
			}
			return nil
		})
	}
	_ = os.RemoveAll(dir)
}
