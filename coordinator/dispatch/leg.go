package dispatch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/history"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/split"
)

// leg is a Leg while it runs.
type leg struct {
	split.Leg
	build  *Build
	ticket *schedule.Ticket
	demand schedule.Demand
	index  int    // in the order asked
	seat   int    // in the ticket
	key    string // of its platform in results
	log    *progress.Leg

	emulated bool           // on a worker that emulates what it demands
	further  []string       // other platforms that it turned out to need emulated; guarded by build.mu
	guest    bool           // on a worker of another platform, for want of a native one
	split    bool           // one of several
	siblings []*leg         // all legs of the build, this one included
	told     chan struct{}  // closed when the leg has no more progress to tell
	placed   chan struct{}  // closed when the leg has its connection
	round    chan struct{}  // closed, and replaced, when a slot was refused to it; guarded by build.mu
	host     *leg           // in whose slot it runs, if in none of its own
	guests   sync.WaitGroup // the legs that run in this one's slot

	exporters []*controlapi.Exporter // as its worker is told
	notes     cacheNotes             // of the caches that it exports

	session string // an alias of the client's, of the leg's own; empty where nothing that it exports is captured
	forget  func() // the alias

	worker   *fleet.Worker
	memory   memory    // of the worker
	begun    time.Time // the attempt; guarded by build.mu, zero: it has not
	attempt  *Attempt
	releases map[string]func()    // session relays, by the session; guarded by build.mu
	over     bool                 // nothing is relayed any more; likewise
	moving   chan struct{}        // while it moves, closed when it has; likewise
	called   sync.Once            // its first call has come, or is known not to
	lostOn   []string             // workers that it was on before, and which were lost
	calls    []exchange           // frontend requests that it has answered; guarded by build.mu
	size     int                  // of them, in bytes; likewise
	retold   map[string]retelling // metadata that the worker before told otherwise
	rescue   *rescue              // when its worker was lost; guarded by build.mu
	lost     error                // likewise, before the build had its legs; likewise
	retired  bool                 // others continue it; likewise
	trial    bool                 // it has not taken the place of another one yet; likewise
	ending   atomic.Bool
	ended    chan struct{} // closed when it holds nothing any more
}

// start finds a worker and begins the attempt there. It blocks for as long as
// the leg is queued.
func (l *leg) start(ctx context.Context) error {
	l.alias()
	conn, err := l.place(ctx)
	if err != nil {
		return err
	}
	l.begin(conn)
	return nil
}

// alias gives the leg a session of its own where what it exports is captured.
func (l *leg) alias() {
	if merge := l.build.merge; merge != nil {
		l.session, l.forget = l.build.farm.Relays.Alias(l.build.req.GetSession(), export.Methods, merge.Leg(l.index).Intercept)
	}
}

// begin starts the leg's attempt.
func (l *leg) begin(conn *fleet.Conn) {
	req := l.Solve(l.build.req, identity.NewID(), l.exporters, l.split)
	if l.split {
		req.Cache = l.build.caches.Leg(l.Leg)
	} else {
		req.Cache = l.platform().CacheExports(req.GetCache())
	}
	req.Cache = l.build.cache.Export(l.platform(), req.GetCache())
	if l.session != "" {
		req.Session = l.session
	}
	l.memory.begin(l.worker, l.host != nil)
	l.build.mu.Lock()
	l.begun = time.Now()
	l.build.mu.Unlock()
	l.attempt = startAttempt(l.build.ctx, conn, req, l)
	l.build.client.enter(l)
	l.build.farm.Metrics.attempt(l.label(), l.worker.Name)
}

// end frees everything the leg holds; reason, if any, is why what it was doing
// did not finish. The slot is free once its guests have ended, too.
func (l *leg) end(reason error) {
	if l.ending.Swap(true) {
		<-l.ended
		return
	}
	defer close(l.ended)
	l.build.client.leave(l)
	if l.attempt != nil {
		l.attempt.finish()
	}
	if reason != nil {
		l.build.publish(l.log.Fail(time.Now(), l.why(reason)))
	}
	close(l.told)
	l.guests.Wait()
	if l.attempt != nil {
		_ = l.attempt.conn.Close()
	}
	l.build.mu.Lock()
	l.over = true
	l.build.mu.Unlock()
	if l.ticket != nil {
		l.ticket.Release(l.seat) // before the sessions, which wait for the worker
	}
	l.release()
	if l.forget != nil {
		l.forget()
	}
	l.part()
}

