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

// notifyingConn tells when the server has closed it, and takes no writes any more
// once that has begun: a message after the end of the stream's sending cancels the
// stream (grpc, clientStream.SendMsg), and its end would no longer tell that the
// worker has forgotten the session.
type notifyingConn struct {
	net.Conn
	closed func()

	writing sync.Mutex
	closing bool
}

func (c *notifyingConn) Write(b []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	if c.closing {
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

func (c *notifyingConn) Close() error {
	defer c.closed()
	c.writing.Lock()
	c.closing = true
	c.writing.Unlock()
	return c.Conn.Close()
}

func bufferSlice(b []byte) mem.BufferSlice { return mem.BufferSlice{mem.SliceBuffer(b)} }
