// Package contexts keeps the build contexts that clients upload: their chunks and
// manifests in the store, each tenant's for itself, and folders of those that are
// being built.
//
// A context is on the disk only as a cache, which begins empty with the process:
// what a crash left may be there by half.
package contexts

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"

	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Options bound what contexts take. Zero means the default.
type Options struct {
	// MaxContext is how big a context's archive may be, in bytes (8 GiB).
	MaxContext int64
	// MaxCache is how many bytes of unpacked folders are kept when nobody uses them
	// (32 GiB). Those in use are over and above that, if need be.
	MaxCache int64
	// MaxUploads is how many calls of UploadContext are served at a time (8), half of
	// them for one tenant; others wait. One takes up to 32 MiB, when its chunks have
	// 8 MiB each, which is twice as much as Upload sends.
	MaxUploads int
	// MaxUnpacking is how many contexts are unpacked at a time (4). One takes up to
	// 8 MiB, a manifest's chunks, and the names of its folders.
	MaxUnpacking int
	// Idle is how long an upload may send nothing (5 minutes): enough for 8 MiB at
	// 220 kbit/s.
	Idle time.Duration
	// Keep is how long what no job needs is kept after its last use, which is also for
	// how long an upload finds chunks of earlier ones (7 days).
	Keep time.Duration
}

func (o Options) withDefaults() Options {
	o.MaxContext = cmp.Or(o.MaxContext, contextpack.MaxBytes)
	o.MaxCache = cmp.Or(o.MaxCache, 32<<30)
	o.MaxUploads = cmp.Or(o.MaxUploads, 8)
	o.MaxUnpacking = cmp.Or(o.MaxUnpacking, 4)
	o.Idle = cmp.Or(o.Idle, 5*time.Minute)
	o.Keep = cmp.Or(o.Keep, 7*24*time.Hour)
	return o
}

// Contexts are all tenants' contexts. Its methods FindMissing and UploadContext are
// those of archfarmv1.JobServiceServer.
type Contexts struct {
	blobs   store.Blobs
	o       Options
	uploads *turns
	cache   *cache
	fresh   *fresh
}

// New keeps contexts in a store, and unpacks them into a folder that is for this
// process alone: what is in it is removed. Close it before the store.
func New(blobs store.Blobs, dir string, o Options) (*Contexts, error) {
	o = o.withDefaults()
	// Contexts may hold programs with the setuid bit: nobody else is to reach them.
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, 0o700)); err != nil {
		return nil, fmt.Errorf("the folder of contexts: %w", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("the folder of contexts: %w", err)
	}
	c := &Contexts{blobs: blobs, o: o, uploads: newTurns(o.MaxUploads), fresh: &fresh{until: map[name]time.Time{}}}
	c.cache = newCache(dir, o, c.unpack)
	for _, f := range left {
		c.cache.remove(filepath.Join(dir, f.Name()))
	}
	return c, nil
}

// Close ends what is being unpacked and waits for it. Folders stay where they are.
func (c *Contexts) Close() { c.cache.close() }

// Open returns a folder with a context's files, which are only to be read, until
// release is called, which must happen once and may happen again. Users at the same
// time get the same folder. store.ErrNotFound when the tenant has no such context.
func (c *Contexts) Open(ctx context.Context, tenant, digest string) (dir string, release func(), err error) {
	return c.cache.open(ctx, name{tenant, digest})
}

// Exists returns store.ErrNotFound when the tenant has no such context, all chunks
// included. One that exists is kept for a while: a job may be submitted with it.
func (c *Contexts) Exists(ctx context.Context, tenant, digest string) error {
	n := name{tenant, digest}
	if c.fresh.is(n) {
		return nil
	}
	if err := contextpack.CheckDigest(digest); err != nil {
		return fmt.Errorf("%w: %w", err, store.ErrNotFound)
	}
	m, _, err := c.manifest(ctx, n)
	if err != nil {
		return err
	}
	missing, err := c.missing(ctx, tenant, m)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		return fmt.Errorf("context %s: %d of its chunks are gone; upload it again: %w", digest, len(missing), store.ErrNotFound)
	}
	// The manifest after its chunks (see sweepSlack).
	if missing, err = c.blobs.MissingBlobs(ctx, manifestsOf(tenant), []string{digest}); err != nil {
		return fmt.Errorf("context %s: %w", digest, err)
	}
	if len(missing) > 0 {
		return notThere(digest)
	}
	c.fresh.add(n, time.Now().Add(c.o.Keep/4))
	return nil
}

// Sweep removes contexts that no job needs and chunks that no context has, once
// Options.Keep has passed since their last use, and returns how many bytes that were.
func (c *Contexts) Sweep(ctx context.Context, inUse func(ctx context.Context, tenant, digest string) (bool, error)) (int64, error) {
	before := time.Now().Add(-c.o.Keep)
	kept, err := c.inUse(ctx, before, inUse)
	if err != nil {
		return 0, fmt.Errorf("sweeping contexts: %w", err)
	}
	n, err := c.blobs.SweepBlobs(ctx, before, func(tenant, digest string) bool { return kept[name{tenant, digest}] })
	if err != nil {
		return n, fmt.Errorf("sweeping contexts: %w", err)
	}
	return n, nil
}

