package dispatch

import (
	"context"
	"errors"
	"maps"
	"runtime"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// legsOf returns the legs that a frontend request concerns, in the order it asks
// for them, and starts the build's legs if this is its first. A question about the
// build (requestid) starts no more than it needs.
func (b *Build) legsOf(ctx context.Context, wanted []split.Leg, question bool) ([]*leg, error) {
	b.starting.Lock()
	defer b.starting.Unlock()
	if len(b.running()) == 0 {
		if err := b.start(ctx, wanted, question); err != nil {
			return nil, err
		}
	}
	legs := b.running()
	var out []*leg
	for _, w := range wanted {
		i := slices.IndexFunc(legs, func(l *leg) bool { return l.String() == w.String() })
		if i < 0 { // a platform that the build did not announce: where one buildkitd would do it, the check decides whether it may
			i = 0
		}
		if !slices.Contains(out, legs[i]) {
			out = append(out, legs[i])
		}
	}
	for _, l := range legs {
		if !slices.Contains(out, l) {
			l.uncalled()
		}
	}
	return out, nil
}

// start queues all legs at once, places them, and begins their attempts.
func (b *Build) start(ctx context.Context, wanted []split.Leg, question bool) error {
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	all := wanted
	if len(b.announced) > 1 && !question {
		all = b.announced
	}
	var err error
	var exports *split.ExportPlan
	exporters := split.Exporters(b.req)
	switch {
	case len(all) > 1:
		if exports, err = split.PlanExports(exporters, all); err != nil {
			return err
		}
		b.prepareMerging(exports)
		b.caches = split.PlanCaches(b.req.GetCache())
	case b.farm.Publishing != nil:
		exports = split.PlanSole(exporters, b.farm.Publishing)
	}
	legs, err := b.place(ctx, all, exporters, exports)
	if err != nil {
		return err
	}
	b.mu.Lock()
	b.legs, b.exports = legs, exports
	b.mu.Unlock()
	for _, l := range slices.Clone(legs) {
		if l.lost != nil {
			b.rescued(l, l.lost)
		}
	}
	return nil
}

// place gets every leg onto a worker. A platform may lose its last worker, or
// prove to have none, while the leg is queued: then it is tried anywhere.
func (b *Build) place(ctx context.Context, all []split.Leg, exporters []*controlapi.Exporter, exports *split.ExportPlan) ([]*leg, error) {
	for {
		legs, ticket, err := b.enqueue(all)
		if err != nil {
			return nil, err
		}
		group, groupCtx := errgroup.WithContext(b.ctx)
		stop := context.AfterFunc(ctx, func() { b.cancel(context.Cause(ctx)) }) // the call that waits for the legs was given up
		for _, l := range legs {
			l.exporters = exporters
			if exports != nil {
				l.exporters = exports.Leg(l.Leg)
			}
			group.Go(func() error { return l.start(groupCtx) })
		}
		err = group.Wait()
		stop()
		if err == nil {
			return legs, nil
		}
		endAll(legs, err).Wait()
		ticket.Close()
		var none *build.NoWorkerError
		if !errors.As(err, &none) || !slices.ContainsFunc(legs, func(l *leg) bool { return l.demand.On != "" || !l.guest && b.foreign(l.Leg) }) {
			return nil, err
		}
	}
}

// enqueue asks for a slot for each leg.
func (b *Build) enqueue(all []split.Leg) ([]*leg, *schedule.Ticket, error) {
	key := b.warmthKey()
	var legs []*leg
	inputs := b.frontendInputs()
	var demands []schedule.Demand
	for i, s := range all {
		demand, guest := b.demand(s, key)
		demand.On = b.client.home(inputs, func(worker string) bool { return b.farm.takes(worker, demand) })
		demands = append(demands, demand)
		l := b.newLeg(s, i, len(all) > 1)
		l.guest, l.demand = guest, demand
		legs = append(legs, l)
	}
	ticket, err := b.farm.Scheduler.Enqueue(demands)
	if err != nil {
		return nil, nil, err
	}
	for _, l := range legs {
		l.ticket, l.siblings = ticket, legs
	}
	b.client.expect(legs...)
	b.show(legs...)
	return legs, ticket, nil
}

func (b *Build) newLeg(s split.Leg, index int, several bool) *leg {
	l := &leg{
		Leg: s, build: b, index: index, seat: index, key: s.String(), split: several,
		told: make(chan struct{}), placed: make(chan struct{}), ended: make(chan struct{}), round: make(chan struct{}), log: progress.NewLeg(s.String(), several),
	}
	l.log.Together(b.warned, index == 0)
	return l
}

// foreign tells whether the workers that the build may use, of which there are some,
// run a platform nowhere natively, and none that does is on its way.
func (b *Build) foreign(l split.Leg) bool {
	return !l.Unnamed() && !b.native(l.Platform) && len(b.farm.workers(b.allowed())) > 0 && !b.farm.Scheduler.Awaits(l.Platform, b.allowed()...)
}

// demand is what a leg asks of the scheduler. A platform that is native nowhere
// may be built where builds without a platform are, so that its build platform is
// the same every time, or else anywhere; provided that nothing of it executes:
// that is checked once the frontend has said what would. Guest tells of such a leg.
// Where the operator allows emulation nothing has to be checked, and it is no guest.
func (b *Build) demand(l split.Leg, key string) (d schedule.Demand, guest bool) {
	usual := b.farm.DefaultPlatform(b.allowed()...)
	if l.Unnamed() {
		return b.wish(usual, key), false
	}
	if d = b.wish(l.Platform, key); !b.foreign(l) || b.farm.Scheduler.Emulates(d) {
		return d, false
	}
	if b.native(usual) {
		return b.wish(usual, key+l.String()), true
	}
	d.Anywhere = true
	return d, true
}

// frontendInputs are the definitions that the build's frontend was given.
func (b *Build) frontendInputs() []*pb.Definition {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Concat(slices.Collect(maps.Values(b.req.GetFrontendInputs())), b.inputs)
}

// warmthKey identifies the project, whatever its commit: the repository that the
// client says it builds, or else its folder; the Dockerfile and the target.
func (b *Build) warmthKey() string {
	attrs := b.req.GetFrontendAttrs()
	repository, _, _ := strings.Cut(attrs["context"], "#")
	parts := []string{repository, attrs["vcs:source"]}
	if attrs["vcs:source"] == "" {
		parts = append(parts, b.farm.Sessions.SharedKey(b.req.GetSession()))
	}
	for _, k := range []string{"contextsubdir", "vcs:localdir:context", "filename", "target"} {
		parts = append(parts, attrs[k])
	}
	return digest.FromString(strings.Join(parts, "\x00")).Encoded()
}

// sessions lists the client's sessions that the build's workers must know.
func (b *Build) sessions() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	ids := append([]string{b.req.GetSession(), b.req.GetSourcePolicySession()}, b.extra...)
	ids = append(ids, localSessions(b.req.GetFrontendAttrs())...)
	slices.Sort(ids)
	return slices.DeleteFunc(slices.Compact(ids), func(id string) bool { return id == "" })
}

