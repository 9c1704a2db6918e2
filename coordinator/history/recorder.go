package history

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/identity"
)

// Recorder writes the record of one build. A nil Recorder writes nothing: that
// of a build which leaves no record.
type Recorder struct {
	h        *History
	ref      string
	tenant   string                         // whose build it is
	started  *controlapi.BuildHistoryRecord // as it was when the build began; does not change
	progress *progress.Stream
	traceID  trace.TraceID
	spans    func() []tracetest.SpanStub

	mu       sync.Mutex
	legs     []*legRecord
	metadata map[string][]byte
	images   map[int]ocispecs.Descriptor
	hold     *hold // of what the record is going to name
	fetching sync.WaitGroup

	answered chan struct{} // closed when the client has its answer: outcome is set
	outcome  outcome
	visible  chan struct{} // closed when record is complete, or given up
	record   *controlapi.BuildHistoryRecord
	stored   chan struct{} // closed when it is in the store, or given up

	finalizer *finalizer
}

// outcome is how a build ended.
type outcome struct {
	completed time.Time
	legs      []Leg
	err       error
}

// Begin starts the record of a build. Complete must be called, and progress be
// closed. The trace is that of ctx, which may end before.
func (h *History) Begin(ctx context.Context, req *controlapi.SolveRequest, exporters []*controlapi.Exporter, stream *progress.Stream) *Recorder {
	if h.options.Disabled || req.GetInternal() {
		return nil
	}
	r := &Recorder{
		h: h, ref: req.GetRef(), tenant: identity.FromContext(ctx).Tenant, progress: stream,
		images: map[int]ocispecs.Descriptor{}, started: begun(req, exporters), hold: h.records.blobs.hold(),
		answered: make(chan struct{}), visible: make(chan struct{}), stored: make(chan struct{}), finalizer: newFinalizer(),
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closing { // nobody waits for it any more
		return nil
	}
	if h.options.Spans != nil {
		r.traceID = trace.SpanContextFromContext(ctx).TraceID()
		r.spans = h.options.Spans.Record(ctx)
	}
	h.running[r.ref] = r
	h.tell(r.tenant, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_STARTED, Record: r.started})
	own := h.detached(ctx)
	h.work.Go(func() { r.run(own) }) // ends some time after Complete, every wait being bounded
	return r
}

// detached is a context of the same trace, for what outlives a call, whose own context
// would keep the call's connection in memory.
func (h *History) detached(ctx context.Context) context.Context {
	return trace.ContextWithSpanContext(h.ctx, trace.SpanContextFromContext(ctx))
}

// begun is the record of a build that has just begun.
func begun(req *controlapi.SolveRequest, exporters []*controlapi.Exporter) *controlapi.BuildHistoryRecord {
	record := &controlapi.BuildHistoryRecord{
		Ref: req.GetRef(), Frontend: req.GetFrontend(), FrontendAttrs: maps.Clone(req.GetFrontendAttrs()), CreatedAt: timestamppb.Now(),
	}
	if record.Frontend == "gateway.v0" && record.FrontendAttrs["source"] == builtin { // a buildkitd runs its own
		record.Frontend = builtin
		delete(record.FrontendAttrs, "source")
	}
	for _, e := range exporters {
		record.Exporters = append(record.Exporters, &controlapi.Exporter{Type: e.GetType(), Attrs: maps.Clone(e.GetAttrs())})
	}
	return record
}

// builtin is the frontend that a buildkitd has inside.
const builtin = "dockerfile.v0"

// Built tells that the legs have finished, and what the client's frontend
// returned with their result. What their workers remember of them is fetched
// from now on.
func (r *Recorder) Built(ctx context.Context, legs []Leg, metadata map[string][]byte) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.metadata = metadata
	own := r.h.detached(ctx)
	for _, leg := range legs {
		l := &legRecord{Leg: leg}
		r.legs = append(r.legs, l)
		r.fetching.Go(func() { r.fetch(own, l) }) // bounded by fetchTimeout
	}
}

