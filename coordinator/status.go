package coordinator

import (
	"context"
	"runtime/debug"

	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
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

func (c *coordinator) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	defer c.survive(info.FullMethod, &err)
	resp, err = handler(ctx, req)
	return resp, asStatus(ctx, err)
}

func (c *coordinator) stream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	defer c.survive(info.FullMethod, &err)
	return asStatus(stream.Context(), handler(srv, stream))
}

// survive answers a call that panicked: what is wrong with one build must not
// end the others.
func (c *coordinator) survive(method string, err *error) {
	if cause := recover(); cause != nil {
		c.log.Error("a call panicked", "method", method, "cause", cause, "stack", string(debug.Stack()))
		*err = status.Errorf(codes.Internal, "%s: internal error of the coordinator, see its log", method)
	}
}
