// Package dispatch runs the legs of a build on workers: it answers the client's
// frontend calls from them, and exports what they built.
//
// A Build exists for as long as its Control.Solve call. Its legs start with the
// first frontend call, since only that names the platforms for certain.
package dispatch

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/identity"
)

// Farm is what every build shares.
type Farm struct {
	Fleet     *fleet.Fleet
	Scheduler *schedule.Scheduler
	Sessions  *session.Registry
	Relays    *session.Relays
	Spool     *export.Spool
	// Publishing is who gives tags to an image of one leg; nil: its worker. See split.PlanSole.
	Publishing func(repository string) split.Publishing
	// Attempts is on how many workers a leg is tried when they are lost; up to 1: it is
	// not continued elsewhere. FailoverWait is for how long it waits for a lost worker to
	// come back when no other would do.
	Attempts     int
	FailoverWait time.Duration
	// Cache is the farm's own, nil for none.
	Cache *split.FarmCache
	// Index reads what a reference is in a registry, with the credentials of a session:
	// an empty index when it is none. Nil: caches inside images are imported as they are.
	Index   func(ctx context.Context, session string, c split.ImportedCache) (ocispecs.Index, error)
	Metrics *Metrics
	Log     *slog.Logger
}

// Build is one client request while it runs.
type Build struct {
	// Progress is what the client sees of the build.
	Progress *progress.Stream

	farm   *Farm
	who    identity.Identity // whose it is
	client *client
	warned *progress.Warned  // by the legs
	cache  *split.BuildCache // the farm's, nil for none
	images imageIndexes      // of caches that it imports
	req    *controlapi.SolveRequest
	log    *slog.Logger

	announced []split.Leg // by the request itself; the frontend's first call may know better

	ctx    context.Context
	cancel context.CancelCauseFunc
	detach func() bool // from the request

	rescuing    context.Context // of rescues: b.ctx, until the build ends
	stopRescues context.CancelFunc

	forgotten bool // it has ended, and is only kept for late questions; guarded by Builds.mu

	starting sync.Mutex // one frontend call starts the legs, others wait for it

	mu         sync.Mutex
	pools      []string // that it may run in, sorted; none for any
	legs       []*leg
	shown      []*leg // what Explain tells of, by the order asked: the latest, queued or running
	exports    *split.ExportPlan
	caches     *split.CachePlan // of several legs, else nil; set before the legs
	merge      *export.Merge    // of what the legs export, nil where nothing is captured; set before the legs
	ending     sync.WaitGroup   // legs that have finished, and are being let go
	vacated    []*leg           // legs that have moved away, whose slots are kept for siblings that move
	refs       map[string]held  // results and the mounts of errors, by the id that the client knows
	containers map[string]*leg
	over       bool           // no leg is continued elsewhere any more
	rescues    sync.WaitGroup // of legs
	turns      map[string]*sync.Mutex
	extra      []string         // sessions that only a frontend call named
	inputs     []*pb.Definition // of the frontend

	failed   chan error    // a leg's end before the frontend has returned
	returned chan struct{} // closed when the frontend has returned
	result   *gwpb.Result
	failure  *spb.Status
	answered sync.Once
}

// Begin takes a request. Exporters with options that make no sense are refused now,
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
	pools, err := poolsFor(identity.FromContext(ctx), req.GetFrontendAttrs())
	if err != nil {
		return nil, status.Errorf(status.Code(err), "starting a build: %s", build.Message(err))
	}
	b := f.newBuild(ctx, split.WithoutPools(req))
	b.announced, b.pools = legs, pools
	return b, nil
}

