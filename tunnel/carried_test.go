package tunnel

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// callEnd is one end of a call in memory, as gRPC's: one message is under way at a time.
type callEnd struct {
	out, in chan []byte
	closed  *sync.Once    // of out
	over    chan struct{} // of the call
	end     *sync.Once
}

func (c callEnd) Send(data []byte) error {
	select {
	case c.out <- data:
		return nil
	case <-c.over:
		return io.EOF
	}
}

func (c callEnd) Receive() ([]byte, error) {
	select {
	case data, ok := <-c.in:
		if !ok {
			return nil, io.EOF
		}
		return data, nil
	case <-c.over:
		return nil, io.EOF
	}
}

func (c callEnd) CloseSend() error { c.closed.Do(func() { close(c.out) }); return nil }

func (c callEnd) End() { c.end.Do(func() { close(c.over) }) }

// calling returns the two ends of a connection over a call, and those of the call.
func calling(t *testing.T) (a, b *Carried, endA, endB callEnd) {
	t.Helper()
	there, back, over, end := make(chan []byte), make(chan []byte), make(chan struct{}), new(sync.Once)
	endA = callEnd{out: there, in: back, closed: new(sync.Once), over: over, end: end}
	endB = callEnd{out: back, in: there, closed: new(sync.Once), over: over, end: end}
	at := &net.UnixAddr{Net: "unix"}
	a, b = Over(endA, at, at), Over(endB, at, at)
	t.Cleanup(func() { _ = a.Close(); _ = b.Close() })
	return a, b, endA, endB
}

func TestCarried_CarriesWhatItIsGiven(t *testing.T) {
	t.Parallel()
	a, b, _, _ := calling(t)
	there, back := make([]byte, 3<<20+7), make([]byte, 1<<20+1)
	for _, data := range [][]byte{there, back} {
		_, _ = rand.NewChaCha8([32]byte{byte(len(data))}).Read(data) // never fails
	}
	var parts sync.WaitGroup
	write := func(c *Carried, data []byte) {
		parts.Go(func() {
			if n, err := c.Write(data); n != len(data) || err != nil {
				t.Errorf("wrote %d of %d: %v", n, len(data), err)
			}
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
		})
	}
	read := func(c *Carried, want []byte) {
		parts.Go(func() {
			if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want) {
				t.Errorf("read %d bytes of %d: %v", len(got), len(want), err)
			}
		})
	}
	write(a, there)
	write(b, back)
	read(b, there)
	read(a, back)
	parts.Wait()
}

func TestCarried_EmptyMessagesAreNoEnd(t *testing.T) {
	t.Parallel()
	a, _, _, endB := calling(t)
	go func() {
		for _, data := range [][]byte{{}, nil, []byte("x")} {
			_ = endB.Send(data)
		}
	}()
	got := make([]byte, 2)
	if n, err := a.Read(got); n != 1 || got[0] != 'x' || err != nil {
		t.Errorf("read %d, %v", n, err)
	}
}

// TestCarried_WhoWaitsHearsOfTheEnd closes either end, or lets a deadline pass, while somebody reads and somebody writes.
func TestCarried_WhoWaitsHearsOfTheEnd(t *testing.T) {
	t.Parallel()
	soon := func() time.Time { return time.Now().Add(20 * time.Millisecond) }
	for name, test := range map[string]struct {
		end         func(a, b *Carried)
		read, write error
	}{
		"closed here":    {func(a, _ *Carried) { _ = a.Close() }, net.ErrClosed, net.ErrClosed},
		"closed there":   {func(_, b *Carried) { _ = b.Close() }, io.EOF, io.ErrClosedPipe},
		"its own limit":  {func(a, _ *Carried) { _ = a.SetDeadline(soon()) }, os.ErrDeadlineExceeded, os.ErrDeadlineExceeded},
		"one that is up": {func(a, _ *Carried) { _ = a.SetDeadline(time.Now().Add(-time.Second)) }, os.ErrDeadlineExceeded, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b, _, _ := calling(t)
			reads, writes := make(chan error, 1), make(chan error, 1)
			go func() { _, err := a.Read(make([]byte, 1)); reads <- err }()
			go func() { // more than is taken by whoever does not read
				var err error
				for err == nil {
					_, err = a.Write(make([]byte, MaxChunk))
				}
				writes <- err
			}()
			test.end(a, b)
			if err := <-reads; !errors.Is(err, test.read) {
				t.Errorf("reading: %v, want %v", err, test.read)
			}
			if err := <-writes; !errors.Is(err, test.write) {
				t.Errorf("writing: %v, want %v", err, test.write)
			}
		})
	}
}

func TestCarried_AReadDeadlineThatPassedCanBeMoved(t *testing.T) {
	t.Parallel()
	a, b, _, _ := calling(t)
	if err := a.SetReadDeadline(time.Now().Add(-time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("after the deadline: %v", err)
	}
	if err := a.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = b.Write([]byte("x")) }()
	if n, err := a.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Errorf("without one: %d, %v", n, err)
	}
}
