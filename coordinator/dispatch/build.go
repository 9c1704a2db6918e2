// Package dispatch runs the legs of a build on workers: it answers the client's
// frontend calls from them, and exports what they built.
//
// A Build exists for as long as its Control.Solve call. Its legs start with the
// first frontend call, since only that names the platforms for certain.
package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

// Farm is what every build shares.
type Farm struct {
	Fleet     *fleet.Fleet
	Scheduler *schedule.Scheduler
	Sessions  *session.Registry
	Relays    *session.Relays
	Metrics   *Metrics
	Log       *slog.Logger
}

// Build is one client request while it runs.
type Build struct {
	// Progress is what the client sees of the build.
	Progress *progress.Stream

	farm *Farm
	req  *controlapi.SolveRequest
	log  *slog.Logger

	ctx    context.Context
	cancel context.CancelCauseFunc
	detach func() bool // from the request

	forgotten bool // it has ended, and is only kept for late questions; guarded by Builds.mu

	starting sync.Mutex // one frontend call starts the legs, others wait for it

	mu         sync.Mutex
	legs       []*leg
	exports    *split.Exports
	ending     sync.WaitGroup  // legs that have finished, and are being let go
	refs       map[string]*leg // results and the mounts of errors, by the worker's id
	containers map[string]*leg
	extra      []string // sessions that only a frontend call named

	failed   chan error    // a leg's end before the frontend has returned
	returned chan struct{} // closed when the frontend has returned
	result   *gwpb.Result
	failure  *spb.Status
	answered sync.Once
}

// Begin takes a request. Exports that its legs could not merge are refused now,
// before anything starts. End must be called.
func (f *Farm) Begin(ctx context.Context, req *controlapi.SolveRequest) (*Build, error) {
	legs, err := split.Legs(req.GetFrontendAttrs())
	if err != nil {
		return nil, err
	}
	if len(legs) > 1 {
		if _, err := split.PlanExports(split.Exporters(req), legs); err != nil {
			return nil, err
		}
	}
	return f.newBuild(ctx, req), nil
}

func (f *Farm) newBuild(ctx context.Context, req *controlapi.SolveRequest) *Build {
	b := &Build{
		Progress: progress.NewStream(0), farm: f, req: req, log: f.Log.With("build", req.GetRef()),
		refs: map[string]*leg{}, containers: map[string]*leg{}, failed: make(chan error, 1), returned: make(chan struct{}),
	}
	// The build outlives its request by the rest of its progress; until it has its
	// answer it ends with the request.
	b.ctx, b.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	b.detach = context.AfterFunc(ctx, func() { b.cancel(context.Cause(ctx)) })
	return b
}

// errEnded is why a leg is stopped that nobody needs any more.
var errEnded = status.Error(codes.Canceled, "the build has ended")

// End stops whatever still runs, for the reason given, and frees every slot. A
// leg that has ended by itself gets time to tell the rest of its progress, which
// is where a failed step's output is. The progress stream is closed last.
func (b *Build) End(reason error) {
	defer b.Progress.Close()
	b.answered.Do(func() { close(b.returned) })
	if !b.starting.TryLock() { // legs that are starting give up now
		b.cancel(errEnded)
		b.starting.Lock()
	}
	defer b.starting.Unlock()
	endAll(b.running(), reason)
	b.ending.Wait()
	b.cancel(errEnded)
}

// endAll ends legs together: one may hold the slot that another runs in.
func endAll(legs []*leg, reason error) {
	var group sync.WaitGroup
	for _, l := range legs {
		group.Go(func() { l.end(reason) })
	}
	group.Wait()
}

func (b *Build) running() []*leg {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.legs)
}

// Result waits until the frontend has returned, which is the client's doing
// unless the request names a frontend or holds a definition itself.
func (b *Build) Result(ctx context.Context) (*gwpb.Result, error) {
	if b.req.GetFrontend() != "" || b.req.GetDefinition() != nil {
		return b.direct(ctx)
	}
	select {
	case <-b.returned:
		if b.failure != nil {
			return nil, status.ErrorProto(b.failure)
		}
		return b.result, nil
	case err := <-b.failed:
		return nil, err
	case <-b.ctx.Done():
		return nil, context.Cause(b.ctx)
	}
}

