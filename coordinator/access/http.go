package access

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/tunnel"
)

// handshake is the first byte of a TLS connection: the content type of its first
// record (RFC 8446, section 5.1). No HTTP request begins so.
const handshake = 0x16

// HTTP secures the connections of an HTTP server: who begins a TLS handshake gets
// TLS, others stay in plaintext. Those in plaintext are Local if only this machine
// reaches the address, or where insecure, and Anonymous elsewhere.
//
// The server needs ConnContext, HTTPProtocols, and a ReadHeaderTimeout, within which
// the handshake must end; Identified then tells its handlers who is calling.
func (d *Door) HTTP(l net.Listener, a address.Address, insecure bool) net.Listener {
	config := d.config.Clone()
	config.NextProtos = []string{"h2", "http/1.1"}
	plain := identity.Identity{Kind: identity.Anonymous}
	if a.Local() || insecure {
		plain = identity.Identity{}
	}
	return &httpListener{Listener: l, door: d, config: config, plain: plain}
}

// HTTPProtocols are HTTP/1.1 and HTTP/2. The latter counts as unencrypted, as the
// server knows nothing of the TLS beneath.
func HTTPProtocols() *http.Protocols {
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	return &p
}

type httpListener struct {
	net.Listener
	door   *Door
	config *tls.Config
	plain  identity.Identity
}

// Accept implements net.Listener. What the connection is, is found out when it is
// first read, in its own goroutine of the server.
func (l *httpListener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &httpConn{Conn: raw, listener: l}, nil
}

// httpConn is a connection of an HTTP server, in TLS or not.
type httpConn struct {
	net.Conn // raw; deadlines are the same for TLS
	listener *httpListener

	begin  sync.Once
	err    error                // why it did not begin
	head   []byte               // read from a connection in plaintext, and not yet passed on
	secure atomic.Pointer[Conn] // nil for plaintext
}

func (c *httpConn) introduce() {
	head := make([]byte, 1)
	if _, c.err = c.Conn.Read(head); c.err != nil {
		return
	}
	if head[0] != handshake {
		c.head = head
		return
	}
	over, err := c.listener.door.secureWith(&begun{Conn: c.Conn, head: head}, c.listener.config)
	if err != nil {
		tunnel.Farewell(c.Conn)
		c.err = err
		return
	}
	c.secure.Store(over)
}

// Read implements net.Conn.
func (c *httpConn) Read(p []byte) (int, error) {
	c.begin.Do(c.introduce)
	if c.err != nil {
		return 0, c.err
	}
	if over := c.secure.Load(); over != nil {
		return over.Read(p)
	}
	if len(c.head) > 0 && len(p) > 0 {
		p[0], c.head = c.head[0], nil
		return 1, nil
	}
	return c.Conn.Read(p)
}

var errNotBegun = errors.New("the connection has not begun")

// Write implements net.Conn. An HTTP server never speaks first, but it would answer
// a handshake that failed, in plaintext.
func (c *httpConn) Write(p []byte) (int, error) {
	c.begin.Do(func() { c.err = errNotBegun })
	if c.err != nil {
		return 0, c.err
	}
	if over := c.secure.Load(); over != nil {
		return over.Write(p)
	}
	return c.Conn.Write(p)
}

// Close implements net.Conn. The server closes it at its end even if it has been
// closed during the handshake, so that none stays among the door's.
func (c *httpConn) Close() error {
	if over := c.secure.Load(); over != nil {
		return over.Close()
	}
	return c.Conn.Close()
}

// begun is a connection whose first byte has been read.
type begun struct {
	net.Conn
	head []byte
}

// Read implements net.Conn.
func (b *begun) Read(p []byte) (int, error) {
	if len(b.head) > 0 {
		n := copy(p, b.head)
		b.head = b.head[n:]
		return n, nil
	}
	return b.Conn.Read(p)
}

type connKey struct{}

// ConnContext is for http.Server.ConnContext.
func (*Door) ConnContext(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, c)
}

// Identified tells a handler who calls it (identity.FromContext), and sets the
// request's TLS. It answers 401 to those whom nobody knows, or whose certificate has
// expired or been revoked since their connection began. What the others may do is
// for gRPC's interceptors to decide, with which the handler makes its calls.
func (d *Door) Identified(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, ok := r.Context().Value(connKey{}).(*httpConn)
		if !ok {
			http.Error(w, "the caller's connection came through no door", http.StatusInternalServerError)
			return
		}
		who, over := c.listener.plain, c.secure.Load()
		if over != nil {
			who = identity.Identity{Kind: identity.Anonymous}
			if over.cert != nil {
				var err error
				if who, err = d.authority.Check(over.cert); err != nil {
					unauthenticated(w, err.Error())
					return
				}
			}
		}
		if who.Kind == identity.Anonymous {
			d.log.Info("refused a request", "method", r.Method, "identity", who.String(), "remote", r.RemoteAddr)
			unauthenticated(w, HTTPAdvice)
			return
		}
		r = r.WithContext(identity.NewContext(r.Context(), who))
		if over != nil {
			state := over.ConnectionState()
			r.TLS = &state
		}
		next.ServeHTTP(w, r)
	})
}

// HTTPAdvice is what an HTTP client in plaintext, or without a certificate, is told.
const HTTPAdvice = "this farm wants https with a client's certificate: run archfarm client-cert --token TOKEN --dir DIR," +
	" then curl --cacert DIR/ca.pem --cert DIR/cert.pem --key DIR/key.pem"

// unauthenticated answers with a google.rpc.Status, as the API's errors are.
func unauthenticated(w http.ResponseWriter, message string) {
	body, err := json.Marshal(map[string]any{"code": codes.Unauthenticated, "message": message, "details": []any{}})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusUnauthorized)
	_, _ = w.Write(append(body, '\n')) // whoever does not read it has gone
}
