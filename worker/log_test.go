package worker

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

// testLog is a log that a test can wait for.
type testLog struct {
	mu      sync.Mutex
	text    bytes.Buffer
	written chan struct{} // closed and replaced by each write
}

func newLog() *testLog { return &testLog{written: make(chan struct{})} }

func (l *testLog) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.written)
	l.written = make(chan struct{})
	return l.text.Write(p)
}

func (l *testLog) wait(t *testing.T, s string) {
	t.Helper()
	late := time.After(patience)
	for {
		l.mu.Lock()
		text, written := l.text.String(), l.written
		l.mu.Unlock()
		if strings.Contains(text, s) {
			return
		}
		select {
		case <-written:
		case <-late:
			t.Fatalf("the log never said %q:\n%s", s, text)
		}
	}
}
