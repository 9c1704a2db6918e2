package access

import (
	"context"
	"encoding/json"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/identity"
)

const (
	// insideIdentity carries the identity of a call that comes from inside. On other
	// connections it means nothing.
	insideIdentity = "archfarm-identity"
	// insideBuffer is what a connection allocates, each way, for what has not been read: as much as gRPC writes at a time.
	// Every leg of a job that runs or waits has a connection.
	insideBuffer = 32 << 10
)

// Inside is how the coordinator calls its own services: on behalf of somebody,
// whom the context of the call names (identity.NewContext). Only this process can
// connect to it.
type Inside struct {
	*bufconn.Listener
}

// NewInside returns the listener, to be served like others.
func NewInside() *Inside { return &Inside{bufconn.Listen(insideBuffer)} }

type insideConn struct{ net.Conn }

// Accept implements net.Listener.
func (i *Inside) Accept() (net.Conn, error) {
	conn, err := i.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return insideConn{conn}, nil
}

// Dial connects.
func (i *Inside) Dial(ctx context.Context) (net.Conn, error) { return i.DialContext(ctx) }

// Client returns a connection that lasts until it is closed.
func (i *Inside) Client() (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///inside", append(DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return i.Dial(ctx) }))...)
}

// DialOptions make calls carry the identity that their contexts name. A call whose
// context names none is not made.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			ctx, err := onBehalf(ctx, method)
			if err != nil {
				return err
			}
			return invoke(ctx, method, req, reply, conn, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			ctx, err := onBehalf(ctx, method)
			if err != nil {
				return nil, err
			}
			return open(ctx, desc, conn, method, opts...)
		}),
	}
}

func onBehalf(ctx context.Context, method string) (context.Context, error) {
	who, ok := identity.Lookup(ctx)
	if !ok {
		return nil, status.Errorf(codes.Internal, "%s: on whose behalf is not known", method)
	}
	raw, err := json.Marshal(who)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "%s: %v", method, err)
	}
	return metadata.AppendToOutgoingContext(ctx, insideIdentity, string(raw)), nil
}

// behalf reads on whose behalf a call from inside is.
func behalf(ctx context.Context, method string) (who identity.Identity, err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	values := md.Get(insideIdentity)
	if len(values) != 1 {
		return who, status.Errorf(codes.Internal, "%s: called from inside by %d identities, not one", method, len(values))
	}
	if err := json.Unmarshal([]byte(values[0]), &who); err != nil {
		return who, status.Errorf(codes.Internal, "%s: reading the identity of a call from inside: %v", method, err)
	}
	return who, nil
}
