// Package endpoint is the coordinator's BuildKit door: the services that a
// buildkitd serves (Control, LLBBridge, Content), spoken to unmodified clients.
package endpoint

import (
	"context"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/history"
)

const (
	// How long a buildkitd waits for a build that a client refers to before it
	// has started it (control/gateway, solver/jobs.go).
	gatewayPatience = 3 * time.Second
	statusPatience  = 6 * time.Second
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
	History *history.History

	facts facts
}

// Solve runs a build.
func (c *Control) Solve(ctx context.Context, req *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	return c.Solver.Solve(ctx, req)
}

// Session keeps a client's session for as long as the stream lasts.
func (c *Control) Session(stream controlapi.Control_SessionServer) error {
	return c.Farm.Sessions.Handle(stream)
}
