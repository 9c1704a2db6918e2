package session

import (
	"net"
	"sync/atomic"
)

// silentConn writes nothing any more once the other side has ended, when HTTP/2
// would still say GOAWAY.
//
// A client that closes its session gathers what is still arriving, but with each
// message the rest of the buffer that held it (BuildKit session/grpchijack/dial.go,
// conn.Close). To its HTTP/2 server that is a protocol error, after which the server,
// and with it the whole client, waits for a second (golang.org/x/net/http2, goAwayTimeout).
type silentConn struct {
	net.Conn
	ended atomic.Bool
}

func (c *silentConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.ended.Store(true)
	}
	return n, err
}

func (c *silentConn) Write(b []byte) (int, error) {
	if c.ended.Load() {
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}
