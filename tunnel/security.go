package tunnel

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"time"
)

const (
	// handshake is the first byte of a TLS connection: the content type of its
	// first record (RFC 8446, section 5.1). Neither HTTP/2 nor a tunnel begins so.
	handshake = 0x16
	// farewellWithin and farewellBytes bound the reading of what a client goes on
	// saying that has been refused.
	farewellWithin = time.Second
	farewellBytes  = 64 << 10
)

var errPlaintext = errors.New("it does not use TLS")

// Security says how a listener's connections have to be secured. The zero value
// takes plaintext only.
type Security struct {
	// TLS makes the server's side of a connection whose client begins a TLS
	// handshake; nil: such a client is no client. It has until the connection's
	// read deadline.
	TLS func(net.Conn) (net.Conn, error)
	// Required has clients refused that do not begin one. Advice is what they are
	// told, in the words of HTTP/2.
	Required bool
	Advice   string
}

// introduce secures the connection and reads its beginning, see peek.
func (l *Listener) introduce(raw net.Conn) (conn net.Conn, id string, head []byte, err error) {
	if err := raw.SetReadDeadline(time.Now().Add(l.within)); err != nil {
		return nil, "", nil, err
	}
	first, err := readByte(raw)
	if err != nil {
		return nil, "", nil, err
	}
	begun := &replayed{Conn: raw, head: []byte{first}}
	switch {
	case first == handshake && l.security.TLS != nil:
		if conn, err = l.security.TLS(begun); err != nil {
			Farewell(raw) // it has been sent an alert
			return nil, "", nil, err
		}
		id, head, err = l.peek(conn)
		return conn, id, head, err
	case l.security.Required:
		l.advise(raw)
		return nil, "", nil, errPlaintext
	}
	id, head, err = l.peek(begun)
	return raw, id, head, err
}

// advise tells a client in plaintext, which most likely speaks HTTP/2, what is
// wanted, so that people read that instead of "connection closed": an empty
// SETTINGS frame, then GOAWAY with the code INADEQUATE_SECURITY (RFC 9113,
// sections 6.5, 6.8 and 7).
func (l *Listener) advise(conn net.Conn) {
	const settings, goaway, inadequateSecurity = 4, 7, 0xc
	const allStreams = 1<<31 - 1 // so that no call is tried again, and each fails with these words
	debug := l.security.Advice
	frames := []byte{0, 0, 0, settings, 0, 0, 0, 0, 0}
	frames = append(frames, 0, byte((8+len(debug))>>8), byte(8+len(debug)), goaway, 0, 0, 0, 0, 0)
	frames = binary.BigEndian.AppendUint32(frames, allStreams)
	frames = binary.BigEndian.AppendUint32(frames, inadequateSecurity)
	frames = append(frames, debug...)
	if _, err := conn.Write(frames); err != nil {
		return
	}
	Farewell(conn)
}

// Farewell lets a client read why it was refused, for a second at most: with bytes of
// the client unread, closing would reset the connection, and the client might not read
// what it was told. Whoever calls it closes the connection then.
func Farewell(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); !ok || half.CloseWrite() != nil {
		return
	}
	if conn.SetReadDeadline(time.Now().Add(farewellWithin)) == nil {
		_, _ = io.CopyN(io.Discard, conn, farewellBytes)
	}
}
