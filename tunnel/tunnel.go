// Package tunnel carries the connections that a worker's agent dials back to
// the coordinator's gRPC port, one for every connection to the worker's
// BuildKit that the coordinator asked for.
//
// One TCP connection each, rather than streams of one multiplexed connection:
// the kernel does the flow control, so the bulk data of one attempt cannot
// stall another's, and both ends can splice(2). docs/tunnel.md has the
// measurement.
//
// A tunnel begins with one line that the agent writes,
//
//	ARCHFARM-TUNNEL/1 <connection id>\n
//
// and carries raw bytes from then on. HTTP/2 begins with "PRI * HTTP/2.0", so
// that one port serves both: see Listener.
package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/archfarm/archfarm/address"
)

const (
	// preamble is followed by the connection id and a newline. A change of what
	// follows the line is a new number.
	preamble = "ARCHFARM-TUNNEL/1 "
	// maxID is the longest connection id in bytes.
	maxID = 64
)

// ErrInvalidID tells that a connection id is not of the form that ValidID
// demands.
var ErrInvalidID = errors.New("a connection id is 1 to 64 of A-Z, a-z, 0-9, _ and -")

// ValidID tells whether id may name a tunnel: 1 to 64 bytes of A-Z, a-z, 0-9,
// "_" and "-". That it is unguessable is up to whoever makes it.
func ValidID(id string) bool {
	return len(id) >= 1 && len(id) <= maxID && strings.IndexFunc(id, notInID) < 0
}

func notInID(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		return false
	default:
		return r != '_' && r != '-'
	}
}

// Dialer connects to an address.
type Dialer func(ctx context.Context, addr address.Address) (net.Conn, error)

// Plain is the Dialer that secures nothing.
func Plain(ctx context.Context, addr address.Address) (net.Conn, error) { return addr.Dial(ctx) }

// Dial connects to a Listener at addr and names the connection id. ctx bounds
// the dialing and the writing of the preamble, not the life of the connection.
//
// Nobody answers a preamble: a listener that does not know the id closes the
// connection, which the first read then tells.
//
// The dialer makes the connection, secured as the listener wants it.
func Dial(ctx context.Context, dial Dialer, addr address.Address, id string) (net.Conn, error) {
	if !ValidID(id) {
		return nil, ErrInvalidID
	}
	conn, err := dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	if err := writePreamble(ctx, conn, id); err != nil {
		return nil, errors.Join(fmt.Errorf("opening a tunnel to %s: %w", addr, err), conn.Close())
	}
	return conn, nil
}

func writePreamble(ctx context.Context, conn net.Conn, id string) error {
	// A write cannot block here, unless conn is not what the kernel gave (TLS).
	if t, ok := ctx.Deadline(); ok {
		if err := conn.SetWriteDeadline(t); err != nil {
			return err
		}
	}
	if _, err := conn.Write([]byte(preamble + id + "\n")); err != nil {
		return err
	}
	return conn.SetWriteDeadline(noDeadline)
}
