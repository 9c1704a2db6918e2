package dispatch

import (
	"slices"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/identity"
)

// poolsFor returns the pools that somebody's build may run in, sorted: those that its
// options ask for, else those of the client's certificate; none for any. Errors are
// InvalidArgument and PermissionDenied.
func poolsFor(who identity.Identity, opt map[string]string) ([]string, error) {
	asked, err := split.Pools(opt)
	if err != nil {
		return nil, err
	}
	for _, pool := range asked {
		if !who.MayUse(pool) {
			return nil, status.Errorf(codes.PermissionDenied, "%s may not use the pool %s, which the build-arg %s names; its certificate is for %s",
				who, pool, split.PoolArg, build.Pools(who.Pools))
		}
	}
	if asked == nil {
		return granted(who), nil
	}
	return asked, nil
}

// granted are the pools of a client's certificate, sorted.
func granted(who identity.Identity) []string { return slices.Sorted(slices.Values(who.Pools)) }

// repool takes out of a frontend's request what it says of pools. It may choose them
// as long as nothing runs.
func (b *Build) repool(req *gwpb.SolveRequest) (*gwpb.SolveRequest, error) {
	stripped := split.FrontendWithoutPools(req)
	if stripped == req {
		return req, nil
	}
	pools, err := poolsFor(b.who, req.GetFrontendOpt())
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.legs) == 0 {
		b.pools = pools
		return stripped, nil
	}
	for _, l := range b.legs {
		if !schedule.InPool(pools, l.worker.Pool) {
			return nil, status.Errorf(codes.FailedPrecondition, "the build-arg %s names %s, but the build runs in the pool %s already: all its frontend's requests have to name the same",
				split.PoolArg, build.Pools(pools), l.worker.Pool)
		}
	}
	return stripped, nil
}

// wish is what a leg of the build that needs the platform asks of the scheduler.
func (b *Build) wish(p ocispecs.Platform, key string) schedule.Demand {
	d := schedule.Demand{Platform: p, Pools: b.allowed(), Key: key, Build: b.req.GetRef(), Tenant: b.who.Tenant}
	if !b.who.Operates() {
		d.Known = granted(b.who)
	}
	return d
}

// allowed are the pools that the build may run in, sorted; none for any.
func (b *Build) allowed() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pools
}

// native tells whether a worker that the build may use, and that is not draining, runs
// the platform natively.
func (b *Build) native(p ocispecs.Platform) bool {
	return b.farm.Scheduler.Native(p, b.allowed()...)
}