func (f *Farm) newBuild(ctx context.Context, req *controlapi.SolveRequest) *Build {
	b := &Build{
		Progress: progress.NewStream(0), farm: f, who: identity.FromContext(ctx), client: clientOf(ctx), warned: progress.NewWarned(), req: req, log: f.Log.With("build", req.GetRef()),
		refs: map[string]held{}, containers: map[string]*leg{}, failed: make(chan error, 1), returned: make(chan struct{}),
	}
	b.cache = f.Cache.Of(cmp.Or(b.who.Tenant, identity.DefaultTenant), req)
	// The build outlives its request by the rest of its progress; until it has its
	// answer it ends with the request.
	b.ctx, b.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	b.detach = context.AfterFunc(ctx, func() { b.cancel(context.Cause(ctx)) })
	b.rescuing, b.stopRescues = context.WithCancel(b.ctx)
	return b
}

// errEnded is why a leg is stopped that nobody needs any more.
var errEnded = status.Error(codes.Canceled, "the build has ended")

// End stops whatever still runs, for the reason given, and frees every slot. A
// leg that has ended by itself gets time to tell the rest of its progress, which
// is where a failed step's output is. The client waits for the end of the
// progress, so that is closed before what is let go of without its knowledge.
func (b *Build) End(reason error) {
	defer b.Progress.Close()
	b.answered.Do(func() { close(b.returned) })
	if !b.starting.TryLock() { // legs that are starting give up now
		b.cancel(errEnded)
		b.starting.Lock()
	}
	defer b.starting.Unlock()
	b.endRescues()
	legs := b.running()
	ended := endAll(legs, reason)
	for _, l := range legs {
		<-l.told
	}
	if reason != nil {
		b.publish(b.warned.Untold())
	}
	b.Progress.Close()
	ended.Wait()
	b.ending.Wait()
	b.cancel(errEnded)
	b.endMerging()
}

// endAll ends legs together, since one may hold the slot that another runs in.
func endAll(legs []*leg, reason error) *sync.WaitGroup {
	group := &sync.WaitGroup{}
	for _, l := range legs {
		group.Go(func() { l.end(reason) })
	}
	return group
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
	resp, err := b.Solve(ctx, split.Direct(b.req))
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
		if _, _, err := b.owner(ref.GetId()); err != nil {
			return status.Errorf(codes.NotFound, "return reference %s not found", ref.GetId())
		}
	}
	for _, l := range b.running() {
		b.client.calls(l, 1) // what follows is work again
	}
	b.answered.Do(func() {
		b.result, b.failure = req.GetResult(), req.GetError()
		close(b.returned)
	})
	return nil
}

func (b *Build) publish(s *controlapi.StatusResponse) {
	if s != nil {
		b.Progress.Publish(s)
	}
}

// held is something that a leg's worker has, under the worker's id.
type held struct {
	leg *leg
	id  string
}

// owner returns the leg that a reference belongs to, and what its worker calls that.
func (b *Build) owner(ref string) (*leg, string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if h, ok := b.refs[ref]; ok {
		return h.leg, h.id, nil
	}
	if len(b.legs) == 1 { // its worker knows what it has told the client by other ways, as session exporters are
		return b.legs[0], ref, nil
	}
	return nil, "", status.Errorf(codes.NotFound, "no such ref: %s", ref)
}

// remember notes what a leg was asked and returned, so that later calls find the leg.
// It is too late for that when the leg is being continued elsewhere, and the answer
// nobody's.
func (b *Build) remember(l *leg, req *gwpb.SolveRequest, resp *gwpb.SolveResponse) (known bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l.retired {
		return false
	}
	l.record(req, resp)
	if id := resp.GetRef(); id != "" {
		b.refs[id] = held{l, id}
	}
	for _, ref := range split.Refs(resp.GetResult()) {
		b.refs[ref.GetId()] = held{l, ref.GetId()}
		b.client.built(l, ref.GetDef())
	}
	if refs, ok := resp.GetResult().GetResult().(*gwpb.Result_Refs); ok && len(refs.Refs.GetRefs()) == 1 {
		for key := range refs.Refs.GetRefs() {
			l.key = key
		}
	}
	return true
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
