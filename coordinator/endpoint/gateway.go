package endpoint

import (
	"context"

	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client/buildid"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
)

// Gateway serves moby.buildkit.v1.frontend.LLBBridge: the frontend's side of a
// build, which runs on the client. Every call names its build in its metadata.
type Gateway struct {
	gwpb.UnimplementedLLBBridgeServer

	Builds  *dispatch.Builds
	Control *Control
}

func (g *Gateway) build(ctx context.Context) (*dispatch.Build, error) {
	id := buildid.FromIncomingContext(ctx)
	if id == "" {
		return nil, status.Error(codes.InvalidArgument, "no buildid found in context")
	}
	return g.Builds.Find(ctx, id, gatewayPatience)
}

// on finds the call's build and runs the call on it.
func on[Req, Resp any](ctx context.Context, g *Gateway, f func(*dispatch.Build, context.Context, Req) (Resp, error), req Req) (Resp, error) {
	b, err := g.build(ctx)
	if err != nil {
		var none Resp
		return none, err
	}
	return f(b, ctx, req)
}

// Ping tells what the gateway can do, without a worker.
func (g *Gateway) Ping(ctx context.Context, _ *gwpb.PingRequest) (*gwpb.PongResponse, error) {
	if _, err := g.build(ctx); err != nil {
		return nil, err
	}
	workers, err := g.Control.ListWorkers(ctx, nil)
	if err != nil {
		return nil, err
	}
	pong := &gwpb.PongResponse{FrontendAPICaps: gwpb.Caps.All(), LLBCaps: pb.Caps.All()}
	for _, w := range workers.GetRecord() {
		pong.Workers = append(pong.Workers, &apitypes.WorkerRecord{ID: w.GetID(), Labels: w.GetLabels(), Platforms: w.GetPlatforms()})
	}
	return pong, nil
}

// Return ends the frontend's part of the build.
func (g *Gateway) Return(ctx context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	b, err := g.build(ctx)
	if err != nil {
		return nil, err
	}
	return &gwpb.ReturnResponse{}, b.Return(req)
}

// The other calls go to the worker that has what they are about.

// Solve implements LLBBridge.
func (g *Gateway) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	return on(ctx, g, (*dispatch.Build).Solve, req)
}

// ResolveImageConfig implements LLBBridge.
func (g *Gateway) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	return on(ctx, g, (*dispatch.Build).ResolveImageConfig, req)
}

// ResolveSourceMeta implements LLBBridge.
func (g *Gateway) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	return on(ctx, g, (*dispatch.Build).ResolveSourceMeta, req)
}

// ReadFile implements LLBBridge.
func (g *Gateway) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return on(ctx, g, (*dispatch.Build).ReadFile, req)
}

// ReadDir implements LLBBridge.
func (g *Gateway) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return on(ctx, g, (*dispatch.Build).ReadDir, req)
}

// StatFile implements LLBBridge.
func (g *Gateway) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return on(ctx, g, (*dispatch.Build).StatFile, req)
}

// Evaluate implements LLBBridge.
func (g *Gateway) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	return on(ctx, g, (*dispatch.Build).Evaluate, req)
}

// Inputs implements LLBBridge.
func (g *Gateway) Inputs(ctx context.Context, req *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return on(ctx, g, (*dispatch.Build).Inputs, req)
}

// Warn implements LLBBridge.
func (g *Gateway) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	return on(ctx, g, (*dispatch.Build).Warn, req)
}

// NewContainer implements LLBBridge.
func (g *Gateway) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	return on(ctx, g, (*dispatch.Build).NewContainer, req)
}

// ReleaseContainer implements LLBBridge.
func (g *Gateway) ReleaseContainer(ctx context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	return on(ctx, g, (*dispatch.Build).ReleaseContainer, req)
}

// ReadFileContainer implements LLBBridge.
func (g *Gateway) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return on(ctx, g, (*dispatch.Build).ReadFileContainer, req)
}

// ReadDirContainer implements LLBBridge.
func (g *Gateway) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return on(ctx, g, (*dispatch.Build).ReadDirContainer, req)
}

// StatFileContainer implements LLBBridge.
func (g *Gateway) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return on(ctx, g, (*dispatch.Build).StatFileContainer, req)
}

// ExecProcess implements LLBBridge.
func (g *Gateway) ExecProcess(stream gwpb.LLBBridge_ExecProcessServer) error {
	b, err := g.build(stream.Context())
	if err != nil {
		return err
	}
	return b.ExecProcess(stream)
}
