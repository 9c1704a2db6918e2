package endpoint

import (
	"context"
	"slices"

	"github.com/containerd/platforms"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Fleet serves FleetService: what the workers are asked is answered by the fleet
// itself, and what the queue knows by the scheduler and the builds.
type Fleet struct {
	archfarmv1.FleetServiceServer // of the workers

	Builds    *dispatch.Builds
	Scheduler *schedule.Scheduler
}

// ListQueue implements FleetService: a client sees the legs of its tenant.
func (f *Fleet) ListQueue(ctx context.Context, _ *archfarmv1.ListQueueRequest) (*archfarmv1.ListQueueResponse, error) {
	who := identity.FromContext(ctx)
	response := &archfarmv1.ListQueueResponse{}
	for _, l := range f.Scheduler.Queue() {
		if !who.MaySee(l.Tenant) {
			continue
		}
		leg := &archfarmv1.QueuedLeg{
			Build: l.Build, Platform: l.Platform, Pools: l.Pools, Tenant: l.Tenant, Since: timestamppb.New(l.Since),
			Ahead:  uint32(max(l.Ahead, 0)), //nolint:gosec // a queue of 4 billion legs does not fit into memory
			Reason: l.Reason,
		}
		if l.Estimate > 0 {
			leg.Estimate = durationpb.New(l.Estimate)
		}
		response.Legs = append(response.Legs, leg)
	}
	return response, nil
}

// Explain implements FleetService.
func (f *Fleet) Explain(ctx context.Context, req *archfarmv1.ExplainRequest) (*archfarmv1.ExplainResponse, error) {
	var legs []schedule.Explanation
	switch subject := req.GetSubject().(type) {
	case *archfarmv1.ExplainRequest_Build:
		var err error
		if legs, err = f.Builds.Explain(ctx, subject.Build); err != nil {
			return nil, err
		}
	case *archfarmv1.ExplainRequest_Platform:
		demand, err := hypothetical(identity.FromContext(ctx), subject.Platform, req.GetPool())
		if err != nil {
			return nil, err
		}
		legs = []schedule.Explanation{f.Scheduler.Explain(demand)}
	default:
		return nil, status.Error(codes.InvalidArgument, "explaining: name a build or a platform")
	}
	response := &archfarmv1.ExplainResponse{}
	for _, l := range legs {
		leg := &archfarmv1.LegExplanation{Platform: l.Platform, Worker: l.Worker, Summary: l.Summary}
		for _, v := range l.Workers {
			leg.Workers = append(leg.Workers, &archfarmv1.WorkerVerdict{Worker: v.Worker, Eligible: v.Eligible, Reason: v.Reason})
		}
		response.Legs = append(response.Legs, leg)
	}
	return response, nil
}

// hypothetical is what a leg of the caller's would ask for, if it came now.
func hypothetical(who identity.Identity, platform, pool string) (schedule.Demand, error) {
	p, err := platforms.Parse(platform)
	if err != nil {
		return schedule.Demand{}, status.Errorf(codes.InvalidArgument, "explaining platform %q: %v", platform, err)
	}
	d := schedule.Demand{Platform: platforms.Normalize(p), Tenant: who.Tenant, Pools: slices.Sorted(slices.Values(who.Pools))}
	if !who.Operates() {
		d.Known = d.Pools
	}
	switch {
	case pool == "":
		return d, nil
	case !identity.ValidName(pool):
		return d, status.Errorf(codes.InvalidArgument, "explaining platform %s: pool %q: use letters, digits, '.', '_' and '-'", platform, pool)
	case !who.MayUse(pool):
		return d, status.Errorf(codes.PermissionDenied, "explaining platform %s: %s may not use the pool %s", platform, who, pool)
	}
	d.Pools = []string{pool}
	return d, nil
}