// sessions lists the sessions that the leg's worker must know.
func (l *leg) sessions() []string {
	ids := l.build.sessions()
	if l.session != "" {
		ids = append(ids, l.session)
	}
	return ids
}

// why is the reason as the leg's own steps show it: that of another leg has only
// cancelled this one.
func (l *leg) why(reason error) string {
	var other *build.LegError
	if errors.As(reason, &other) && other.Platform != l.String() {
		return "canceled: " + build.Message(reason)
	}
	return build.Message(reason)
}

// label is the leg's platform for metrics: a client may name any, of which only
// the farm's own are counted apart.
func (l *leg) label() string {
	switch {
	case l.Unnamed():
		return "default"
	case l.guest:
		return "other"
	}
	return l.String()
}

// solve runs one frontend request on the leg's worker, and refuses the answer
// when it would execute what the worker does not run natively. Nothing has
// executed by then: BuildKit's solve is lazy, and evaluation is asked for afterwards.
func (l *leg) solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	defer l.busy()()
	evaluate := req.GetEvaluate()
	if evaluate || !req.GetAllowResultArrayRef() {
		req = split.Clone(req)
		req.Evaluate, req.AllowResultArrayRef = false, true // the older form has no definitions to check
	}
	for _, id := range localSessions(req.GetFrontendOpt()) {
		if err := l.expose(ctx, id); err != nil {
			return nil, l.failed(err, l.worker.Name)
		}
	}
	req, err := l.importing(req) //nolint:contextcheck // what the legs of a build look up together is under the build's
	if err != nil {
		return nil, err
	}
	resp, err := ask(ctx, l, gwpb.LLBBridgeClient.Solve, req)
	if err != nil {
		return nil, l.failed(err, l.worker.Name)
	}
	refs := split.Refs(resp.GetResult())
	if err := l.mayExecute(refs); err != nil {
		return nil, err
	}
	if !l.build.remember(l, req, resp) {
		return nil, l.failed(l.attempt.conn.Lost(), l.worker.Name)
	}
	if !evaluate {
		return resp, nil
	}
	for _, ref := range refs {
		if _, err := ask(ctx, l, gwpb.LLBBridgeClient.Evaluate, &gwpb.EvaluateRequest{Ref: ref.GetId()}); err != nil {
			return nil, l.failed(err, l.worker.Name)
		}
	}
	return resp, nil
}

// failed names leg and worker where the worker is at fault; what a step or the
// frontend reported stays as it is, source lines and all.
func (l *leg) failed(err error, worker string) error {
	var lost *build.LostError
	if errors.As(err, &lost) {
		return &build.LegError{Platform: l.String(), Worker: worker, Attempt: len(l.lostOn) + 1, Err: err}
	}
	return err
}

// result asks the worker to finish with the leg's part of the build's result,
// and collects what its exporters wrote.
func (l *leg) result(ctx context.Context, part *gwpb.Result, plan *split.ExportPlan) (exported, error) {
	l.busy() // to its end
	if _, err := call(ctx, l.attempt, l.attempt.gateway.Return, &gwpb.ReturnRequest{Result: part}); err != nil {
		return exported{}, l.failed(err, l.worker.Name)
	}
	resp, err := l.attempt.wait(ctx)
	if err != nil {
		return exported{}, l.failed(err, l.worker.Name)
	}
	out := exported{response: resp.GetExporterResponse()}
	out.images, err = l.images(ctx, out.response, plan)
	if err == nil {
		out.caches, err = l.cacheShares(ctx, out.response)
	}
	if lost := l.attempt.conn.Lost(); err != nil && lost != nil {
		err = l.failed(lost, l.worker.Name)
	}
	return out, err
}

