// Package contextpack turns a build context, a folder or a tar archive, into chunks
// that are named by their digests, sends those that the farm has not got, and
// unpacks them there.
//
// A context is a tar archive, uncompressed, whose bytes follow from the files
// alone: entries sorted, owner root, no extended attributes, no hard links. It is
// cut where its files end, and big files at fixed offsets, so that a file that has
// changed changes the chunk that it is in and no other.
//
// Modification times, in seconds, are one entry of their own, the first, and the
// same in all headers: a fresh checkout of files that the farm has got is one small
// new chunk, and an image still gets the times that its files had.
package contextpack

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Bounds of a context, the same for who sends and who receives it.
const (
	// MaxChunk is how big a chunk may be, in bytes.
	MaxChunk = 8 << 20
	// MaxEntries is how many files, folders and links a context may have.
	MaxEntries = 1_000_000
	// MaxBytes is how big the archive may be where nothing else is said.
	MaxBytes = 8 << 30

	maxName = 4096
)

// Options say what of a context is special.
type Options struct {
	// Dockerfile is where it is: for a folder as docker's -f takes it, relative to the
	// working directory; for an archive within it. Empty: "Dockerfile" of the context.
	Dockerfile string
}

// Source is a context that can be sent: what it consists of has been listed, and
// contents are read when they are needed. It is not for concurrent use.
type Source struct {
	entries    []entry
	chunks     []chunk
	dockerfile string
	size       int64
	manifest   *archfarmv1.ContextManifest
	close      func() error
}

// entry is a file, folder or link of a context.
type entry struct {
	name    string // slash-separated, without "." and ".."
	kind    byte   // of package tar
	mode    int64  // permissions, and the setuid, setgid and sticky bits
	link    string // target of a symbolic link
	size    int64
	mtime   int64 // seconds since 1970
	content content
}

// content is what a file contains.
type content interface {
	// readAt fills p from an offset, which is within the file; *ChangedError when
	// the file is not what it was.
	readAt(p []byte, off int64) error
}

// ChangedError tells that a file changed while its context was being sent.
type ChangedError struct {
	// Name within the context, or several, where it cannot be told which one.
	Name string
}

func (e *ChangedError) Error() string {
	return e.Name + " changed while the context was being read: try again when nothing writes to it"
}

func newSource(entries []entry, dockerfile string) (*Source, error) {
	if len(entries) > MaxEntries {
		return nil, fmt.Errorf("the context has %d files: at most %d are possible; leave some out by .dockerignore", len(entries), MaxEntries)
	}
	s := &Source{entries: append([]entry{timesOf(entries)}, entries...), dockerfile: dockerfile}
	parts := make([]part, len(s.entries))
	for i, e := range s.entries {
		header, err := e.header()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
		parts[i] = part{name: e.name, header: int64(len(header)), size: e.size}
	}
	s.chunks = layout(parts)
	for _, c := range s.chunks {
		s.size += c.size()
	}
	return s, nil
}

// Dockerfile is the path of the Dockerfile within the context, for JobSpec.dockerfile.
func (s *Source) Dockerfile() string { return s.dockerfile }

// Size of the archive, in bytes.
func (s *Source) Size() int64 { return s.size }

// Entries is the number of files, folders and links.
func (s *Source) Entries() int { return len(s.entries) - 1 }

// Close frees what the source takes on the disk.
func (s *Source) Close() error {
	if s.close == nil {
		return nil
	}
	return s.close()
}

// Manifest reads the whole context, the first time, and returns its chunks' digests.
func (s *Source) Manifest(ctx context.Context) (*archfarmv1.ContextManifest, error) {
	if s.manifest != nil {
		return s.manifest, nil
	}
	m := &archfarmv1.ContextManifest{}
	var buf []byte
	for i := range s.chunks {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		var err error
		if buf, err = s.read(buf[:0], i); err != nil {
			return nil, err
		}
		m.Chunks = append(m.Chunks, &archfarmv1.ContextChunk{Digest: digest.FromBytes(buf).String(), Size: int64(len(buf))})
	}
	s.manifest = m
	return m, nil
}

// chunk reads a chunk of the manifest again, into buf.
func (s *Source) chunk(buf []byte, i int) ([]byte, error) {
	buf, err := s.read(buf[:0], i)
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(buf).String() == s.manifest.GetChunks()[i].GetDigest() {
		return buf, nil
	}
	var names []string
	for _, seg := range s.chunks[i] {
		if seg.part != end && s.entries[seg.part].kind == tar.TypeReg {
			names = append(names, s.entries[seg.part].name)
		}
	}
	if len(names) > 3 {
		names = append(names[:3], fmt.Sprintf("%d other files", len(names)-3))
	}
	if len(names) == 1 {
		return nil, &ChangedError{Name: names[0]}
	}
	return nil, &ChangedError{Name: "one of " + strings.Join(names, ", ")}
}

// read appends a chunk's bytes.
func (s *Source) read(buf []byte, i int) ([]byte, error) {
	for _, seg := range s.chunks[i] {
		if seg.part == end {
			buf = append(buf, make([]byte, seg.to-seg.from)...)
			continue
		}
		e := s.entries[seg.part]
		header, err := e.header()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", e.name, err)
		}
		n, from, to := int64(len(header)), seg.from, seg.to
		if from < n {
			buf = append(buf, header[from:]...) // never cut within
			from = n
		}
		if until := min(to, n+e.size); until > from {
			at := len(buf)
			buf = append(buf, make([]byte, until-from)...)
			if err := e.content.readAt(buf[at:], from-n); err != nil {
				return nil, err
			}
			from = until
		}
		buf = append(buf, make([]byte, max(to-from, 0))...)
	}
	return buf, nil
}

// header is the entry's in the archive. Names too long for a header of 512 bytes
// are in a PAX header before it.
func (e entry) header() ([]byte, error) {
	h := &tar.Header{Typeflag: e.kind, Name: e.name, Linkname: e.link, Mode: e.mode, Size: e.size, ModTime: time.Unix(0, 0)}
	if e.kind == tar.TypeDir {
		h.Name += "/"
	}
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(h); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// inMemory is a content that contextpack made itself.
type inMemory []byte

func (b inMemory) readAt(p []byte, off int64) error {
	copy(p, b[off:])
	return nil
}

// hash of a name, uniform and the same everywhere.
func hash(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	var h uint64
	for _, b := range sum[:8] {
		h = h<<8 | uint64(b)
	}
	return h
}
