package farmtest

import (
	"fmt"
	"os"
	"sync"
)

// Shared stands in for a test where a part serves many of them: what is started with it lives until Close, which
// TestMain calls after the last test. Fatalf and the like go to the test that happens to start the part.
type Shared struct {
	mu       sync.Mutex
	current  T
	cleanups []func()
	failed   bool
}

// Start runs start with a T whose cleanups belong to s; problems are reported to t. It runs one start at a time.
func (s *Shared) Start(t T, start func(T)) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = t
	defer func() { s.current = nil }()
	start((*sharedT)(s))
}

// Close undoes everything that was started, last first, and reports whether that went well.
func (s *Shared) Close() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.cleanups) > 0 {
		last := s.cleanups[len(s.cleanups)-1]
		s.cleanups = s.cleanups[:len(s.cleanups)-1]
		last()
	}
	return !s.failed
}

// sharedT is the T that Start hands out; it exists so that Shared itself does not look like a test.
type sharedT Shared

func (s *sharedT) Helper()           {}
func (s *sharedT) Name() string      { return "shared" }
func (s *sharedT) Failed() bool      { return s.failed }
func (s *sharedT) Cleanup(fn func()) { s.cleanups = append(s.cleanups, fn) }

func (s *sharedT) Logf(format string, args ...any) {
	if s.current != nil {
		s.current.Logf(format, args...)
		return
	}
	printf(format, args...)
}

func (s *sharedT) Errorf(format string, args ...any) {
	s.failed = true
	if s.current != nil {
		s.current.Errorf(format, args...)
		return
	}
	printf(format, args...)
}

func (s *sharedT) Fatalf(format string, args ...any) {
	s.failed = true
	if s.current == nil {
		printf(format, args...)
		return
	}
	s.current.Fatalf(format, args...)
}

func (s *sharedT) Skipf(format string, args ...any) {
	if s.current != nil {
		s.current.Skipf(format, args...)
	}
}

// printf reports what happens after the last test, when there is no test left to report to.
func printf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "end-to-end clean-up: "+format+"\n", args...)
}
