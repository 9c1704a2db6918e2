package session

import (
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/mem"
)

var errListenerDone = errors.New("the connection ended")

// singleListener hands out one connection and then blocks until that ends, so
// that a gRPC server can be served on a connection that exists already.
type singleListener struct {
	conn   chan net.Conn
	done   chan struct{}
	finish func()
}

func newSingleListener(conn net.Conn) *singleListener {
	l := &singleListener{conn: make(chan net.Conn, 1), done: make(chan struct{})}
	l.finish = sync.OnceFunc(func() { close(l.done) })
	l.conn <- &notifyingConn{Conn: conn, closed: l.finish}
	return l
}

func (l *singleListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conn:
		return conn, nil
	default:
	}
	<-l.done
	return nil, errListenerDone
}

func (l *singleListener) Close() error {
	l.finish()
	return nil
}

func (l *singleListener) Addr() net.Addr { return &net.UnixAddr{Name: "session", Net: "unix"} }

// notifyingConn tells when the server has closed it.
type notifyingConn struct {
	net.Conn
	closed func()
}

func (c *notifyingConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}

func bufferSlice(b []byte) mem.BufferSlice { return mem.BufferSlice{mem.SliceBuffer(b)} }
