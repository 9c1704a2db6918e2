package session

import (
	"bytes"
	"errors"
	"io"
	"net"
	"testing"
)

// halfConn is a connection whose other side sends in and then ends, but could still receive.
type halfConn struct {
	net.Conn
	in  io.Reader
	out bytes.Buffer
}

func (c *halfConn) Read(b []byte) (int, error)  { return c.in.Read(b) }
func (c *halfConn) Write(b []byte) (int, error) { return c.out.Write(b) }

func TestSilentConn_WritesNothingOnceTheOtherSideHasEnded(t *testing.T) {
	t.Parallel()
	inner := &halfConn{in: bytes.NewReader([]byte("in"))}
	conn := &silentConn{Conn: inner}
	buf := make([]byte, 8)
	if n, err := conn.Read(buf); string(buf[:n]) != "in" || err != nil {
		t.Fatalf("read %q, %v", buf[:n], err)
	}
	if _, err := conn.Write([]byte("before")); err != nil {
		t.Errorf("writing while the other side is there: %v", err)
	}
	if _, err := conn.Read(buf); !errors.Is(err, io.EOF) {
		t.Fatalf("the end is told as %v", err)
	}
	if _, err := conn.Write([]byte("after")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("writing after the end: %v, want %v", err, net.ErrClosed)
	}
	if got := inner.out.String(); got != "before" {
		t.Errorf("the other side was sent %q", got)
	}
}