// exported is what one leg's exporters left behind.
type exported struct {
	response map[string]string
	images   map[int]export.Written // of the image exporters that push or are described
	caches   []digest.Digest        // the manifests of those that are merged, empty where it had none
}

// images reads the leg's indexes from the worker that wrote them: at once,
// since the worker may be gone by the time the others have finished. Its answer
// describes one exporter's image; the others' are in its record of the build.
func (l *leg) images(ctx context.Context, response map[string]string, plan *split.ExportPlan) (map[int]export.Written, error) {
	images := map[int]export.Written{}
	var recorded map[int64]*controlapi.Descriptor
	for _, e := range plan.Exports() {
		if e.Kind != split.KindImage && e.Kind != split.KindPushed {
			continue
		}
		var desc ocispecs.Descriptor
		var err error
		switch {
		case e.Exporter == plan.Describing():
			desc, err = export.Descriptor(response)
		case e.Kind == split.KindImage && !e.Pushes(): // the next one's description takes its place
			continue
		default:
			if recorded == nil {
				recorded, err = l.recorded(ctx)
			}
			if err == nil {
				desc, err = described(recorded[int64(e.Exporter)])
			}
		}
		if err == nil {
			images[e.Exporter], err = l.written(ctx, desc, response)
		}
		if err != nil && e.Kind == split.KindPushed {
			l.build.log.Warn("an image was pushed that the ledger of tags is not told of", "worker", l.worker.Name, "error", err)
			delete(images, e.Exporter)
		} else if err != nil {
			return nil, fmt.Errorf("%s: what worker %s exported: %w", l, l.worker.Name, err)
		}
	}
	return images, nil
}

// written reads the index, or the manifest, of an image from the worker that wrote it.
func (l *leg) written(ctx context.Context, desc ocispecs.Descriptor, response map[string]string) (export.Written, error) {
	blob, err := content.ReadBlob(ctx, proxy.NewContentStore(contentapi.NewContentClient(l.attempt.conn)), desc)
	if err != nil {
		return export.Written{}, fmt.Errorf("reading %s: %w", desc.Digest, err)
	}
	return export.Written{Descriptor: desc, Blob: blob, Response: response}, nil
}

// recorded lists, by exporter, the images in the worker's record of the attempt.
func (l *leg) recorded(ctx context.Context) (map[int64]*controlapi.Descriptor, error) {
	record, err := history.RecordOf(ctx, l.attempt.control, l.attempt.ref)
	if err != nil {
		return nil, err
	}
	results := record.GetResult().GetResults()
	if results == nil {
		return nil, status.Errorf(codes.FailedPrecondition, "%s: worker %s keeps no build history, by which several image exporters are told apart: allow it at least a few entries ([history] in its buildkitd.toml), or export one image", l, l.worker.Name)
	}
	return results, nil
}

// described reads a descriptor of a record.
func described(d *controlapi.Descriptor) (ocispecs.Descriptor, error) {
	desc := history.Descriptor(d)
	return desc, export.CheckDescriptor(desc)
}

// clock, progress, failure and solved implement observer.
func (l *leg) clock(skew time.Duration) { l.log.SetSkew(skew) }

func (l *leg) progress(s *controlapi.StatusResponse) {
	l.build.mu.Lock()
	retired := l.retired
	l.build.mu.Unlock()
	if retired {
		return // its steps are begun again elsewhere
	}
	if l.split {
		l.notes.take(s)
		s = withoutVerdicts(s)
	}
	s = l.withoutMiss(s)
	l.build.publish(l.log.Translate(s))
}

func (l *leg) failure(err error) error {
	err = l.withKill(err)
	if !l.split {
		return err
	}
	return withVertex(err, l.log.Translated)
}

// solved tells the build of a leg that failed by itself.
func (l *leg) solved(err error) {
	if err == nil || l.build.rescued(l, err) {
		return
	}
	select {
	case l.build.failed <- l.failed(err, l.worker.Name):
	default: // another leg was first
	}
}

// sessionWorker is a worker as the session relays see it.
type sessionWorker struct{ *fleet.Worker }

func (w sessionWorker) Dial(ctx context.Context) (session.Conn, error) { return w.Worker.Dial(ctx) }