// sweepSlack is which part of Options.Keep may pass between a context's chunks having
// been kept and its manifest: a manifest that is younger than that has chunks that
// are not swept, and is not asked about.
const sweepSlack = 7

// inUse returns the manifests, of those that are about to be swept, that jobs name,
// and the chunks that those name.
func (c *Contexts) inUse(ctx context.Context, before time.Time, inUse func(ctx context.Context, tenant, digest string) (bool, error)) (map[name]bool, error) {
	var all []name
	// It keeps everything: this is how to see what is there.
	_, err := c.blobs.SweepBlobs(ctx, before.Add(c.o.Keep/sweepSlack), func(tenant, digest string) bool {
		if of, ok := strings.CutSuffix(tenant, manifests); ok {
			all = append(all, name{of, digest})
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	kept := map[name]bool{}
	for _, n := range all {
		used, err := inUse(ctx, n.tenant, n.digest)
		if err != nil {
			return nil, err
		}
		if !used {
			continue
		}
		kept[name{manifestsOf(n.tenant), n.digest}] = true
		m, _, err := c.manifest(ctx, n)
		if errors.Is(err, store.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, chunk := range m.GetChunks() {
			kept[name{n.tenant, chunk.GetDigest()}] = true
		}
	}
	return kept, nil
}

// name is whose blob it is, and which. Contexts are named by their manifests.
type name struct{ tenant, digest string }

// manifests is where a tenant's manifests are, apart from the chunks, so that
// sweeping finds them and no upload of chunks makes or keeps one. No tenant's name
// has a slash.
const manifests = "/contexts"

func manifestsOf(tenant string) string { return tenant + manifests }

func notThere(digest string) error {
	return fmt.Errorf("context %s has not been uploaded, or not been used for a long time: upload it: %w", digest, store.ErrNotFound)
}

// manifest reads a context's, and its size in bytes.
func (c *Contexts) manifest(ctx context.Context, n name) (*archfarmv1.ContextManifest, int64, error) {
	r, err := c.blobs.Blob(ctx, manifestsOf(n.tenant), n.digest)
	if errors.Is(err, store.ErrNotFound) {
		return nil, 0, notThere(n.digest)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("context %s: %w", n.digest, err)
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, store.MaxBlob+1))
	if err != nil {
		return nil, 0, fmt.Errorf("context %s: %w", n.digest, err)
	}
	if digest.FromBytes(b).String() != n.digest {
		return nil, 0, fmt.Errorf("context %s: the list of its chunks is not what was stored: the database is damaged", n.digest)
	}
	m, err := contextpack.Decode(b)
	if err != nil {
		return nil, 0, fmt.Errorf("context %s: %w", n.digest, err)
	}
	size, err := contextpack.Check(m, c.o.MaxContext)
	if err != nil {
		return nil, 0, fmt.Errorf("context %s: %w", n.digest, err)
	}
	return m, size, nil
}

// missing returns the chunks that are not there, and keeps the others for a while.
func (c *Contexts) missing(ctx context.Context, tenant string, m *archfarmv1.ContextManifest) ([]string, error) {
	digests := make([]string, len(m.GetChunks()))
	for i, chunk := range m.GetChunks() {
		digests[i] = chunk.GetDigest()
	}
	slices.Sort(digests)
	var missing []string
	for batch := range slices.Chunk(slices.Compact(digests), maxFind) {
		some, err := c.blobs.MissingBlobs(ctx, tenant, batch)
		if err != nil {
			return nil, fmt.Errorf("looking for a context's chunks: %w", err)
		}
		missing = append(missing, some...)
	}
	return missing, nil
}

// fresh remembers contexts that have just been looked for, so that many jobs with
// one context do not look through its chunks each.
type fresh struct {
	mu    sync.Mutex
	until map[name]time.Time
}

const maxFresh = 10_000

func (f *fresh) is(n name) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return time.Now().Before(f.until[n])
}

func (f *fresh) add(n name, until time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.until) >= maxFresh {
		clear(f.until)
	}
	f.until[n] = until
}

// turns let a number of uploads run at a time, and half as many of one tenant.
type turns struct {
	all *semaphore.Weighted

	mu        sync.Mutex
	each      int64
	perTenant map[string]*semaphore.Weighted
}

func newTurns(n int) *turns {
	return &turns{all: semaphore.NewWeighted(int64(n)), each: int64(max(n/2, 1)), perTenant: map[string]*semaphore.Weighted{}}
}

// take waits for a turn, which ends when done is called.
func (t *turns) take(ctx context.Context, tenant string) (done func(), err error) {
	t.mu.Lock()
	own := t.perTenant[tenant]
	if own == nil {
		own = semaphore.NewWeighted(t.each)
		t.perTenant[tenant] = own
	}
	t.mu.Unlock()
	if err := own.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	if err := t.all.Acquire(ctx, 1); err != nil {
		own.Release(1)
		return nil, err
	}
	return func() { t.all.Release(1); own.Release(1) }, nil
}
