package dispatch

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/identity"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

// leg is a Leg while it runs.
type leg struct {
	split.Leg
	build  *Build
	ticket *schedule.Ticket
	index  int    // in the order asked
	key    string // of its platform in results
	log    *progress.Leg

	guest    bool           // on a worker of another platform, for want of a native one
	split    bool           // one of several
	siblings []*leg         // all legs of the build, this one included
	told     chan struct{}  // closed when the leg has no more progress to tell
	placed   chan struct{}  // closed when the leg has its connection
	round    chan struct{}  // closed, and replaced, when a slot was refused to it; guarded by build.mu
	host     *leg           // in whose slot it runs, if in none of its own
	guests   sync.WaitGroup // the legs that run in this one's slot

	worker   *fleet.Worker
	attempt  *Attempt
	releases map[string]func() // session relays, by the session; guarded by build.mu
	over     bool              // nothing is relayed any more; likewise
	ended    sync.Once
}

// start finds a worker and begins the attempt there. It blocks for as long as
// the leg is queued.
func (l *leg) start(ctx context.Context, exporters []*controlapi.Exporter) error {
	conn, err := l.place(ctx)
	if err != nil {
		return err
	}
	req := l.Solve(l.build.req, identity.NewID(), exporters, l.split)
	l.attempt = startAttempt(l.build.ctx, conn, req, l)
	l.build.farm.Metrics.attempt(l.label(), l.worker.Name)
	return nil
}

// end frees everything the leg holds; reason, if any, is why what it was doing
// did not finish.
func (l *leg) end(reason error) {
	l.ended.Do(func() {
		l.guests.Wait() // the slot is theirs too
		if l.attempt != nil {
			l.attempt.close()
		}
		if reason != nil {
			l.build.publish(l.log.Fail(time.Now(), l.why(reason)))
		}
		close(l.told)
		l.build.mu.Lock()
		l.over = true
		l.build.mu.Unlock()
		l.ticket.Release(l.index) // before the sessions, which wait for the worker
		l.release()
		l.part()
	})
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
	evaluate := req.GetEvaluate()
	if evaluate || !req.GetAllowResultArrayRef() {
		req = cloneSolve(req)
		req.Evaluate, req.AllowResultArrayRef = false, true // the older form has no definitions to check
	}
	for _, id := range localSessions(req.GetFrontendOpt()) {
		if err := l.expose(ctx, id); err != nil {
			return nil, l.failed(err, l.worker.Name)
		}
	}
	resp, err := call(ctx, l.attempt, l.attempt.gateway.Solve, req)
	if err != nil {
		return nil, l.failed(err, l.worker.Name)
	}
	refs := split.Refs(resp.GetResult())
	for _, ref := range refs {
		if err := l.mayExecute(ref.GetDef()); err != nil {
			return nil, err
		}
	}
	l.build.remember(l, resp)
	if !evaluate {
		return resp, nil
	}
	for _, ref := range refs {
		if _, err := call(ctx, l.attempt, l.attempt.gateway.Evaluate, &gwpb.EvaluateRequest{Ref: ref.GetId()}); err != nil {
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
		return &build.LegError{Platform: l.String(), Worker: worker, Attempt: 1, Err: err}
	}
	return err
}

// result asks the worker to finish with the leg's part of the build's result,
// and collects what its exporter wrote.
func (l *leg) result(ctx context.Context, part *gwpb.Result, image bool) (exported, error) {
	if _, err := call(ctx, l.attempt, l.attempt.gateway.Return, &gwpb.ReturnRequest{Result: part}); err != nil {
		return exported{}, l.failed(err, l.worker.Name)
	}
	resp, err := l.attempt.wait(ctx)
	if err != nil {
		return exported{}, l.failed(err, l.worker.Name)
	}
	out := exported{response: resp.GetExporterResponse()}
	if !image {
		return out, nil
	}
	out.leg, err = l.descriptor(ctx, resp.GetExporterResponse())
	if lost := l.attempt.conn.Lost(); err != nil && lost != nil {
		err = l.failed(lost, l.worker.Name)
	}
	return out, err
}

// exported is what one leg's exporters left behind.
type exported struct {
	response map[string]string
	leg      manifest.Leg
}

// descriptor reads the leg's index from the worker that wrote it: at once,
// since the worker may be gone by the time the others have finished.
func (l *leg) descriptor(ctx context.Context, response map[string]string) (manifest.Leg, error) {
	raw, err := base64.StdEncoding.DecodeString(response[exptypes.ExporterImageDescriptorKey])
	if err != nil {
		return manifest.Leg{}, fmt.Errorf("%s: reading the descriptor that worker %s exported: %w", l, l.worker.Name, err)
	}
	var desc ocispecs.Descriptor
	if err := json.Unmarshal(raw, &desc); err != nil {
		return manifest.Leg{}, fmt.Errorf("%s: reading the descriptor that worker %s exported: %w", l, l.worker.Name, err)
	}
	if desc.Size <= 0 || desc.Size > manifest.MaxBlob {
		return manifest.Leg{}, fmt.Errorf("%s: the index that worker %s exported has %d bytes, at most %d are possible", l, l.worker.Name, desc.Size, manifest.MaxBlob)
	}
	blob, err := content.ReadBlob(ctx, proxy.NewContentStore(contentapi.NewContentClient(l.attempt.conn)), desc)
	if err != nil {
		return manifest.Leg{}, fmt.Errorf("%s: reading %s from worker %s: %w", l, desc.Digest, l.worker.Name, err)
	}
	return manifest.Leg{Platform: l.Platform, Descriptor: desc, Blob: blob}, nil
}

// clock, progress and solved implement observer.
func (l *leg) clock(skew time.Duration) { l.log.SetSkew(skew) }

func (l *leg) progress(s *controlapi.StatusResponse) { l.build.publish(l.log.Translate(s)) }

// solved tells the build of a leg that failed by itself.
func (l *leg) solved(err error) {
	if err == nil {
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

func cloneSolve(req *gwpb.SolveRequest) *gwpb.SolveRequest {
	return &gwpb.SolveRequest{
		Definition: req.GetDefinition(), Frontend: req.GetFrontend(), FrontendOpt: maps.Clone(req.GetFrontendOpt()),
		AllowResultReturn: req.GetAllowResultReturn(), AllowResultArrayRef: req.GetAllowResultArrayRef(),
		Final: req.GetFinal(), ExporterAttr: req.GetExporterAttr(), CacheImports: req.GetCacheImports(),
		FrontendInputs: req.GetFrontendInputs(), Evaluate: req.GetEvaluate(), SourcePolicies: req.GetSourcePolicies(),
	}
}
