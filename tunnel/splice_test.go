package tunnel

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// pair returns both ends of a connection over network.
func pair(t *testing.T, network string) (a, b net.Conn) {
	t.Helper()
	where := "127.0.0.1:0"
	if network == "unix" {
		dir, err := os.MkdirTemp("", "af")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		where = filepath.Join(dir, "s")
	}
	l, err := net.Listen(network, where)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial(network, l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// spliced is a TCP connection whose far end is spliced to a Unix one, as between
// coordinator and buildkitd.
func spliced(t *testing.T, linger time.Duration) (coordinator, buildkitd net.Conn, done <-chan result) {
	t.Helper()
	coordinator, agentOut := pair(t, "tcp")
	agentIn, buildkitd := pair(t, "unix")
	ended := make(chan result, 1)
	go func() {
		in, out, err := splice(agentOut, agentIn, linger)
		ended <- result{in, out, err}
	}()
	return coordinator, buildkitd, ended
}

type result struct {
	in, out int64
	err     error
}

func TestSplice_CarriesBothWaysAndPassesOnTheEnd(t *testing.T) {
	t.Parallel()
	coordinator, buildkitd, done := spliced(t, time.Minute)
	question, answer := make([]byte, 3<<20), make([]byte, 1<<20)
	rand.Read(question)
	rand.Read(answer)
	go func() {
		_, _ = coordinator.Write(question)
		_ = coordinator.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(buildkitd) // ends only if the end was passed on
	if err != nil || !bytes.Equal(got, question) {
		t.Fatalf("buildkitd received %d bytes, %v", len(got), err)
	}
	go func() {
		_, _ = buildkitd.Write(answer) // after the other direction has ended
		buildkitd.Close()
	}()
	got, err = io.ReadAll(coordinator)
	if err != nil || !bytes.Equal(got, answer) {
		t.Fatalf("the coordinator received %d bytes, %v", len(got), err)
	}
	want := result{in: int64(len(question)), out: int64(len(answer))}
	if r := <-done; r != want {
		t.Errorf("spliced %+v, want %+v", r, want)
	}
}

func TestSplice_AFrozenSideDoesNotKeepItForEver(t *testing.T) {
	t.Parallel()
	coordinator, buildkitd, done := spliced(t, 50*time.Millisecond)
	coordinator.Close()
	// buildkitd neither reads nor closes.
	select {
	case r := <-done:
		if r.err == nil {
			t.Error("an end by force is reported as an orderly one")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("still spliced")
	}
	wantClosed(t, buildkitd)
}

func TestSplice_ABrokenSideEndsTheOther(t *testing.T) {
	t.Parallel()
	coordinator, buildkitd, done := spliced(t, time.Minute)
	if err := coordinator.(*net.TCPConn).SetLinger(0); err != nil { // Close resets
		t.Fatal(err)
	}
	coordinator.Close()
	if r := <-done; r.err == nil {
		t.Error("a reset is reported as an orderly end")
	}
	wantClosed(t, buildkitd)
}

func TestSplice_ClosingFromOutsideEndsIt(t *testing.T) {
	t.Parallel()
	_, a := pair(t, "tcp")
	b, _ := pair(t, "unix")
	done := make(chan error, 1)
	go func() { done <- Splice(a, b) }()
	a.Close()
	select {
	case err := <-done:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("ended with %v, want %v", err, net.ErrClosed)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("still spliced")
	}
}
