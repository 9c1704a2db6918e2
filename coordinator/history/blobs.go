package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	containerdlog "github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobs are what records name, by digest: files, and for a moment memory.
//
// A blob exists while a record names it or somebody holds it. It is held from
// before it is written until the record that names it is on disk.
type blobs struct {
	files content.Store
	named func(digest.Digest) (bool, error) // by a record on disk
	ctx   context.Context                   // never ends: a removal that has begun is not given up

	mu    sync.Mutex
	held  map[digest.Digest]int
	fresh map[digest.Digest][]byte // not on disk yet
}

func openBlobs(ctx context.Context, dir string, named func(digest.Digest) (bool, error)) (*blobs, error) {
	_ = containerdlog.SetLevel("error") // file systems without fsverity are nothing to warn of
	// What is half written has no writer any more. The store could not even list what a
	// crash has left there in the middle of its creation.
	if err := os.RemoveAll(filepath.Join(dir, "ingest")); err != nil {
		return nil, fmt.Errorf("removing what was half written to the build history: %w", err)
	}
	files, err := local.NewStore(dir)
	if err == nil {
		err = os.MkdirAll(filepath.Join(dir, "blobs"), 0o700) // which Walk expects
	}
	if err != nil {
		return nil, fmt.Errorf("opening the folder of the build history's content: %w", err)
	}
	return &blobs{files: files, named: named, ctx: context.WithoutCancel(ctx), held: map[digest.Digest]int{}, fresh: map[digest.Digest][]byte{}}, nil
}

// add takes a blob, which is held once more from now on. It must not be changed
// any more.
func (b *blobs) add(ctx context.Context, mediaType string, data []byte) (ocispecs.Descriptor, error) {
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	b.mu.Lock()
	b.held[desc.Digest]++
	small := len(data) <= maxFresh
	if small {
		b.fresh[desc.Digest] = data
	}
	b.mu.Unlock()
	if small {
		return desc, nil
	}
	if err := b.write(ctx, desc.Digest, data); err != nil {
		b.release(desc.Digest)
		return ocispecs.Descriptor{}, err
	}
	return desc, nil
}

// commit takes what was written to w, which is held once more from now on.
func (b *blobs) commit(ctx context.Context, mediaType string, w content.Writer, size int64) (ocispecs.Descriptor, error) {
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: w.Digest(), Size: size}
	b.hold(desc.Digest)
	if err := w.Commit(ctx, size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		b.release(desc.Digest)
		return ocispecs.Descriptor{}, fmt.Errorf("writing %s: %w", mediaType, err)
	}
	return desc, nil
}

func (b *blobs) hold(dgst digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held[dgst]++
}

// persist makes sure that blobs which are held are on disk.
func (b *blobs) persist(ctx context.Context, digests ...digest.Digest) error {
	for _, dgst := range digests {
		b.mu.Lock()
		data, ok := b.fresh[dgst]
		b.mu.Unlock()
		if !ok {
			continue
		}
		if err := b.write(ctx, dgst, data); err != nil {
			return err
		}
		b.mu.Lock()
		delete(b.fresh, dgst)
		b.mu.Unlock()
	}
	return nil
}

func (b *blobs) write(ctx context.Context, dgst digest.Digest, data []byte) error {
	desc := ocispecs.Descriptor{Digest: dgst, Size: int64(len(data))}
	if _, err := b.files.Info(ctx, dgst); err == nil {
		return nil
	}
	if err := content.WriteBlob(ctx, b.files, dgst.String(), bytes.NewReader(data), desc); err != nil {
		return fmt.Errorf("writing %s to the build history: %w", dgst, err)
	}
	return nil
}

// release lets go of blobs that were held. Those that nobody names are removed.
func (b *blobs) release(digests ...digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, dgst := range digests {
		if b.held[dgst]--; b.held[dgst] <= 0 {
			delete(b.held, dgst)
		}
		b.drop(dgst)
	}
}

// forget removes blobs that a record has named, unless they are still wanted.
func (b *blobs) forget(digests ...digest.Digest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, dgst := range digests {
		b.drop(dgst)
	}
}

// drop removes a blob that nobody wants. What cannot be removed now is at the
// next start. b.mu is held, so that nobody takes hold of it meanwhile.
func (b *blobs) drop(dgst digest.Digest) {
	if b.held[dgst] > 0 {
		return
	}
	if named, err := b.named(dgst); named || err != nil {
		return
	}
	delete(b.fresh, dgst)
	_ = b.files.Delete(b.ctx, dgst)
}

// sweep removes the blobs that no record names, which a coordinator that crashed has
// left behind. Nothing is held yet.
func (b *blobs) sweep(ctx context.Context) error {
	var unwanted []digest.Digest
	if err := b.files.Walk(ctx, func(info content.Info) error {
		named, err := b.named(info.Digest)
		if err == nil && !named {
			unwanted = append(unwanted, info.Digest)
		}
		return err
	}); err != nil {
		return err
	}
	for _, dgst := range unwanted {
		if err := b.files.Delete(ctx, dgst); err != nil {
			return err
		}
	}
	return nil
}

func (b *blobs) inMemory(dgst digest.Digest) ([]byte, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	data, ok := b.fresh[dgst]
	return data, ok
}

// Info implements content.InfoProvider.
func (b *blobs) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	if data, ok := b.inMemory(dgst); ok {
		return content.Info{Digest: dgst, Size: int64(len(data))}, nil
	}
	return b.files.Info(ctx, dgst)
}

// ReaderAt implements content.Provider.
func (b *blobs) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if data, ok := b.inMemory(desc.Digest); ok {
		return &memory{Reader: bytes.NewReader(data)}, nil
	}
	return b.files.ReaderAt(ctx, desc)
}

// memory is a blob that is not on disk yet.
type memory struct{ *bytes.Reader }

func (memory) Close() error { return nil }

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

var _ io.ReaderAt = memory{}
