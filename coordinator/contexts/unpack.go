package contexts

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// unpack writes a context's files into an empty folder. It is the cache's fill.
func (c *Contexts) unpack(ctx context.Context, n name, dir string, room func(int64) error) (int64, error) {
	m, size, err := c.manifest(ctx, n)
	if err != nil {
		return 0, err
	}
	if err := room(size); err != nil {
		return 0, err
	}
	r := &archive{ctx: ctx, blobs: c.blobs, tenant: n.tenant, chunks: m.GetChunks()}
	done, err := contextpack.Unpack(ctx, r, dir, contextpack.Limits{Bytes: c.o.MaxContext})
	if err != nil {
		return 0, fmt.Errorf("context %s: %w", n.digest, err)
	}
	return done.Bytes + int64(done.Entries)*perEntry, nil
}

// archive reads chunks behind each other. Of each it returns nothing before all of
// it has been compared with its digest.
type archive struct {
	ctx    context.Context
	blobs  store.Blobs
	tenant string
	chunks []*archfarmv1.ContextChunk // still to come
	buf    []byte
	rest   []byte // of buf
}

func (a *archive) Read(p []byte) (int, error) {
	if len(a.rest) == 0 {
		if len(a.chunks) == 0 {
			return 0, io.EOF
		}
		if err := a.next(a.chunks[0]); err != nil {
			return 0, err
		}
		a.chunks = a.chunks[1:]
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

func (a *archive) next(c *archfarmv1.ContextChunk) error {
	r, err := a.blobs.Blob(a.ctx, a.tenant, c.GetDigest())
	if errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("chunk %s is gone: upload the context again: %w", c.GetDigest(), err)
	}
	if err != nil {
		return fmt.Errorf("chunk %s: %w", c.GetDigest(), err)
	}
	defer r.Close()
	if int64(cap(a.buf)) <= c.GetSize() {
		a.buf = make([]byte, c.GetSize()+1)
	}
	// One byte more would be there if it were too long.
	n, err := io.ReadFull(r, a.buf[:c.GetSize()+1])
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("chunk %s: %w", c.GetDigest(), err)
	}
	if int64(n) != c.GetSize() {
		return fmt.Errorf("chunk %s does not have the %d bytes that the context says: upload the context again", c.GetDigest(), c.GetSize())
	}
	if digest.FromBytes(a.buf[:n]).String() != c.GetDigest() {
		return fmt.Errorf("chunk %s is not what was stored: the database is damaged", c.GetDigest())
	}
	a.rest = a.buf[:n]
	return nil
}
