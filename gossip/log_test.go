package gossip_test

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"
)

// lockedLog is a log that a test can wait for.
type lockedLog struct {
	mu      sync.Mutex
	text    bytes.Buffer
	written chan struct{}
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written != nil {
		close(l.written)
		l.written = nil
	}
	return l.text.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *lockedLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Reset()
}

// wait waits until the log contains s.
func (l *lockedLog) wait(t *testing.T, s string) {
	t.Helper()
	late := time.After(patience)
	for {
		l.mu.Lock()
		found := strings.Contains(l.text.String(), s)
		if l.written == nil {
			l.written = make(chan struct{})
		}
		written := l.written
		l.mu.Unlock()
		if found {
			return
		}
		select {
		case <-written:
		case <-late:
			t.Fatalf("the log never said %q:\n%s", s, l)
		}
	}
}
