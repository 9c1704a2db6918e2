package contexts

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

func TestOpen_UnpacksOnceForAll(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	d, _ := r.upload(t, "acme", project(t, 5))
	var all sync.WaitGroup
	dirs := make([]string, 20)
	for i := range dirs {
		all.Go(func() {
			dir, release, err := r.Open(t.Context(), "acme", d)
			if err != nil {
				t.Error(err)
				return
			}
			defer release()
			dirs[i] = dir
			if _, err := os.Stat(filepath.Join(dir, "Dockerfile")); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, dir := range dirs {
		if dir != dirs[0] {
			t.Errorf("%s and %s", dir, dirs[0])
		}
	}
	if list, _ := os.ReadDir(r.dir); len(list) != 1 {
		t.Errorf("there are %d folders", len(list))
	}
}

func TestOpen_OfADamagedChunk(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	d, _ := r.upload(t, "acme", project(t, 6))
	r.everyBlob(t, func(p string, info fs.FileInfo) {
		if info.Size() == 2<<20 { // a piece of the big file
			if err := errors.Join(os.Chmod(p, 0o600), os.WriteFile(p, bytesOf(99, 2<<20), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	})
	if _, _, err := r.Open(t.Context(), "acme", d); err == nil || !strings.Contains(err.Error(), "is not what was stored") {
		t.Errorf("%v", err)
	}
	r.Close() // waits for the removal
	if list, _ := os.ReadDir(r.dir); len(list) > 1 {
		t.Errorf("there are %d folders", len(list))
	}
}

func TestSweep_KeepsWhatJobsNeed(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{Keep: 7 * time.Hour})
	used, unused := project(t, 7), project(t, 100)
	write(t, unused, "big", bytesOf(7, 9<<20)) // shared with the other
	d, first := r.upload(t, "acme", used)
	r.upload(t, "acme", unused)
	r.upload(t, "other", used)
	inUse := func(_ context.Context, tenant, digest string) (bool, error) {
		return tenant == "acme" && digest == d, nil
	}
	all := r.countBlobs(t)
	if n, err := r.Sweep(t.Context(), inUse); n != 0 || err != nil || r.countBlobs(t) != all {
		t.Errorf("young ones are swept: %d bytes, %v", n, err)
	}
	r.grow(t, 8*time.Hour)
	if _, err := r.Sweep(t.Context(), func(context.Context, string, string) (bool, error) { return false, errors.New("no database") }); err == nil || r.countBlobs(t) != all {
		t.Errorf("swept without knowing what is needed: %v", err)
	}
	if n, err := r.Sweep(t.Context(), inUse); n == 0 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n := r.countBlobs(t); n != first.Chunks+1 {
		t.Errorf("%d blobs are left, want %d chunks and their manifest", n, first.Chunks)
	}
	_, release, err := r.Open(t.Context(), "acme", d)
	if err != nil {
		t.Fatal(err)
	}
	release()
	nobody := func(context.Context, string, string) (bool, error) { return false, nil }
	// Asked for again, before a job names it, by a coordinator that has just started.
	r.fresh.until = map[name]time.Time{}
	if err := r.Exists(t.Context(), "acme", d); err != nil {
		t.Fatal(err)
	}
	if n, err := r.Sweep(t.Context(), nobody); n != 0 || err != nil {
		t.Errorf("what a job may be submitted with is swept: %d bytes, %v", n, err)
	}
	r.grow(t, 8*time.Hour)
	if _, err := r.Sweep(t.Context(), nobody); err != nil || r.countBlobs(t) != 0 {
		t.Errorf("%d blobs are left, %v", r.countBlobs(t), err)
	}
	r.fresh.until = map[name]time.Time{}
	if err := r.Exists(t.Context(), "acme", d); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("%v", err)
	}
}

func TestNew_RemovesWhatACrashLeft(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, "context-1/ro/file", nil)
	if err := errors.Join(os.Chmod(filepath.Join(dir, "context-1/ro"), 0o500), os.Symlink("ro", filepath.Join(dir, "context-1/link"))); err != nil {
		t.Fatal(err)
	}
	c, err := New(nil, dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.cache.running.Wait()
	if list, _ := os.ReadDir(dir); len(list) != 0 {
		t.Errorf("%v is left", list)
	}
}

// stub makes a cache whose folders hold nothing; each takes the size that its
// context's name has as many letters.
func stub(t *testing.T, max int64, f fill) *cache {
	t.Helper()
	c := newCache(t.TempDir(), Options{MaxCache: max}.withDefaults(), f)
	t.Cleanup(c.close)
	return c
}

func bySize(_ context.Context, n name, _ string, _ func(int64) error) (int64, error) {
	return int64(len(n.digest)), nil
}

// inUse is how many bytes the folders take.
func (c *cache) inUse() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken
}

func (c *cache) mustOpen(t *testing.T, digest string) (string, func()) {
	t.Helper()
	dir, release, err := c.open(t.Context(), name{"t", digest})
	if err != nil {
		t.Fatal(err)
	}
	return dir, release
}

func TestCache_TheLeastRecentlyUsedGoesFirst(t *testing.T) {
	t.Parallel()
	c := stub(t, 8, bySize)
	a, releaseA := c.mustOpen(t, "aaa")
	b, releaseB := c.mustOpen(t, "bbb")
	releaseB()
	releaseA()
	releaseA()                        // counts once
	_, releaseD := c.mustOpen(t, "d") // 7 in all
	if again, release := c.mustOpen(t, "aaa"); again != a {
		t.Error("unpacked again although there was room")
	} else {
		release()
	}
	_, releaseC := c.mustOpen(t, "ccc")
	c.running.Wait()
	if _, err := os.Stat(b); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the oldest is still there: %v", err)
	}
	if _, err := os.Stat(a); err != nil {
		t.Error(err)
	}
	e, releaseE := c.mustOpen(t, "eeeeeeeeee") // bigger than all there is
	if _, err := os.Stat(e); err != nil {
		t.Error(err)
	}
	if n := c.inUse(); n != 14 {
		t.Errorf("%d bytes are taken, want those in use: 14", n)
	}
	for _, release := range []func(){releaseC, releaseD, releaseE} {
		release()
	}
	if n := c.inUse(); n > 8 {
		t.Errorf("%d bytes are taken", n)
	}
}

func TestCache_UnpackingEndsWhenNobodyWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := make(chan struct{}, 1)
		block := true
		c := stub(t, 8, func(ctx context.Context, _ name, _ string, _ func(int64) error) (int64, error) {
			if block {
				began <- struct{}{}
				<-ctx.Done()
				return 0, context.Cause(ctx)
			}
			return 1, nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		var waiting sync.WaitGroup
		for range 2 {
			waiting.Go(func() {
				if _, _, err := c.open(ctx, name{"t", "x"}); !errors.Is(err, context.Canceled) {
					t.Errorf("%v", err)
				}
			})
		}
		<-began
		synctest.Wait()
		cancel()
		waiting.Wait()
		synctest.Wait()
		block = false
		_, release := c.mustOpen(t, "x") // is not told the other's cancellation
		release()
		if n := c.inUse(); n != 1 {
			t.Errorf("%d bytes are taken", n)
		}
	})
}

func TestCache_AFailureIsTriedAgain(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	fail := true
	c := stub(t, 8, func(_ context.Context, _ name, _ string, room func(int64) error) (int64, error) {
		if err := room(5); err != nil {
			return 0, err
		}
		if fail {
			return 0, broken
		}
		return 3, nil
	})
	if _, _, err := c.open(t.Context(), name{"t", "x"}); !errors.Is(err, broken) || c.inUse() != 0 {
		t.Errorf("%v, %d bytes", err, c.inUse())
	}
	fail = false
	_, release := c.mustOpen(t, "x")
	defer release()
	if n := c.inUse(); n != 3 {
		t.Errorf("%d bytes are taken", n)
	}
	c.close()
	if _, _, err := c.open(t.Context(), name{"t", "y"}); !errors.Is(err, errClosed) {
		t.Errorf("%v", err)
	}
}
