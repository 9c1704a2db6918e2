//go:build unix

package file

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"time"
)

// ErrLocked tells that another process has a lock.
var ErrLocked = errors.New("another process has locked it")

// converting bounds how long a lock waits for what another process got hold of in the
// moment between the old lock and the new one.
const converting = 2 * time.Second

// Lock is a file's lock among processes (flock(2)): of one alone, or shared by some.
// It ends with its process. Its methods may be called concurrently.
type Lock struct {
	mu     sync.Mutex
	f      *os.File
	shared bool
}

// TakeLock locks a file, which it makes when it is not there (mode 0600), without
// waiting: alone, or shared with those who share it, too. ErrLocked when others have it.
func TakeLock(path string, shared bool) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	l := &Lock{f: f, shared: shared}
	if err := l.flock(shared); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

// Share lets others share the lock. It is not atomic: whoever tries to have it alone
// at that very moment gets it, and is waited for a little.
func (l *Lock) Share() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.shared {
		return nil
	}
	if err := l.share(); err != nil {
		return err
	}
	l.shared = true
	return nil
}

func (l *Lock) share() error {
	for end := time.Now().Add(converting); ; time.Sleep(converting / 200) {
		err := l.flock(true)
		if !errors.Is(err, ErrLocked) || time.Now().After(end) {
			return err
		}
	}
}

// Alone ends the sharing. ErrLocked as long as others share the lock; then it stays
// shared.
func (l *Lock) Alone() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.shared {
		return nil
	}
	err := l.flock(false)
	if err == nil {
		l.shared = false
		return nil
	}
	if lost := l.share(); lost != nil { // what could not be converted is gone (flock(2))
		return fmt.Errorf("%w, and sharing it again: %w", err, lost)
	}
	return err
}

// Shared tells whether others may share the lock.
func (l *Lock) Shared() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.shared
}

// Close unlocks. The file stays.
func (l *Lock) Close() error { return l.f.Close() }

func (l *Lock) flock(shared bool) error {
	how := syscall.LOCK_EX
	if shared {
		how = syscall.LOCK_SH
	}
	err := syscall.Flock(int(l.f.Fd()), how|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return ErrLocked
	}
	return err
}
