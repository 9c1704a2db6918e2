package contextpack

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Tarball reads a tar archive, plain or compressed by gzip, zstd or bzip2, as docker
// takes it on its standard input: all of it is the context, and Options.Dockerfile
// is a path in it. Owners and extended attributes are dropped, hard links become
// files of their own. The files take up disk space, in the folder for temporary
// files, until the source is closed.
func Tarball(r io.Reader, o Options) (*Source, error) {
	plain, closer, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer closer()
	spool, err := os.CreateTemp("", "archfarm-context-*")
	if err != nil {
		return nil, fmt.Errorf("the context's archive: %w", err)
	}
	defer os.Remove(spool.Name()) //nolint:errcheck // it stays open, and is gone with its last use
	t := &tarball{spool: spool, entries: map[string]entry{}}
	s, err := t.source(tar.NewReader(plain), o)
	if err != nil {
		spool.Close()
		return nil, fmt.Errorf("the context's archive: %w", err)
	}
	s.close = spool.Close
	return s, nil
}

func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 1<<16)
	head, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("the context's archive: %w", err)
	}
	none := func() {}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, fmt.Errorf("the context's archive: %w", err)
		}
		return z, none, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxMemory(1<<30))
		if err != nil {
			return nil, nil, fmt.Errorf("the context's archive: %w", err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return bzip2.NewReader(b), none, nil
	case bytes.HasPrefix(head, []byte("\xfd7zX")):
		return nil, nil, errors.New("the context's archive is compressed by xz: use gzip, zstd or bzip2")
	}
	return b, none, nil
}

// tarball is an archive's files by their names, the last of each name.
type tarball struct {
	spool   *os.File
	written int64
	entries map[string]entry
}

func (t *tarball) source(r *tar.Reader, o Options) (*Source, error) {
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%w: is it a tar archive?", err)
		}
		if err := t.add(h, r); err != nil {
			return nil, fmt.Errorf("%s: %w", h.Name, err)
		}
		if len(t.entries) > MaxEntries {
			return nil, fmt.Errorf("more than %d files", MaxEntries)
		}
	}
	name := cmp.Or(path.Clean(strings.TrimPrefix(o.Dockerfile, "/")), ".")
	if name == "." {
		name = defaultDockerfile
		if lower := strings.ToLower(name); t.entries[name].kind == 0 && t.entries[lower].kind != 0 {
			name = lower
		}
	}
	if t.entries[name].kind == 0 {
		return nil, fmt.Errorf("there is no %s in it", name)
	}
	entries := make([]entry, 0, len(t.entries))
	for _, e := range t.entries {
		entries = append(entries, e)
	}
	return newSource(sorted(entries), name)
}

func (t *tarball) add(h *tar.Header, r io.Reader) error {
	name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
	switch {
	case hasDotDot(h.Name):
		return errors.New("its path leads out of the context")
	case len(name) > maxName:
		return fmt.Errorf("its path has %d bytes, at most %d are possible", len(name), maxName)
	case name == "" || h.Typeflag == tar.TypeXGlobalHeader:
		return nil
	}
	e := entry{name: name, kind: h.Typeflag, mode: h.Mode & 0o7777, mtime: h.ModTime.Unix()}
	switch h.Typeflag {
	case tar.TypeReg:
		c := spooled{t.spool, t.written}
		n, err := io.Copy(t.spool, io.LimitReader(r, MaxBytes-t.written+1))
		if err != nil {
			return err
		}
		if t.written += n; t.written > MaxBytes {
			return fmt.Errorf("the files have more than %d MiB", MaxBytes>>20)
		}
		e.size, e.content = n, c
	case tar.TypeLink:
		target := t.entries[strings.TrimPrefix(path.Clean("/"+h.Linkname), "/")]
		if target.kind != tar.TypeReg {
			return fmt.Errorf("a hard link to %s, which is not a file before it", h.Linkname)
		}
		target.name = name
		e = target
	case tar.TypeSymlink:
		e.link, e.mode = h.Linkname, 0o777
	case tar.TypeDir:
	default:
		return errors.New("neither a file, a folder nor a link: leave it out")
	}
	return t.put(e)
}

// put adds an entry and, where the archive has none, the folders that it is in.
func (t *tarball) put(e entry) error {
	before := t.entries[e.name]
	if (before.kind == tar.TypeDir) != (e.kind == tar.TypeDir) && before.kind != 0 {
		return errors.New("there is a folder and something else of that name")
	}
	t.entries[e.name] = e
	parent := path.Dir(e.name)
	switch p := t.entries[parent]; {
	case parent == "." || p.kind == tar.TypeDir:
		return nil
	case p.kind != 0:
		return fmt.Errorf("%s, in which it is, is not a folder", parent)
	}
	return t.put(entry{name: parent, kind: tar.TypeDir, mode: 0o755, mtime: time.Unix(0, 0).Unix()})
}

func hasDotDot(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

// spooled is a file's content, copied from an archive.
type spooled struct {
	file *os.File
	at   int64
}

func (s spooled) readAt(p []byte, off int64) error {
	if _, err := s.file.ReadAt(p, s.at+off); err != nil {
		return fmt.Errorf("the context's archive: %w", err)
	}
	return nil
}
