package dispatch

import (
	"context"
	"slices"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// Solve runs a frontend request: on the leg that it is for, or split over the
// legs of the platforms that it lists, whose results become one.
func (b *Build) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	wanted, err := wantedLegs(req)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	for _, id := range localSessions(req.GetFrontendOpt()) {
		if !slices.Contains(b.extra, id) {
			b.extra = append(b.extra, id)
		}
	}
	b.mu.Unlock()
	legs, err := b.legsOf(ctx, wanted, split.Question(req.GetFrontendOpt()))
	if err != nil {
		return nil, err
	}
	if len(legs) == 1 {
		return b.solveOn(ctx, legs[0], req)
	}
	results := make([]*gwpb.Result, len(legs))
	group, groupCtx := errgroup.WithContext(ctx)
	for i, l := range legs {
		group.Go(func() error {
			own := cloneSolve(req)
			own.FrontendOpt = l.FrontendOpt(req.GetFrontendOpt())
			own.AllowResultReturn, own.AllowResultArrayRef = true, true
			resp, err := l.solve(groupCtx, own)
			results[i] = resp.GetResult()
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	parts := make([]split.Leg, len(legs))
	for i, l := range legs {
		parts[i] = l.Leg
	}
	merged, err := split.Merge(parts, results)
	if err != nil {
		return nil, err
	}
	return &gwpb.SolveResponse{Result: merged}, nil
}

// solveOn runs a request on one leg. When the build has others, the request's
// platforms are narrowed to the leg's.
func (b *Build) solveOn(ctx context.Context, l *leg, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	if listed := req.GetFrontendOpt()["platform"]; listed != "" && len(b.running()) > 1 {
		req = cloneSolve(req)
		req.FrontendOpt = l.FrontendOpt(req.GetFrontendOpt())
	}
	resp, err := l.solve(ctx, req)
	if err == nil && !req.GetAllowResultArrayRef() {
		withoutDefinitions(resp.GetResult())
	}
	return resp, err
}

// withoutDefinitions makes a result what clients get that do not ask for more.
func withoutDefinitions(result *gwpb.Result) {
	switch r := result.GetResult().(type) {
	case *gwpb.Result_Ref:
		result.Result = &gwpb.Result_RefDeprecated{RefDeprecated: r.Ref.GetId()}
	case *gwpb.Result_Refs:
		ids := map[string]string{}
		for key, ref := range r.Refs.GetRefs() {
			ids[key] = ref.GetId()
		}
		result.Result = &gwpb.Result_RefsDeprecated{RefsDeprecated: &gwpb.RefMapDeprecated{Refs: ids}}
	}
}

// wantedLegs reads from a frontend request which platforms it is for.
func wantedLegs(req *gwpb.SolveRequest) ([]split.Leg, error) {
	if req.GetFrontend() == "" && req.GetDefinition() != nil {
		leg, err := split.DefinitionLeg(req.GetDefinition())
		if err != nil {
			return nil, err
		}
		return []split.Leg{leg}, nil
	}
	return split.Legs(req.GetFrontendOpt())
}

// any returns a leg for a call that names none: that of the platform, where one
// is given, else the first. The build's legs are started if need be.
func (b *Build) any(ctx context.Context, platform *split.Leg) (*leg, error) {
	wanted := b.announced
	if platform != nil && slices.ContainsFunc(wanted, func(l split.Leg) bool { return l.String() == platform.String() }) {
		wanted = []split.Leg{*platform}
	}
	legs, err := b.legsOf(ctx, wanted, false)
	if err != nil {
		return nil, err
	}
	return legs[0], nil
}

// ResolveImageConfig asks the worker of the platform in question.
func (b *Build) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	l, err := b.any(ctx, split.PlatformLeg(req.GetPlatform()))
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ResolveImageConfig, req)
}

// ResolveSourceMeta asks the worker of the platform in question.
func (b *Build) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	l, err := b.any(ctx, split.PlatformLeg(req.GetPlatform()))
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ResolveSourceMeta, req)
}

// ReadFile reads from a result, on the worker that has it.
func (b *Build) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	l, err := b.owner(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ReadFile, req)
}

// ReadDir lists a directory of a result.
func (b *Build) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	l, err := b.owner(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ReadDir, req)
}

// StatFile describes a file of a result.
func (b *Build) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	l, err := b.owner(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.StatFile, req)
}

// Evaluate makes a result's steps run now.
func (b *Build) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	l, err := b.owner(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.Evaluate, req)
}

// Inputs returns the definitions that the client gave its frontend.
func (b *Build) Inputs(context.Context, *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return &gwpb.InputsResponse{Definitions: b.req.GetFrontendInputs()}, nil
}

// Warn adds a warning to the build's progress.
func (b *Build) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	l, err := b.any(ctx, nil)
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.Warn, req)
}

// NewContainer starts a container on the worker that has the results it mounts.
func (b *Build) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	l, err := b.containerLeg(ctx, req)
	if err != nil {
		return nil, err
	}
	if p := split.PlatformLeg(req.GetPlatform()); p != nil && !schedule.Runs(l.worker.Platforms, p.Platform) {
		return nil, l.refusal(split.Exec{Name: "container " + req.GetContainerID(), Platform: &p.Platform})
	}
	resp, err := call(ctx, l.attempt, l.attempt.gateway.NewContainer, req)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.containers[req.GetContainerID()] = l
	return resp, nil
}

func (b *Build) containerLeg(ctx context.Context, req *gwpb.NewContainerRequest) (*leg, error) {
	for _, mount := range req.GetMounts() {
		if mount.GetResultID() != "" {
			if l, err := b.owner(mount.GetResultID()); err == nil {
				return l, nil
			}
		}
	}
	return b.any(ctx, split.PlatformLeg(req.GetPlatform()))
}

func (b *Build) container(id string) (*leg, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l, ok := b.containers[id]; ok {
		return l, nil
	}
	return nil, status.Errorf(codes.NotFound, "container %s is not of this build", id)
}

// ReleaseContainer ends a container.
func (b *Build) ReleaseContainer(ctx context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	l, err := b.container(req.GetContainerID())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ReleaseContainer, req)
}

// ReadFileContainer reads a file of a running container.
func (b *Build) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	l, err := b.container(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ReadFileContainer, req)
}

// ReadDirContainer lists a directory of a running container.
func (b *Build) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	l, err := b.container(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.ReadDirContainer, req)
}

// StatFileContainer describes a file of a running container.
func (b *Build) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	l, err := b.container(req.GetRef())
	if err != nil {
		return nil, err
	}
	return call(ctx, l.attempt, l.attempt.gateway.StatFileContainer, req)
}
