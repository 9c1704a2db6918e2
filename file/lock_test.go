//go:build unix

package file_test

import (
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"github.com/archfarm/archfarm/file"
)

func take(t *testing.T, path string, shared bool) *file.Lock {
	t.Helper()
	l, err := file.TakeLock(path, shared)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func TestLock_IsOfOneOrShared(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	refused := func(when string, shared bool) {
		t.Helper()
		if _, err := file.TakeLock(path, shared); !errors.Is(err, file.ErrLocked) {
			t.Errorf("%s: %v", when, err)
		}
	}
	first := take(t, path, false)
	refused("alone, while another is alone", false)
	refused("shared, while another is alone", true)
	if err := first.Share(); err != nil || !first.Shared() {
		t.Fatal(err)
	}
	second := take(t, path, true)
	refused("alone, while two share", false)
	for range 2 { // and it does not lose what it has
		if err := second.Alone(); !errors.Is(err, file.ErrLocked) || !second.Shared() {
			t.Fatalf("alone beside another: %v", err)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	refused("alone, while one shares", false)
	if err := second.Alone(); err != nil || second.Shared() {
		t.Fatal(err)
	}
	refused("shared, once one is alone", true)
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	take(t, path, false)
}

// Who wants the lock alone may get it in between, but not for good.
func TestLock_SharingWaitsForWhoWasQuicker(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	l := take(t, path, false)
	stop := make(chan struct{})
	var others sync.WaitGroup
	for range 4 {
		others.Go(func() { // until stop
			for {
				select {
				case <-stop:
					return
				default:
				}
				if other, err := file.TakeLock(path, false); err == nil {
					_ = other.Close()
				}
			}
		})
	}
	for range 200 {
		if err := l.Share(); err != nil {
			t.Fatal(err)
		}
		if err := l.Alone(); err != nil && !errors.Is(err, file.ErrLocked) {
			t.Fatal(err)
		}
	}
	close(stop)
	others.Wait()
}
