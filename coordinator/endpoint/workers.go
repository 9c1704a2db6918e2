package endpoint

import (
	"context"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/identity"
)

const (
	buildkitPackage = "github.com/moby/buildkit"
	// noWorkers is the id of the one worker that an empty farm shows.
	noWorkers = "archfarm"
)

// ListWorkers describes every worker of the farm as a BuildKit worker: its own
// daemon's description under the worker's name, with the platforms that it runs
// natively. Workers of the default platform come first, since clients take the
// first one for the default; otherwise they are in order of name. A farm without
// workers shows itself as one, so that clients let builds queue.
func (c *Control) ListWorkers(ctx context.Context, req *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	if err := checkFilterSize(req.GetFilter()); err != nil {
		return nil, err
	}
	filter, err := filters.ParseAll(req.GetFilter()...)
	if err != nil {
		return nil, err
	}
	workers := c.workers(ctx)
	records := make([]*apitypes.WorkerRecord, len(workers))
	var asking sync.WaitGroup
	for i, w := range workers {
		asking.Go(func() { records[i] = describe(w, c.facts.of(ctx, w)) })
	}
	asking.Wait()
	if len(records) == 0 {
		records = append(records, &apitypes.WorkerRecord{
			ID: noWorkers, Platforms: pb.PlatformsFromSpec([]ocispecs.Platform{platforms.Normalize(c.Farm.DefaultPlatform(identity.FromContext(ctx).Pools...))}),
			BuildkitVersion: version(),
		})
	}
	return &controlapi.ListWorkersResponse{
		Record: slices.DeleteFunc(records, func(r *apitypes.WorkerRecord) bool { return !filter.Match(workerFields(r)) }),
	}, nil
}

// Info tells the version of BuildKit that builds run with by default: that of the
// first worker, or that of the coordinator's BuildKit packages while there is none.
func (c *Control) Info(ctx context.Context, _ *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	if workers := c.workers(ctx); len(workers) > 0 {
		if v := c.facts.of(ctx, workers[0]).version; v != nil {
			return &controlapi.InfoResponse{BuildkitVersion: v}, nil
		}
	}
	return &controlapi.InfoResponse{BuildkitVersion: version()}, nil
}

// usable returns the attached workers whose pools the caller may use, by name.
func (c *Control) usable(ctx context.Context) []*fleet.Worker {
	who := identity.FromContext(ctx)
	return slices.DeleteFunc(c.Farm.Fleet.Workers(), func(w *fleet.Worker) bool { return !who.MayUse(w.Pool) })
}

// workers returns the same, those of the default platform first.
func (c *Control) workers(ctx context.Context) []*fleet.Worker {
	usual, workers := c.Farm.DefaultPlatform(identity.FromContext(ctx).Pools...), c.usable(ctx)
	rank := func(w *fleet.Worker) int {
		if schedule.Runs(w.Platforms, usual) {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(workers, func(a, b *fleet.Worker) int { return rank(a) - rank(b) })
	return workers
}

// describe puts what the farm knows of a worker over what its daemon says.
func describe(w *fleet.Worker, daemon fact) *apitypes.WorkerRecord {
	record := &apitypes.WorkerRecord{
		ID: w.Name, Platforms: pb.PlatformsFromSpec(w.Platforms), Labels: map[string]string{},
		GCPolicy: daemon.record.GetGCPolicy(), CDIDevices: daemon.record.GetCDIDevices(), BuildkitVersion: daemon.record.GetBuildkitVersion(),
	}
	maps.Copy(record.Labels, daemon.record.GetLabels())
	maps.Copy(record.Labels, w.Labels)
	record.Labels["archfarm.worker"], record.Labels["archfarm.machine"], record.Labels["archfarm.pool"] = w.Name, w.Machine, w.Pool
	if record.BuildkitVersion == nil {
		record.BuildkitVersion = &apitypes.BuildkitVersion{Package: buildkitPackage, Version: w.BuildKitVersion}
	}
	return record
}

// workerFields are what buildkitd lets workers be filtered by: id and labels.NAME.
func workerFields(r *apitypes.WorkerRecord) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch {
		case len(path) == 0:
		case path[0] == "id":
			return r.GetID(), r.GetID() != ""
		case path[0] == "labels":
			value, ok := r.GetLabels()[strings.Join(path[1:], ".")]
			return value, ok
		}
		return "", false
	})
}

// version is that of the BuildKit packages in this binary.
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
