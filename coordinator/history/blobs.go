package history

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/store"
)

// blobs are what records name, by digest: in the store, and for a moment, until the
// record is there too, in memory or in a file.
type blobs struct {
	db  store.History
	dir string // for those files
	log *slog.Logger

	mu    sync.Mutex
	fresh map[digest.Digest]*fresh // may not be in the store yet
}

// fresh is a blob that somebody uses. The last one closes it.
type fresh struct {
	io.ReaderAt
	size  int64
	users int
	close func() error
}

// take finds a fresh blob, of which the caller is a user from now on; nil: none.
func (b *blobs) take(dgst digest.Digest) *fresh {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.fresh[dgst]
	if f != nil {
		f.users++
	}
	return f
}

// give is take for one that may be there already, which stays then.
func (b *blobs) give(dgst digest.Digest, f *fresh) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if there := b.fresh[dgst]; there != nil {
		there.users++
		_ = f.close() // nothing is lost with it
		return
	}
	f.users = 1
	b.fresh[dgst] = f
}

// leave ends a use.
func (b *blobs) leave(dgst digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	f := b.fresh[dgst]
	if f.users--; f.users == 0 {
		delete(b.fresh, dgst)
		_ = f.close() // nothing is lost with it
	}
}

// Info implements content.InfoProvider.
func (b *blobs) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	if f := b.take(dgst); f != nil {
		defer b.leave(dgst)
		return content.Info{Digest: dgst, Size: f.size}, nil
	}
	found, err := b.db.BuildBlob(ctx, dgst.String())
	return content.Info{Digest: dgst, Size: found.Size}, missing(err)
}

// ReaderAt implements content.Provider. Reading ends with ctx.
func (b *blobs) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if f := b.take(desc.Digest); f != nil {
		return &opened{fresh: f, leave: sync.OnceFunc(func() { b.leave(desc.Digest) })}, nil
	}
	found, err := b.db.BuildBlob(ctx, desc.Digest.String())
	if err != nil {
		return nil, missing(err)
	}
	return &chunks{ctx: ctx, db: b.db, blob: found, at: -1}, nil
}

// missing makes the store's error the content store's.
func missing(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// opened is a fresh blob that is read.
type opened struct {
	*fresh
	leave func()
}

func (o *opened) Size() int64  { return o.size }
func (o *opened) Close() error { o.leave(); return nil }

// chunks is a blob in the store that is read. It keeps the chunk that was read last.
type chunks struct {
	ctx  context.Context
	db   store.History
	blob store.BuildBlob

	mu   sync.Mutex
	at   int64 // which one is in data
	data []byte
}

func (c *chunks) Size() int64  { return c.blob.Size }
func (c *chunks) Close() error { return nil }

func (c *chunks) ReadAt(p []byte, off int64) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n < len(p) {
		if off >= c.blob.Size {
			return n, io.EOF
		}
		if at := off / store.BuildChunk; at != c.at {
			if c.data, err = c.db.BuildBlobData(c.ctx, c.blob.Digest, at); err != nil {
				c.at = -1
				return n, err
			}
			c.at = at
		}
		got := copy(p[n:], c.data[min(off%store.BuildChunk, int64(len(c.data))):])
		if got == 0 {
			return n, fmt.Errorf("content %s: %w", c.blob.Digest, io.ErrUnexpectedEOF)
		}
		n, off = n+got, off+int64(got)
	}
	return n, nil
}

// hold keeps blobs until release: from before they are written until the record that
// names them is in the store.
type hold struct {
	blobs *blobs
	id    string

	mu     sync.Mutex
	fresh  []digest.Digest
	stored bool // some may be held in the store
}

func (b *blobs) hold() *hold { return &hold{blobs: b, id: rand.Text()} }

// add takes a blob. It must not be changed any more.
func (h *hold) add(mediaType string, data []byte) (ocispecs.Descriptor, error) {
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	f := &fresh{ReaderAt: bytes.NewReader(data), size: desc.Size, close: func() error { return nil }}
	if len(data) > maxFresh {
		s, err := newSpool(h.blobs.dir)
		if err != nil {
			return ocispecs.Descriptor{}, err
		}
		if _, err := s.Write(data); err != nil {
			return ocispecs.Descriptor{}, errors.Join(err, s.file.Close())
		}
		return h.addSpool(mediaType, s), nil
	}
	h.keep(desc.Digest, f)
	return desc, nil
}

