package dispatch

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// Solve runs a frontend request: on the leg that it is for, or split over the
// legs of the platforms that it lists, whose results become one.
func (b *Build) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	req, err := b.repool(req)
	if err != nil {
		return nil, err
	}
	wanted, err := wantedLegs(req)
	if err != nil {
		return nil, err
	}
	b.note(req)
	legs, err := b.legsOf(ctx, wanted, split.Question(req.GetFrontendOpt()))
	if err != nil {
		return nil, err
	}
	defer b.movesDone()
	if len(legs) == 1 {
		return b.solveOn(ctx, legs[0], req)
	}
	results := make([]*gwpb.Result, len(legs))
	group, groupCtx := errgroup.WithContext(ctx)
	for i, l := range legs {
		group.Go(func() error {
			own := l.FrontendRequest(req)
			own.AllowResultReturn, own.AllowResultArrayRef = true, true
			at, resp, err := b.solveNative(groupCtx, l, own)
			legs[i], results[i] = at, resp.GetResult()
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

// note keeps what a frontend request says of where the build's legs belong, and
// what they need there.
func (b *Build) note(req *gwpb.SolveRequest) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range localSessions(req.GetFrontendOpt()) {
		if !slices.Contains(b.extra, id) {
			b.extra = append(b.extra, id)
		}
	}
	if len(b.legs) == 0 {
		b.inputs = slices.Collect(maps.Values(req.GetFrontendInputs()))
	}
}

// solveOn runs a request on one leg. When the build has others, the request's
// platforms are narrowed to the leg's.
func (b *Build) solveOn(ctx context.Context, l *leg, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	if listed := req.GetFrontendOpt()["platform"]; listed != "" && len(b.running()) > 1 {
		req = l.FrontendRequest(req)
	}
	_, resp, err := b.solveNative(ctx, l, req)
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

// method is one of the gateway's calls, as gwpb.LLBBridgeClient.Evaluate.
type method[Req, Resp any] func(gwpb.LLBBridgeClient, context.Context, Req, ...grpc.CallOption) (Resp, error)

// ask runs one of the build's gateway calls on a leg's worker. What the worker keeps
// of a step that failed, for containers to look into, it names in the error.
func ask[Req, Resp any](ctx context.Context, l *leg, m method[Req, Resp], req Req) (Resp, error) {
	defer l.busy()()
	bound := func(ctx context.Context, req Req, options ...grpc.CallOption) (Resp, error) {
		return m(l.attempt.gateway, ctx, req, options...)
	}
	resp, err := call(ctx, l.attempt, bound, req)
	if err != nil {
		l.build.rememberFailure(l, err)
	}
	return resp, err
}

// askAbout is ask for a call about a reference, of which the request is made: on
// whichever worker has it, also when that is lost meanwhile.
func askAbout[Req, Resp any](ctx context.Context, b *Build, ref string, m method[Req, Resp], about func(id string) Req) (Resp, error) {
	for {
		l, id, err := b.owner(ref)
		var resp Resp
		if err != nil {
			return resp, err
		}
		if resp, err = ask(ctx, l, m, about(id)); err == nil {
			return resp, nil
		}
		if _, err := b.goOn(ctx, l, err); err != nil {
			return resp, err
		}
	}
}

// askAny is ask for a call that any worker answers, best one of the platform.
func askAny[Req, Resp any](ctx context.Context, b *Build, p *split.Leg, m method[Req, Resp], req Req) (Resp, error) {
	for {
		l, err := b.any(ctx, p)
		var resp Resp
		if err != nil {
			return resp, err
		}
		if resp, err = ask(ctx, l, m, req); err == nil {
			return resp, nil
		}
		if _, err := b.goOn(ctx, l, err); err != nil {
			return resp, err
		}
	}
}

// rememberFailure notes whose the inputs and mounts of a failed step are.
func (b *Build) rememberFailure(l *leg, err error) {
	var failed *errdefs.SolveError
	if !errors.As(grpcerrors.FromGRPC(err), &failed) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, id := range slices.Concat(failed.InputIDs, failed.MountIDs) {
		if id != "" {
			b.refs[id] = held{l, id}
		}
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
	for _, l := range legs[1:] {
		l.uncalled()
	}
	return legs[0], nil
}

// ResolveImageConfig asks the worker of the platform in question.
func (b *Build) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	return askAny(ctx, b, split.PlatformLeg(req.GetPlatform()), gwpb.LLBBridgeClient.ResolveImageConfig, req)
}

// ResolveSourceMeta asks the worker of the platform in question.
func (b *Build) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	return askAny(ctx, b, split.PlatformLeg(req.GetPlatform()), gwpb.LLBBridgeClient.ResolveSourceMeta, req)
}

// ReadFile reads from a result, on the worker that has it.
func (b *Build) ReadFile(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return askAbout(ctx, b, req.GetRef(), gwpb.LLBBridgeClient.ReadFile, func(id string) *gwpb.ReadFileRequest {
		own := proto.CloneOf(req)
		own.Ref = id
		return own
	})
}

// ReadDir lists a directory of a result.
func (b *Build) ReadDir(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	return askAbout(ctx, b, req.GetRef(), gwpb.LLBBridgeClient.ReadDir, func(id string) *gwpb.ReadDirRequest {
		own := proto.CloneOf(req)
		own.Ref = id
		return own
	})
}

// StatFile describes a file of a result.
func (b *Build) StatFile(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	return askAbout(ctx, b, req.GetRef(), gwpb.LLBBridgeClient.StatFile, func(id string) *gwpb.StatFileRequest {
		own := proto.CloneOf(req)
		own.Ref = id
		return own
	})
}

// Evaluate makes a result's steps run now.
func (b *Build) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	return askAbout(ctx, b, req.GetRef(), gwpb.LLBBridgeClient.Evaluate, func(id string) *gwpb.EvaluateRequest {
		own := proto.CloneOf(req)
		own.Ref = id
		return own
	})
}

// Inputs returns the definitions that the client gave its frontend.
func (b *Build) Inputs(context.Context, *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return &gwpb.InputsResponse{Definitions: b.req.GetFrontendInputs()}, nil
}

// Warn adds a warning to the build's progress.
func (b *Build) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	return askAny(ctx, b, nil, gwpb.LLBBridgeClient.Warn, req)
}