// direct does what the client's side of a gateway build does, for requests that
// leave it to the daemon.
func (b *Build) direct(ctx context.Context) (*gwpb.Result, error) {
	req := &gwpb.SolveRequest{
		Definition: b.req.GetDefinition(), Frontend: b.req.GetFrontend(), FrontendOpt: b.req.GetFrontendAttrs(), FrontendInputs: b.req.GetFrontendInputs(),
		AllowResultReturn: true, AllowResultArrayRef: true,
	}
	for _, im := range b.req.GetCache().GetImports() {
		req.CacheImports = append(req.CacheImports, &gwpb.CacheOptionsEntry{Type: im.GetType(), Attrs: im.GetAttrs()})
	}
	resp, err := b.Solve(ctx, req)
	if err != nil {
		return nil, err
	}
	return resp.GetResult(), nil
}

// Return takes what the client's frontend returned. The legs get it when the
// build goes on to export.
func (b *Build) Return(req *gwpb.ReturnRequest) error {
	if req.GetError() == nil && req.GetResult() == nil {
		return status.Error(codes.InvalidArgument, "result is required")
	}
	for _, ref := range split.Refs(req.GetResult()) {
		if _, err := b.owner(ref.GetId()); err != nil {
			return err
		}
	}
	b.answered.Do(func() {
		b.result, b.failure = req.GetResult(), req.GetError()
		close(b.returned)
	})
	return nil
}

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
	return out, nil
}

// start queues all legs at once, places them, and begins their attempts.
func (b *Build) start(ctx context.Context, wanted []split.Leg, question bool) error {
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	announced, err := split.Legs(b.req.GetFrontendAttrs())
	if err != nil {
		return err
	}
	all := wanted
	if len(announced) > 1 && !question {
		all = announced
	}
	var exports *split.Exports
	exporters := split.Exporters(b.req)
	if len(all) > 1 {
		if exports, err = split.PlanExports(exporters, all); err != nil {
			return err
		}
	}
	b.warnOfCaches(all)
	legs, err := b.place(ctx, all, exporters, exports)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.legs, b.exports = legs, exports
	return nil
}

// warnOfCaches says what this version does to a cache that several legs export.
func (b *Build) warnOfCaches(legs []split.Leg) {
	for _, e := range b.req.GetCache().GetExports() {
		if len(legs) > 1 && e.GetType() != "inline" {
			step := b.Progress.Step(fmt.Sprintf("warning: the %s cache is written by each platform in turn, the last one stays", e.GetType()))
			step.Start()
			step.Done(nil)
		}
	}
}

// place gets every leg onto a worker. A platform may lose its last worker, or
// prove to have none, while the leg is queued: then it is tried anywhere.
func (b *Build) place(ctx context.Context, all []split.Leg, exporters []*controlapi.Exporter, exports *split.Exports) ([]*leg, error) {
	for {
		legs, ticket, err := b.enqueue(all)
		if err != nil {
			return nil, err
		}
		group, groupCtx := errgroup.WithContext(b.ctx)
		stop := context.AfterFunc(ctx, func() { b.cancel(context.Cause(ctx)) }) // the call that waits for the legs was given up
		for _, l := range legs {
			own := exporters
			if exports != nil {
				own = exports.Leg(l.Leg)
			}
			group.Go(func() error { return l.start(groupCtx, own) })
		}
		err = group.Wait()
		stop()
		if err == nil {
			return legs, nil
		}
		endAll(legs, err)
		ticket.Close()
		var none *build.NoWorkerError
		if !errors.As(err, &none) || !slices.ContainsFunc(legs, func(l *leg) bool { return !l.guest && b.foreign(l.Leg) }) {
			return nil, err
		}
	}
}

