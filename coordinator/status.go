package coordinator

import (
	"context"

	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// asStatus makes an error what BuildKit's clients expect. A status that a worker
// returned passes untouched: its details carry the lines of the Dockerfile.
func asStatus(ctx context.Context, err error) error {
	if own, ok := err.(interface{ GRPCStatus() *status.Status }); ok { // not errors.As: of a wrapped one, the text around it would be lost
		return own.GRPCStatus().Err()
	}
	return grpcerrors.ToGRPC(ctx, err)
}

func unaryStatus(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	resp, err := handler(ctx, req)
	return resp, asStatus(ctx, err)
}

func streamStatus(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	return asStatus(stream.Context(), handler(srv, stream))
}
