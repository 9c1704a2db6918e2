package contextpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/zstd"
)

func TestTarball_IsTheSameContextAsItsFolder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"Dockerfile": "FROM scratch", "b/a": bytesOf(1, 3<<20), "b/c/d": "d", "b-": "x", "l": "-> b/a", "empty/": ""})
	want := archive(t, folder(t, dir, Options{}))
	for name, args := range map[string][]string{"plain": nil, "gzip": {"-z"}, "bzip2": {"-j"}, "zstd": nil} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, err := exec.Command("tar", append(args, "-c", "-C", dir, ".")...).Output()
			if err != nil {
				t.Skipf("tar %s: %v", args, err)
			}
			if name == "zstd" {
				w, err := zstd.NewWriter(nil)
				if err != nil {
					t.Fatal(err)
				}
				b = w.EncodeAll(b, nil)
			}
			s, err := Tarball(bytes.NewReader(b), Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close() //nolint:errcheck // nothing was written by it
			if !bytes.Equal(archive(t, s), want) {
				t.Errorf("%q, want %q, or their contents differ", names(s), names(folder(t, dir, Options{})))
			}
		})
	}
}

func TestTarball_ReadsOddArchives(t *testing.T) {
	t.Parallel()
	s, err := Tarball(bytes.NewReader(tarOf(t,
		tar.Header{Typeflag: tar.TypeReg, Name: "./deep/er/file", Uname: "first"},
		tar.Header{Typeflag: tar.TypeReg, Name: "/deep/er/file", Uname: "second", Uid: 1000},
		tar.Header{Typeflag: tar.TypeLink, Name: "hard", Linkname: "./deep/er/file"},
		tar.Header{Typeflag: tar.TypeDir, Name: "deep/", Mode: 0o700},
		tar.Header{Typeflag: tar.TypeReg, Name: "sub/dockerfile.prod", Uname: "FROM x"},
	)), Options{Dockerfile: "/sub/dockerfile.prod"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close() //nolint:errcheck // nothing was written by it
	out := t.TempDir()
	if _, err := Unpack(ctx, bytes.NewReader(archive(t, s)), out, Limits{}); err != nil {
		t.Fatal(err)
	}
	second := "-rwxr-xr-x 6 " + hex("second")
	wantEqual(t, "unpacked", snapshot(t, out, false), map[string]string{
		"deep": "drwx------", "deep/er": "drwxr-xr-x", "deep/er/file": second, "hard": second,
		"sub": "drwxr-xr-x", "sub/dockerfile.prod": "-rwxr-xr-x 6 " + hex("FROM x"),
	})
	if s.Dockerfile() != "sub/dockerfile.prod" {
		t.Errorf("the Dockerfile is %s", s.Dockerfile())
	}
}

func TestTarball_Refuses(t *testing.T) {
	t.Parallel()
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Uname: "x"} }
	dockerfile := file("Dockerfile")
	var cut bytes.Buffer
	z := gzip.NewWriter(&cut)
	_, _ = z.Write(tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "Dockerfile", Uname: bytesOf(1, 10_000)}))
	_ = z.Close()
	for name, c := range map[string]struct {
		r    io.Reader
		want string
	}{
		"no archive":       {strings.NewReader(strings.Repeat("hello", 1000)), "is it a tar archive?"},
		"nothing":          {strings.NewReader(""), "there is no Dockerfile"},
		"xz":               {strings.NewReader("\xfd7zXZ\x00"), "use gzip, zstd or bzip2"},
		"no Dockerfile":    {bytes.NewReader(tarOf(t, file("a"))), "there is no Dockerfile"},
		"parent":           {bytes.NewReader(tarOf(t, dockerfile, file("a/../../b"))), "leads out of the context"},
		"device":           {bytes.NewReader(tarOf(t, dockerfile, tar.Header{Typeflag: tar.TypeBlock, Name: "dev"})), "dev: neither a file"},
		"under a file":     {bytes.NewReader(tarOf(t, dockerfile, file("Dockerfile/x"))), "is not a folder"},
		"under a link":     {bytes.NewReader(tarOf(t, dockerfile, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "/"}, file("l/x"))), "l, in which it is, is not a folder"},
		"folder over file": {bytes.NewReader(tarOf(t, dockerfile, tar.Header{Typeflag: tar.TypeDir, Name: "Dockerfile/"})), "a folder and something else"},
		"dangling":         {bytes.NewReader(tarOf(t, dockerfile, tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "x"})), "not a file before it"},
		"cut":              {bytes.NewReader(cut.Bytes()[:5000]), "unexpected EOF"},
		"broken":           {iotest.ErrReader(errors.New("broken pipe")), "broken pipe"},
	} {
		if s, err := Tarball(c.r, Options{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v, want %q", name, s, err, c.want)
		}
	}
}