// enqueue asks for a slot for each leg.
func (b *Build) enqueue(all []split.Leg) ([]*leg, *schedule.Ticket, error) {
	key := b.warmthKey()
	var legs []*leg
	var demands []schedule.Demand
	for i, s := range all {
		demands = append(demands, b.demand(s, key))
		legs = append(legs, &leg{
			Leg: s, build: b, index: i, key: s.String(), guest: b.foreign(s), split: len(all) > 1,
			placed: make(chan struct{}), round: make(chan struct{}), log: progress.NewLeg(s.String(), len(all) > 1),
		})
	}
	ticket, err := b.farm.Scheduler.Enqueue(demands)
	if err != nil {
		return nil, nil, err
	}
	for _, l := range legs {
		l.ticket, l.siblings = ticket, legs
	}
	return legs, ticket, nil
}

// foreign tells whether the farm, which has workers, runs a platform nowhere natively.
func (b *Build) foreign(l split.Leg) bool {
	return !l.Unnamed() && !b.farm.Scheduler.Native(l.Platform) && len(b.farm.Scheduler.Snapshot()) > 0
}

// demand is what a leg asks of the scheduler. A platform that is native nowhere
// may be built where builds without a platform are, so that its build platform is
// the same every time, or else anywhere; provided that nothing of it executes:
// that is checked once the frontend has said what would.
func (b *Build) demand(l split.Leg, key string) schedule.Demand {
	usual := b.farm.DefaultPlatform()
	switch {
	case l.Unnamed():
		return schedule.Demand{Platform: usual, Key: key}
	case !b.foreign(l):
		return schedule.Demand{Platform: l.Platform, Key: key}
	case b.farm.Scheduler.Native(usual):
		return schedule.Demand{Platform: usual, Key: key + l.String()}
	}
	return schedule.Demand{Platform: l.Platform, Anywhere: true, Key: key}
}

