package history

import (
	"context"
	"errors"
	"fmt"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

var errReadOnly = errors.New("read-only content store")

// Content is what records name, for clients: from this store, or else from a
// worker that has it, as long as that is attached. Nothing can be written. What no
// record names is not found.
func (h *History) Content() content.Store { return &contentStore{h: h} }

type contentStore struct{ h *History }

// Info describes a blob.
func (c *contentStore) Info(ctx context.Context, dgst digest.Digest) (content.Info, error) {
	return ask(ctx, c, dgst, func(s content.InfoReaderProvider) (content.Info, error) { return s.Info(ctx, dgst) })
}

// ReaderAt opens a blob.
func (c *contentStore) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	return ask(ctx, c, desc.Digest, func(s content.InfoReaderProvider) (content.ReaderAt, error) { return s.ReaderAt(ctx, desc) })
}

// Walk passes the blobs in the store that meet any filter to f.
func (c *contentStore) Walk(ctx context.Context, f content.WalkFunc, conditions ...string) error {
	match, err := filters.ParseAll(conditions...)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	for after := ""; ; {
		some, err := c.h.records.db.BuildBlobs(ctx, after, page)
		if err != nil {
			return err
		}
		for _, b := range some {
			info := content.Info{Digest: digest.Digest(b.Digest), Size: b.Size}
			if !match.Match(content.AdaptInfo(info)) {
				continue
			}
			if err := f(info); err != nil {
				return err
			}
		}
		if len(some) < page {
			return nil
		}
		after = some[len(some)-1].Digest
	}
}

// ask asks this store for a blob, then the workers that have it.
func ask[T any](ctx context.Context, c *contentStore, dgst digest.Digest, f func(content.InfoReaderProvider) (T, error)) (T, error) {
	got, err := f(c.h.records.blobs)
	if err == nil || !errdefs.IsNotFound(err) {
		return got, err
	}
	missing := err
	names, err := c.h.places(ctx, dgst)
	if err != nil {
		return got, err
	}
	for _, name := range names {
		conn, err := c.h.options.Workers.BuildKit(ctx, name)
		if err != nil {
			missing = fmt.Errorf("content %s is on worker %s, which cannot be reached: %w", dgst, name, errdefs.ErrNotFound)
			continue
		}
		if got, err := f(proxy.NewContentStore(contentapi.NewContentClient(conn))); err == nil {
			return got, nil
		}
	}
	return got, missing
}

// places lists the workers that have a blob. A record that is being written may
// be about to tell.
func (h *History) places(ctx context.Context, dgst digest.Digest) ([]string, error) {
	h.mu.Lock()
	var writing []*Recorder
	for _, r := range h.fresh {
		writing = append(writing, r)
	}
	h.mu.Unlock()
	names, err := h.records.workers(ctx, dgst)
	if err != nil || len(names) > 0 {
		return names, err
	}
	for _, r := range writing {
		if err := wait(ctx, r.stored); err != nil {
			return nil, err
		}
	}
	return h.records.workers(ctx, dgst)
}

// Status finds nothing: nothing is being written that clients know of.
func (c *contentStore) Status(_ context.Context, ref string) (content.Status, error) {
	return content.Status{}, fmt.Errorf("ref %s: %w", ref, errdefs.ErrNotFound)
}

// ListStatuses finds nothing, too.
func (c *contentStore) ListStatuses(context.Context, ...string) ([]content.Status, error) {
	return nil, nil
}

// Writer, Delete, Update and Abort refuse, as a buildkitd's do.
func (c *contentStore) Writer(context.Context, ...content.WriterOpt) (content.Writer, error) {
	return nil, errReadOnly
}

// Delete refuses.
func (c *contentStore) Delete(context.Context, digest.Digest) error { return errReadOnly }

// Update refuses.
func (c *contentStore) Update(context.Context, content.Info, ...string) (content.Info, error) {
	return content.Info{}, errReadOnly
}

// Abort refuses.
func (c *contentStore) Abort(context.Context, string) error { return errReadOnly }