// NewContainer starts a container on the worker that has the results it mounts.
func (b *Build) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	for {
		l, own, err := b.containerLeg(ctx, req)
		if err != nil {
			return nil, err
		}
		if p := split.PlatformLeg(req.GetPlatform()); p != nil && !schedule.Runs(l.worker.Platforms, p.Platform) && !l.emulates(p.Platform) {
			return nil, l.refusal(split.Exec{Name: "container " + req.GetContainerID(), Platform: &p.Platform})
		}
		resp, err := ask(ctx, l, gwpb.LLBBridgeClient.NewContainer, own)
		if err == nil {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.containers[req.GetContainerID()] = l
			return resp, nil
		}
		if _, err := b.goOn(ctx, l, err); err != nil {
			return nil, err
		}
	}
}

// containerLeg returns the leg that has the results which a container mounts, and the
// request as its worker understands it.
func (b *Build) containerLeg(ctx context.Context, req *gwpb.NewContainerRequest) (at *leg, own *gwpb.NewContainerRequest, err error) {
	own = proto.CloneOf(req)
	for _, mount := range own.GetMounts() {
		if mount.GetResultID() == "" {
			continue
		}
		if l, id, err := b.owner(mount.GetResultID()); err == nil {
			mount.ResultID = id
			at = cmp.Or(at, l)
		}
	}
	if at == nil {
		at, err = b.any(ctx, split.PlatformLeg(req.GetPlatform()))
	}
	return at, own, err
}

func (b *Build) container(id string) (*leg, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l, ok := b.containers[id]
	switch {
	case !ok:
		return nil, status.Errorf(codes.NotFound, "container details for %s not found", id)
	case l.retired:
		return nil, status.Errorf(codes.Unavailable, "container %s was on worker %s, which was lost: containers do not go on elsewhere", id, l.worker.Name)
	}
	return l, nil
}

// ReleaseContainer ends a container.
func (b *Build) ReleaseContainer(ctx context.Context, req *gwpb.ReleaseContainerRequest) (*gwpb.ReleaseContainerResponse, error) {
	l, err := b.container(req.GetContainerID())
	if status.Code(err) == codes.Unavailable { // it has ended with its worker
		return &gwpb.ReleaseContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return ask(ctx, l, gwpb.LLBBridgeClient.ReleaseContainer, req)
}

// ReadFileContainer reads a file of a running container.
func (b *Build) ReadFileContainer(ctx context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	l, err := b.container(req.GetRef())
	if err != nil {
		return nil, err
	}
	return ask(ctx, l, gwpb.LLBBridgeClient.ReadFileContainer, req)
}

// ReadDirContainer lists a directory of a running container.
func (b *Build) ReadDirContainer(ctx context.Context, req *gwpb.ReadDirRequest) (*gwpb.ReadDirResponse, error) {
	l, err := b.container(req.GetRef())
	if err != nil {
		return nil, err
	}
	return ask(ctx, l, gwpb.LLBBridgeClient.ReadDirContainer, req)
}

// StatFileContainer describes a file of a running container.
func (b *Build) StatFileContainer(ctx context.Context, req *gwpb.StatFileRequest) (*gwpb.StatFileResponse, error) {
	l, err := b.container(req.GetRef())
	if err != nil {
		return nil, err
	}
	return ask(ctx, l, gwpb.LLBBridgeClient.StatFileContainer, req)
}