// warmthKey identifies the project: the client's context, Dockerfile and target.
func (b *Build) warmthKey() string {
	attrs := b.req.GetFrontendAttrs()
	parts := []string{b.farm.Sessions.SharedKey(b.req.GetSession())}
	for _, k := range []string{"context", "contextsubdir", "filename", "target"} {
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

// mayExecute refuses a definition that would execute, on this leg's worker, what
// the worker does not run natively: BuildKit would emulate it, or fail oddly.
func (l *leg) mayExecute(def *pb.Definition) error {
	execs, err := split.Execs(def)
	if err != nil {
		return err
	}
	for _, e := range execs {
		if e.Platform == nil || runs(l.worker, *e.Platform) {
			continue
		}
		platform := split.Leg{Platform: *e.Platform}.String()
		step := progress.StepName(platform, e.Name)
		if l.build.farm.Scheduler.Native(*e.Platform) {
			return status.Errorf(codes.FailedPrecondition,
				"%q executes on %s, but its leg %s is on worker %s, which runs %s natively: this version of archfarm does not move legs; write FROM --platform=$BUILDPLATFORM for a stage that may run anywhere",
				step, platform, l, l.worker.Name, platforms.FormatAll(l.worker.Platforms[0]))
		}
		return &build.NoWorkerError{Platform: platform, Step: step, Fleet: schedule.Fleet(l.build.farm.Scheduler.Snapshot())}
	}
	return nil
}

func (b *Build) publish(s *controlapi.StatusResponse) {
	if s != nil {
		b.Progress.Publish(s)
	}
}

// Exported is the outcome of a build.
type Exported struct {
	// Response is what the client is told; of an image, its digest is still missing.
	Response map[string]string
	// Legs are the parts of the image, in the order asked, when several legs
	// exported one, and Publication says what to do with their index.
	Legs        []manifest.Leg
	Publication split.Publication
	// Annotations of the index.
	Annotations manifest.Annotations
	// Plain tells that the client returned one reference without a platform: what
	// its leg exported is the image, without an index around it.
	Plain bool
}

// Export lets every leg finish with its part of the result. When one fails, the
// others are stopped and its error is returned; nothing has been tagged by then.
func (b *Build) Export(ctx context.Context, result *gwpb.Result) (*Exported, error) {
	if len(b.running()) == 0 && len(split.Exporters(b.req)) > 0 { // an empty result, to be exported all the same
		if _, err := b.legsOf(ctx, []split.Leg{{}}, false); err != nil {
			return nil, err
		}
	}
	legs := b.running()
	publication, image := b.exports.Image()
	parts := make([]*exported, len(legs))
	group, groupCtx := errgroup.WithContext(ctx)
	for i, l := range legs {
		group.Go(func() error {
			part, err := split.Part(result, func(key, ref string) bool { return b.owns(l, key, ref) })
			if err != nil {
				return err
			}
			if part == nil { // the client chose not to use this leg
				l.end(nil)
				return nil
			}
			out, err := l.result(groupCtx, part, image)
			if err != nil {
				return err
			}
			parts[i] = &out
			b.ending.Go(func() { l.end(nil) }) // its slot is free while others still run, and its status may lag
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return collect(parts, publication, image, result), nil
}

// collect joins what the legs exported.
func collect(parts []*exported, publication split.Publication, image bool, result *gwpb.Result) *Exported {
	out := &Exported{Response: map[string]string{}}
	for _, part := range slices.Backward(parts) { // what legs disagree on, the first decides
		if part == nil {
			continue
		}
		for k, v := range part.response {
			out.Response[k] = v
		}
		if image {
			out.Legs = append([]manifest.Leg{part.leg}, out.Legs...)
		}
	}
	if image {
		out.Publication = publication
		out.Annotations = indexAnnotations(publication, result.GetMetadata())
		out.Plain = split.Single(result)
	}
	return out
}

// owns tells whether a reference of the client's result is the leg's: by the
// reference, or by the platform where that names an empty image.
func (b *Build) owns(l *leg, key, ref string) bool {
	if ref == "" {
		return key == l.key || len(b.running()) == 1
	}
	owner, err := b.owner(ref)
	return err == nil && owner == l
}

// owner returns the leg that a reference belongs to.
func (b *Build) owner(ref string) (*leg, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l, ok := b.refs[ref]; ok {
		return l, nil
	}
	return nil, status.Errorf(codes.NotFound, "return reference %s is not of this build", ref)
}

// remember notes what a leg returned, so that later calls find the leg.
func (b *Build) remember(l *leg, resp *gwpb.SolveResponse) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if id := resp.GetRef(); id != "" {
		b.refs[id] = l
	}
	for _, ref := range split.Refs(resp.GetResult()) {
		b.refs[ref.GetId()] = l
	}
	if refs, ok := resp.GetResult().GetResult().(*gwpb.Result_Refs); ok && len(refs.Refs.GetRefs()) == 1 {
		for key := range refs.Refs.GetRefs() {
			l.key = key
		}
	}
}

// indexAnnotations joins the client's annotations with those of the frontend's
// result, which win (BuildKit exporter/containerimage/export.go).
func indexAnnotations(p split.Publication, metadata map[string][]byte) manifest.Annotations {
	out := manifest.Annotations{Index: maps.Clone(p.Index), IndexDescriptor: maps.Clone(p.IndexDescriptor)}
	for k, v := range metadata {
		a, ok, err := exptypes.ParseAnnotationKey(k)
		if !ok || err != nil { // a malformed one was an error to every leg's exporter already
			continue
		}
		switch a.Type {
		case exptypes.AnnotationIndex:
			out.Index[a.Key] = string(v)
		case exptypes.AnnotationIndexDescriptor:
			out.IndexDescriptor[a.Key] = string(v)
		}
	}
	return out
}

// DefaultPlatform is what a build gets that names no platform: this machine's
// own where the farm has it, else the best of the first worker.
func (f *Farm) DefaultPlatform() ocispecs.Platform {
	own := platforms.Normalize(ocispecs.Platform{OS: "linux", Architecture: runtime.GOARCH})
	workers := f.Scheduler.Snapshot()
	if f.Scheduler.Native(own) || len(workers) == 0 {
		return own
	}
	return workers[0].Platforms[0]
}

// LegRecord is where a leg ran: what is needed to ask the worker about it later.
type LegRecord struct {
	Platform string // its key in the build's result
	Worker   string
	Ref      string // of the attempt's own build on the worker
}

// Legs tells where the build's legs ran, in the order asked.
func (b *Build) Legs() []LegRecord {
	var out []LegRecord
	for _, l := range b.running() {
		out = append(out, LegRecord{Platform: l.key, Worker: l.worker.Name, Ref: l.attempt.ref})
	}
	return out
}