// Image tells what an exporter, by its place in the request, has exported from
// several legs. It replaces what the legs exported for it.
func (r *Recorder) Image(exporter int, desc ocispecs.Descriptor, data []byte) {
	if r == nil {
		return
	}
	if _, err := r.hold.add(desc.MediaType, data); err != nil {
		r.h.options.Log.Error("the build history lacks an image", "build", r.ref, "error", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.images[exporter] = desc
}

// Complete tells how the build has ended, when its client is answered: err is
// what that is told, as a gRPC status. The record appears when the progress is
// closed and the legs' workers have answered.
func (r *Recorder) Complete(legs []Leg, err error) {
	if r == nil {
		return
	}
	r.h.mu.Lock() // so that nobody lists the build as running who knows that it is not
	defer r.h.mu.Unlock()
	r.outcome = outcome{completed: time.Now(), legs: legs, err: err}
	close(r.answered)
}

func (r *Recorder) wasAnswered() bool {
	select {
	case <-r.answered:
		return true
	default:
		return false
	}
}

// run writes the record, from the beginning of the build until its trace is
// complete.
func (r *Recorder) run(ctx context.Context) {
	logs := r.follow(ctx)
	<-r.answered
	r.fetching.Wait()
	err := r.assemble(logs)
	r.h.publish(r, err)
	defer r.h.release(r)
	if err == nil {
		err = r.store(ctx)
	}
	if err != nil {
		r.h.options.Log.Error("the build history lacks a build", "build", r.ref, "error", err)
	}
	r.h.settle(r, err)
	r.hold.release(ctx)
	r.h.trace(ctx, r, err == nil)
}

// follow takes the build's progress until that is closed, but not for long once
// the build has been answered.
func (r *Recorder) follow(ctx context.Context) *logs {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watching := make(chan struct{})
	defer close(watching)
	go func() { // ends with follow
		select {
		case <-r.answered:
		case <-watching:
			return
		}
		select {
		case <-time.After(progressGrace):
			cancel()
		case <-watching:
		}
	}()
	l := &logs{hold: r.hold}
	if err := r.progress.Follow(ctx, func(m *controlapi.StatusResponse) error { return l.add(m) }); err != nil {
		r.h.options.Log.Warn("the logs in the build history are not complete", "build", r.ref, "error", err)
	}
	return l
}

// assemble makes the record.
func (r *Recorder) assemble(l *logs) error {
	desc, err := l.finish()
	if err != nil {
		return err
	}
	record := proto.CloneOf(r.started)
	record.CompletedAt = timestamppb.New(r.outcome.completed)
	record.Logs = apiDescriptor(desc)
	record.NumTotalSteps, record.NumCachedSteps, record.NumCompletedSteps = l.steps.total, l.steps.cached, l.steps.completed
	record.NumWarnings = l.steps.warnings
	merge(record, r.legs, r.metadata, r.images)
	tellLegs(record, r.outcome.legs)
	if r.outcome.err != nil {
		if err := r.fail(record); err != nil {
			return err
		}
	}
	r.record = record
	return nil
}

// fail adds the build's error: its details are a blob of their own.
func (r *Recorder) fail(record *controlapi.BuildHistoryRecord) error {
	st := status.Convert(r.outcome.err).Proto()
	st.Message = strings.ToValidUTF8(st.GetMessage(), "\uFFFD")
	raw, err := proto.Marshal(st)
	if err != nil {
		return fmt.Errorf("recording the build's error: %w", err)
	}
	desc, err := r.hold.add(typeError, raw)
	if err != nil {
		return err
	}
	st.Details = nil
	record.Error, record.ExternalError = st, apiDescriptor(desc)
	return nil
}

// store copies what the record's results consist of, and writes everything to the
// store.
func (r *Recorder) store(ctx context.Context) error {
	e := r.gather(ctx)
	e.Tenant = r.tenant
	if err := r.hold.persist(ctx, e.digests()...); err != nil {
		return err
	}
	defer r.h.changes.lock(r.ref)()
	return r.h.records.put(ctx, r.record, e)
}

// publish makes a record visible, unless it could not be made. From then on its
// trace is awaited, until release.
func (h *History) publish(r *Recorder, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer close(r.visible)
	if h.running[r.ref] == r {
		delete(h.running, r.ref)
	}
	if err != nil {
		return
	}
	delete(h.deleted, r.ref)
	h.fresh[r.ref], h.finalizers[r.ref] = r, r.finalizer
	h.tell(r.tenant, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: r.record})
}

// settle tells that a record is in the store, or will never be.
func (h *History) settle(r *Recorder, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer close(r.stored)
	if h.fresh[r.ref] != r {
		return
	}
	delete(h.fresh, r.ref)
	if err != nil {
		h.tell(r.tenant, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_DELETED, Record: &controlapi.BuildHistoryRecord{Ref: r.ref}})
	}
}

// named lists what a record names directly.
func named(record *controlapi.BuildHistoryRecord) []*controlapi.Descriptor {
	out := []*controlapi.Descriptor{record.GetLogs(), record.GetTrace(), record.GetExternalError()}
	for _, info := range infos(record) {
		out = append(out, info.GetAttestations()...)
		out = slices.AppendSeq(out, maps.Values(info.GetResults()))
	}
	return slices.DeleteFunc(out, func(d *controlapi.Descriptor) bool { return d == nil })
}

// infos lists the results of a record.
func infos(record *controlapi.BuildHistoryRecord) []*controlapi.BuildResultInfo {
	out := slices.Collect(maps.Values(record.GetResults()))
	if record.GetResult() != nil {
		out = append(out, record.GetResult())
	}
	return out
}
