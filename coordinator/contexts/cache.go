package contexts

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sync/semaphore"
)

const (
	// perEntry is what a file takes on the disk beside its bytes.
	perEntry = 4096
	// spare is what stays free of the disk.
	spare = 256 << 20
)

// errClosed is why nothing is unpacked any more.
var errClosed = errors.New("the coordinator is stopping")

// fill writes a context's files into an empty folder, and returns how many bytes
// that took. Before it writes, it asks for room.
type fill func(ctx context.Context, n name, dir string, room func(bytes int64) error) (taken int64, err error)

// cache is the folders that there are. Those in use have references; of the others
// the one that was used last stays the longest.
type cache struct {
	dir      string
	max      int64
	fill     fill
	unpacks  *semaphore.Weighted
	ctx      context.Context // of filling
	cancel   context.CancelCauseFunc
	removals context.Context
	stop     context.CancelFunc
	running  sync.WaitGroup // of filling and removing; close waits for it

	mu      sync.Mutex
	closed  bool
	folders map[name]*folder
	taken   int64 // bytes, by folders in the map
	clock   int64 // counts uses
}

// folder is one context's. Its fields are guarded by cache.mu, but dir and err, which
// do not change once ready is closed.
type folder struct {
	name   name
	ready  chan struct{}
	dir    string
	err    error
	cancel context.CancelFunc

	users int
	used  int64 // by cache.clock
	taken int64
}

func newCache(dir string, o Options, f fill) *cache {
	c := &cache{dir: dir, max: o.MaxCache, fill: f, unpacks: semaphore.NewWeighted(int64(o.MaxUnpacking)), folders: map[name]*folder{}}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.removals, c.stop = context.WithCancel(context.Background())
	return c
}

func (c *cache) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel(errClosed)
	c.stop()
	c.running.Wait()
}

func (c *cache) open(ctx context.Context, n name) (string, func(), error) {
	f, err := c.use(n) //nolint:contextcheck // the folder is for all who wait, and filled for as long as somebody does
	if err != nil {
		return "", nil, err
	}
	release := sync.OnceFunc(func() { c.release(f) })
	select {
	case <-f.ready:
	case <-ctx.Done():
		release()
		return "", nil, context.Cause(ctx)
	}
	if f.err != nil {
		release()
		return "", nil, f.err
	}
	return f.dir, release, nil
}

// use returns the context's folder, which may have to be waited for.
func (c *cache) use(n name) (*folder, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, errClosed
	}
	f := c.folders[n]
	if f == nil {
		f = &folder{name: n, ready: make(chan struct{})}
		var ctx context.Context
		ctx, f.cancel = context.WithCancel(c.ctx)
		c.folders[n] = f
		c.running.Go(func() { c.make(ctx, f) }) // until it is ready
	}
	f.users++
	return f, nil
}

func (c *cache) release(f *folder) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f.users--
	c.clock++
	f.used = c.clock
	select {
	case <-f.ready:
		c.evict(0)
	default:
		if f.users == 0 { // nobody waits any more; who comes next begins anew
			f.cancel()
			c.forget(f)
		}
	}
}

// make fills a folder.
func (c *cache) make(ctx context.Context, f *folder) {
	defer f.cancel()
	dir, taken, err := c.filled(ctx, f)
	c.mu.Lock()
	defer c.mu.Unlock()
	f.dir, f.err = dir, err
	close(f.ready)
	if c.folders[f.name] != f || err != nil { // everybody has left, or will
		c.forget(f)
		if dir != "" {
			c.removeLocked(dir)
		}
		return
	}
	c.taken += taken - f.taken
	f.taken = taken
	c.evict(0)
}

func (c *cache) filled(ctx context.Context, f *folder) (dir string, taken int64, err error) {
	if err := c.unpacks.Acquire(ctx, 1); err != nil {
		return "", 0, context.Cause(ctx)
	}
	defer c.unpacks.Release(1)
	dir, err = os.MkdirTemp(c.dir, "context-*")
	if err != nil {
		return "", 0, fmt.Errorf("unpacking context %s: %w", f.name.digest, err)
	}
	taken, err = c.fill(ctx, f.name, dir, func(n int64) error { return c.reserve(f, n) })
	return dir, taken, err
}

// reserve makes room for a folder that is about to be filled.
func (c *cache) reserve(f *folder, n int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.folders[f.name] == f {
		c.evict(n)
		f.taken = n
		c.taken += n
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(c.dir, &disk); err != nil {
		return nil //nolint:nilerr // the disk will say so itself
	}
	if free := int64(disk.Bavail) * int64(disk.Bsize); n > free-spare { //nolint:unconvert // the types differ between systems
		return fmt.Errorf("unpacking context %s takes %d MiB: the coordinator's disk has %d MiB left, of which %d stay free", f.name.digest, n>>20, free>>20, spare>>20)
	}
	return nil
}

// evict removes folders that nobody uses until there is room for n more bytes.
func (c *cache) evict(n int64) {
	for c.taken+n > c.max {
		var oldest *folder
		for _, f := range c.folders {
			if f.users == 0 && (oldest == nil || f.used < oldest.used) {
				oldest = f
			}
		}
		if oldest == nil {
			return
		}
		c.forget(oldest)
		c.removeLocked(oldest.dir)
	}
}

func (c *cache) forget(f *folder) {
	if c.folders[f.name] == f {
		delete(c.folders, f.name)
		c.taken -= f.taken
		f.taken = 0
	}
}

// remove removes a folder, while others work. What remains when the cache is closed
// is removed when the coordinator starts again.
func (c *cache) remove(dir string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.removeLocked(dir)
}

func (c *cache) removeLocked(dir string) {
	if !c.closed {
		c.running.Go(func() { removeTree(c.removals, dir) })
	}
}

// removeTree removes a tree whose folders may be read-only, following no link. What
// it cannot remove stays, and takes room.
func removeTree(ctx context.Context, dir string) {
	if root, err := os.OpenRoot(dir); err == nil {
		defer root.Close() //nolint:errcheck // nothing was written by it
		_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if ctx.Err() != nil {
				return filepath.SkipAll
			}
			if rel, relErr := filepath.Rel(dir, p); relErr == nil && err == nil && d.IsDir() {
				_ = root.Chmod(rel, 0o700) // before WalkDir reads it
			}
			return nil
		})
	}
	if ctx.Err() == nil {
		_ = os.RemoveAll(dir)
	}
}
