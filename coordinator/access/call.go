package access

import (
	"context"
	"crypto/x509"
	"net"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
)

// Credentials are those that are given, for connections that come secured from
// the door's listeners, and know whose they are.
func (d *Door) Credentials(of credentials.TransportCredentials) credentials.TransportCredentials {
	return transport{of, d}
}

type transport struct {
	credentials.TransportCredentials
	door *Door
}

// Info is what is known of a call's connection.
type Info struct {
	credentials.AuthInfo
	cert   *x509.Certificate
	id     identity.Identity
	inside bool // each call says on whose behalf it is
}

// Certificate is the caller's; nil for none.
func (i Info) Certificate() *x509.Certificate { return i.cert }

// Unwrap returns what the inner credentials know.
func (i Info) Unwrap() credentials.AuthInfo { return i.AuthInfo }

// ServerHandshake implements credentials.TransportCredentials.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, inner, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	local := raw.LocalAddr()
	info := Info{AuthInfo: inner, id: identity.Identity{Socket: local.Network() == "unix" && local.String() == t.door.AdminSocket}}
	if over, ok := secured(raw); ok {
		info.cert, info.id = over.cert, over.id
	}
	_, info.inside = raw.(insideConn)
	return conn, info, nil
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials {
	return transport{t.TransportCredentials.Clone(), t.door}
}

// secured finds the TLS connection beneath what a listener has put around it.
func secured(conn net.Conn) (*Conn, bool) {
	for {
		if over, ok := conn.(*Conn); ok {
			return over, true
		}
		around, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			return nil, false
		}
		conn = around.NetConn()
	}
}

// Caller tells in the context that it returns who makes a call, if they may.
func (d *Door) Caller(ctx context.Context, method string) (context.Context, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Errorf(codes.Internal, "%s: the caller's connection is not known", method)
	}
	info, ok := p.AuthInfo.(Info)
	if !ok {
		return nil, status.Errorf(codes.Internal, "%s: the caller's connection came through no door", method)
	}
	who, err := d.identify(ctx, info, method)
	if err != nil {
		return nil, err
	}
	if err := allowed(who, method); err != nil {
		d.log.Info("refused a call", "method", method, "identity", who.String(), "remote", p.Addr.String())
		return nil, err
	}
	return identity.NewContext(ctx, who), nil
}

func (d *Door) identify(ctx context.Context, info Info, method string) (identity.Identity, error) {
	switch {
	case info.inside:
		return behalf(ctx, method)
	case info.cert != nil:
		who, err := d.authority.Check(info.cert)
		if err != nil {
			return who, status.Errorf(codes.Unauthenticated, "%s: %v", method, err)
		}
		return who, nil
	}
	return info.id, nil
}

// allowed says who may make which calls.
func allowed(who identity.Identity, method string) error {
	service, _, _ := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	var ok bool
	switch {
	case method == "/archfarm.v1.AuthorityService/Join", service == "grpc.health.v1.Health":
		ok = true
	case who.Kind == identity.Anonymous:
		return status.Errorf(codes.Unauthenticated, "%s: %s", method, Advice)
	case method == "/archfarm.v1.AuthorityService/Renew":
		ok = who.Kind == identity.Worker || who.Kind == identity.Client || who.Kind == identity.Admin
	case service == "archfarm.v1.AuthorityService":
		ok = who.Administers()
		if !ok {
			return status.Errorf(codes.PermissionDenied,
				"%s: %s may not manage certificates: use the coordinator's socket, admin.sock in its data folder, or an administrator's certificate", method, who)
		}
	case service == "archfarm.v1.AgentService":
		ok = who.Kind == identity.Worker || who.Kind == identity.Local
	default: // BuildKit's API, FleetService, JobService and what belongs to it
		ok = who.Builds()
	}
	if !ok {
		return status.Errorf(codes.PermissionDenied, "%s: %s may not do that", method, who)
	}
	return nil
}

// Unary is an interceptor that refuses callers, or makes them known.
func (d *Door) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, err := d.Caller(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// Stream is Unary for streams.
func (d *Door) Stream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, err := d.Caller(s.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	return handler(srv, stream{s, ctx})
}

// stream is a stream whose context says who is calling.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s stream) Context() context.Context { return s.ctx }