// addSpool takes what was written to a file.
func (h *hold) addSpool(mediaType string, s *spool) ocispecs.Descriptor {
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: s.hash.Digest(), Size: s.size}
	h.keep(desc.Digest, &fresh{ReaderAt: s.file, size: s.size, close: s.file.Close})
	return desc
}

func (h *hold) keep(dgst digest.Digest, f *fresh) {
	h.blobs.give(dgst, f)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fresh = append(h.fresh, dgst)
}

// find takes a blob that is here already, and returns its size.
func (h *hold) find(ctx context.Context, dgst digest.Digest) (int64, error) {
	if f := h.blobs.take(dgst); f != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.fresh = append(h.fresh, dgst)
		return f.size, nil
	}
	h.inStore()
	found, err := h.blobs.db.HoldBuildBlob(ctx, h.id, dgst.String())
	return found.Size, err
}

func (h *hold) inStore() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stored = true
}

// persist makes sure that blobs which are held are in the store.
func (h *hold) persist(ctx context.Context, digests ...digest.Digest) error {
	h.inStore()
	h.mu.Lock()
	held := slices.Clone(h.fresh)
	h.mu.Unlock()
	for _, dgst := range digests {
		if !slices.Contains(held, dgst) {
			continue
		}
		f := h.blobs.take(dgst)
		err := h.blobs.db.PutBuildBlob(ctx, h.id, store.BuildBlob{Digest: dgst.String(), Size: f.size}, f)
		h.blobs.leave(dgst)
		if err != nil {
			return err
		}
	}
	return nil
}

// release lets go of all. What nobody names is removed; if that fails, it is swept.
func (h *hold) release(ctx context.Context) {
	h.mu.Lock()
	held, stored := h.fresh, h.stored
	h.fresh, h.stored = nil, false
	h.mu.Unlock()
	for _, dgst := range held {
		h.blobs.leave(dgst)
	}
	if !stored {
		return
	}
	if err := h.blobs.db.ReleaseBuildBlobs(ctx, h.id); err != nil {
		h.blobs.log.Warn("cleaning up the build history", "error", err)
	}
}

// spool is a blob on its way to the store: a file that has no name, so that nothing
// of it is left behind, whatever happens.
type spool struct {
	file *os.File
	hash digest.Digester
	size int64
}

func newSpool(dir string) (*spool, error) {
	file, err := os.CreateTemp(dir, "blob-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return &spool{file: file, hash: digest.Canonical.Digester()}, nil
}

func (s *spool) Write(p []byte) (int, error) {
	n, err := s.file.Write(p)
	_, _ = s.hash.Hash().Write(p[:n]) // never fails
	s.size += int64(n)
	return n, err
}

// read returns a whole blob of at most limit bytes.
func read(ctx context.Context, from content.Provider, desc ocispecs.Descriptor, limit int64) (data []byte, err error) {
	if err := desc.Digest.Validate(); err != nil || desc.Digest.Algorithm() != digest.Canonical {
		return nil, fmt.Errorf("reading %q: it is not named by a %s digest", desc.Digest, digest.Canonical)
	}
	if desc.Size > limit {
		return nil, fmt.Errorf("reading %s: it has %d bytes, at most %d are possible", desc.Digest, desc.Size, limit)
	}
	ra, err := from.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, ra.Close()) }()
	if ra.Size() > limit {
		return nil, fmt.Errorf("reading %s: it has %d bytes, at most %d are possible", desc.Digest, ra.Size(), limit)
	}
	data = make([]byte, ra.Size())
	if n, err := ra.ReadAt(data, 0); n < len(data) {
		return nil, fmt.Errorf("reading %s: %w", desc.Digest, err)
	}
	if digest.FromBytes(data) != desc.Digest {
		return nil, fmt.Errorf("reading %s: the content does not have that digest", desc.Digest)
	}
	return data, nil
}