// localSessions are the sessions that options name for single local sources, as
// bake does for sources that its targets share.
func localSessions(opt map[string]string) []string {
	var ids []string
	for k, v := range opt {
		if strings.HasPrefix(k, "local-sessionid:") {
			ids = append(ids, v)
		}
	}
	return ids
}

// DefaultPlatform is what a build gets that names no platform: this machine's
// own where those pools (the farm, when none are named) have it, else the best of
// their first worker.
func (f *Farm) DefaultPlatform(pools ...string) ocispecs.Platform {
	own := platforms.Normalize(ocispecs.Platform{OS: "linux", Architecture: runtime.GOARCH})
	workers := f.workers(pools)
	if f.Scheduler.Native(own, pools...) || len(workers) == 0 {
		return own
	}
	return workers[0].Platforms[0]
}

// workers are those of the pools; all when none are named.
func (f *Farm) workers(pools []string) []schedule.Worker {
	return slices.DeleteFunc(f.Scheduler.Snapshot(), func(w schedule.Worker) bool { return !schedule.InPool(pools, w.Pool) })
}

// takes tells whether a worker that is ready runs what is demanded.
func (f *Farm) takes(worker string, d schedule.Demand) bool {
	if d.Anywhere {
		return false
	}
	suits, _ := f.Scheduler.Suits(worker, d)
	return suits && slices.ContainsFunc(f.Scheduler.Snapshot(), func(w schedule.Worker) bool { return w.Name == worker && w.State == schedule.Ready })
}
