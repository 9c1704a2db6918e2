// Package endpoint is the coordinator's BuildKit door: the services that a
// buildkitd serves (Control, LLBBridge, Content), spoken to unmodified clients.
package endpoint

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
)

const (
	// How long a buildkitd waits for a build that a client refers to before it
	// has started it (control/gateway, solver/jobs.go).
	gatewayPatience = 3 * time.Second
	statusPatience  = 6 * time.Second

	buildkitPackage = "github.com/moby/buildkit"
)

// Solver runs a build from its request to its answer.
type Solver interface {
	Solve(ctx context.Context, req *controlapi.SolveRequest) (*controlapi.SolveResponse, error)
}

// Control serves moby.buildkit.v1.Control.
type Control struct {
	controlapi.UnimplementedControlServer

	Solver  Solver
	Builds  *dispatch.Builds
	Farm    *dispatch.Farm
	History *History
}

// Solve runs a build.
func (c *Control) Solve(ctx context.Context, req *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	return c.Solver.Solve(ctx, req)
}

// Status streams a build's progress until the build has ended.
func (c *Control) Status(req *controlapi.StatusRequest, stream controlapi.Control_StatusServer) error {
	if err := sendTimestamp(stream); err != nil {
		return err
	}
	b, err := c.Builds.Find(stream.Context(), req.GetRef(), statusPatience)
	if err != nil {
		return err
	}
	return b.Progress.Follow(stream.Context(), stream.Send)
}

// Session keeps a client's session for as long as the stream lasts.
func (c *Control) Session(stream controlapi.Control_SessionServer) error {
	return c.Farm.Sessions.Handle(stream)
}

// ListWorkers describes every worker of the farm as a BuildKit worker. A farm
// without workers shows itself as one, so that clients let builds queue.
func (c *Control) ListWorkers(context.Context, *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	response := &controlapi.ListWorkersResponse{}
	for _, w := range c.Farm.Fleet.Workers() {
		response.Record = append(response.Record, &apitypes.WorkerRecord{
			ID: w.Name, Platforms: pb.PlatformsFromSpec(w.Platforms),
			Labels:          map[string]string{"archfarm.worker": w.Name, "archfarm.machine": w.Machine},
			BuildkitVersion: &apitypes.BuildkitVersion{Package: buildkitPackage, Version: w.BuildKitVersion},
		})
	}
	if len(response.Record) == 0 {
		response.Record = []*apitypes.WorkerRecord{{
			ID: "archfarm", Platforms: pb.PlatformsFromSpec([]ocispecs.Platform{platforms.Normalize(c.Farm.DefaultPlatform())}),
			BuildkitVersion: version(),
		}}
	}
	return response, nil
}

// Info tells the version of BuildKit's API that the coordinator speaks.
func (c *Control) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: version()}, nil
}

// version is that of the BuildKit module in this binary.
func version() *apitypes.BuildkitVersion {
	v := &apitypes.BuildkitVersion{Package: buildkitPackage, Version: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, module := range info.Deps {
		if module.Path == buildkitPackage {
			v.Version = module.Version
		}
	}
	return v
}

// ListenBuildHistory streams records of builds.
func (c *Control) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	if err := sendTimestamp(stream); err != nil {
		return err
	}
	return c.History.Listen(stream.Context(), req, stream.Send)
}

// UpdateBuildHistory is not offered yet: records go by themselves.
func (c *Control) UpdateBuildHistory(context.Context, *controlapi.UpdateBuildHistoryRequest) (*controlapi.UpdateBuildHistoryResponse, error) {
	return nil, status.Error(codes.Unimplemented, "changing the build history is not possible with this version of archfarm")
}

// sendTimestamp tells the coordinator's clock, which clients correct theirs by.
func sendTimestamp(stream grpc.ServerStream) error {
	return stream.SendHeader(metadata.Pairs("buildkit-timestamp", time.Now().Format(time.RFC3339Nano)))
}
