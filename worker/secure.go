package worker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"github.com/archfarm/archfarm/address"
)

// Credentials secure the connections to coordinators.
type Credentials interface {
	// TLS returns the client's side: it presents the worker's certificate, whatever
	// that is by then, and verifies that the other end is a coordinator.
	TLS() *tls.Config
}

// errPlaintext is why a coordinator is not dialed.
var errPlaintext = errors.New("the worker has no certificate, and would speak in plaintext over the network: join with --token (archfarm token create --worker makes one), or allow it with --insecure")

// dial connects to a coordinator: with TLS if the worker has a certificate, and
// in plaintext over what does not leave the machine.
func (a *agent) dial(ctx context.Context, addr address.Address) (net.Conn, error) {
	secure := a.cfg.Credentials != nil && addr.Network == "tcp"
	if !secure && !addr.Local() && !a.cfg.Insecure {
		return nil, fmt.Errorf("dialing %s: %w", addr, errPlaintext)
	}
	conn, err := addr.Dial(ctx)
	if err != nil || !secure {
		return conn, err
	}
	over := tls.Client(conn, a.cfg.Credentials.TLS())
	if err := over.HandshakeContext(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("securing the connection to %s: %w", addr, err), conn.Close())
	}
	return over, nil
}
