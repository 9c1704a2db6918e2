// Package access tells who is at the other end of each connection to the
// coordinator, and which calls that lets them make. What they see within a call
// is the call's own matter (identity.FromContext).
package access

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"sync"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/tunnel"
)

// Advice is what a client in plaintext, or without a certificate, is told.
const Advice = "this farm wants TLS with a client's certificate: run archfarm client-cert --token TOKEN, and create the builder as it says"

// Authority knows the farm's certificates.
type Authority interface {
	// ServerTLS is the coordinator's side. Clients without a certificate get
	// through, those with a bad one do not.
	ServerTLS() *tls.Config
	// Check tells whom a certificate, verified when its connection began, stands
	// for; an error when it has expired or been revoked since.
	Check(*x509.Certificate) (identity.Identity, error)
}

// Door secures connections and remembers whose they are.
type Door struct {
	// AdminSocket is the path of the Unix socket whose clients may administer; other
	// sockets are for building. Set it before the first connection.
	AdminSocket string

	authority Authority
	config    *tls.Config
	log       *slog.Logger

	mu   sync.Mutex
	open map[*Conn]struct{}
}

// NewDoor returns a door whose certificates the authority knows.
func NewDoor(authority Authority, log *slog.Logger) *Door {
	return &Door{authority: authority, config: authority.ServerTLS(), log: log, open: map[*Conn]struct{}{}}
}

// Security is what connections to an address need: none through a Unix socket,
// TLS if they come from elsewhere, and what the client prefers on this machine,
// or where insecure.
func (d *Door) Security(a address.Address, insecure bool) tunnel.Security {
	if a.Network == "unix" {
		return tunnel.Security{}
	}
	return tunnel.Security{TLS: d.secure, Required: !a.Local() && !insecure, Advice: Advice}
}

// Conn is a connection in TLS.
type Conn struct {
	*tls.Conn
	door *Door
	cert *x509.Certificate // the client's, nil for none
	id   identity.Identity // as of the handshake
}

// Identity tells whose the connection is.
func (c *Conn) Identity() identity.Identity { return c.id }

// Close ends the connection.
func (c *Conn) Close() error {
	c.door.mu.Lock()
	delete(c.door.open, c)
	c.door.mu.Unlock()
	return c.Conn.Close()
}

// secure makes the server's side of a gRPC connection.
func (d *Door) secure(raw net.Conn) (net.Conn, error) {
	conn, err := d.secureWith(raw, d.config)
	if err != nil {
		return nil, err // not a nil *Conn
	}
	return conn, nil
}

func (d *Door) secureWith(raw net.Conn, config *tls.Config) (*Conn, error) {
	over := tls.Server(raw, config)
	if err := over.Handshake(); err != nil {
		d.log.Info("refused a connection", "remote", raw.RemoteAddr().String(), "error", err)
		return nil, err
	}
	conn := &Conn{Conn: over, door: d, id: identity.Identity{Kind: identity.Anonymous}}
	if certs := over.ConnectionState().PeerCertificates; len(certs) > 0 {
		conn.cert = certs[0]
	}
	d.mu.Lock()
	d.open[conn] = struct{}{}
	d.mu.Unlock()
	// Asked after it can be evicted: a revocation in between is missed by neither.
	if conn.cert != nil {
		who, err := d.authority.Check(conn.cert)
		if err != nil {
			return nil, joinClose(conn, err)
		}
		conn.identify(who)
	}
	return conn, nil
}

func joinClose(conn *Conn, err error) error {
	_ = conn.Close() // says less than err
	return err
}

func (c *Conn) identify(who identity.Identity) {
	c.door.mu.Lock()
	defer c.door.mu.Unlock()
	c.id = who
}

// Evict ends every connection of somebody whose certificates have been revoked.
func (d *Door) Evict(who identity.Identity) {
	d.mu.Lock()
	var theirs []*Conn
	for c := range d.open {
		if c.id.Kind == who.Kind && c.id.Name == who.Name {
			theirs = append(theirs, c)
		}
	}
	d.mu.Unlock()
	for _, c := range theirs {
		_ = c.NetConn().Close() // at once: what it still has to say does not count
	}
	d.log.Warn("ended the connections of a revoked certificate", "identity", who.String(), "connections", len(theirs))
}
