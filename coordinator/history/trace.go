package history

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	"go.opentelemetry.io/otel/trace"
)

// maxTrace bounds the trace of one leg, in bytes.
const maxTrace = 32 << 20

// finalizer is a record whose trace is not complete yet.
type finalizer struct {
	wanted chan struct{} // closed when somebody waits for it
	once   sync.Once
	done   chan struct{}
}

func newFinalizer() *finalizer {
	return &finalizer{wanted: make(chan struct{}), done: make(chan struct{})}
}

// release tells that nothing more will come for a record.
func (h *History) release(r *Recorder) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.finalizers[r.ref] == r.finalizer {
		delete(h.finalizers, r.ref)
	}
	close(r.finalizer.done)
}

// finalize completes the trace of a record now. There may be nothing to do.
func (h *History) finalize(ctx context.Context, ref string) error {
	h.mu.Lock()
	f := h.finalizers[ref]
	h.mu.Unlock()
	if f == nil {
		return nil
	}
	f.once.Do(func() { close(f.wanted) })
	return wait(ctx, f.done)
}

// trace adds the trace to a stored record, once somebody wants it or all spans
// can be expected to have come.
func (h *History) trace(ctx context.Context, r *Recorder, stored bool) {
	if r.spans == nil {
		return
	}
	if !stored {
		r.spans()
		return
	}
	patience := time.NewTimer(tracePatience)
	defer patience.Stop()
	select {
	case <-patience.C:
	case <-r.finalizer.wanted:
	case <-h.ending:
	}
	t := newTrace(r.traceID)
	for _, span := range r.spans() {
		t.addSpan(span)
	}
	h.addLegs(ctx, t, r.outcome.legs)
	if len(t.spans) == 0 {
		return
	}
	if err := h.addTrace(ctx, r.ref, t); err != nil {
		h.options.Log.Error("the build history lacks a trace", "build", r.ref, "error", err)
	}
}

// addLegs adds what the workers have traced of the legs.
func (h *History) addLegs(ctx context.Context, t *spanSet, legs []Leg) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	var mu sync.Mutex
	var fetching sync.WaitGroup
	for _, l := range legs {
		fetching.Go(func() {
			raw, err := h.legTrace(ctx, l)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				err = t.addBlob(raw)
			}
			if err != nil {
				h.options.Log.Info("the trace of a build lacks a leg", "worker", l.Worker, "error", err)
			}
		})
	}
	fetching.Wait()
}

// legTrace returns the trace of a leg, complete; nil when there is none.
func (h *History) legTrace(ctx context.Context, l Leg) ([]byte, error) {
	conn, err := h.options.Workers.BuildKit(ctx, l.Worker)
	if err != nil {
		return nil, err
	}
	if _, err := controlapi.NewControlClient(conn).UpdateBuildHistory(ctx, &controlapi.UpdateBuildHistoryRequest{Ref: l.Ref, Finalize: true}); err != nil {
		return nil, err
	}
	record, err := RecordOf(ctx, controlapi.NewControlClient(conn), l.Ref)
	if err != nil || record.GetTrace() == nil {
		return nil, err
	}
	return read(ctx, proxy.NewContentStore(contentapi.NewContentClient(conn)), Descriptor(record.GetTrace()), maxTrace)
}

func (h *History) addTrace(ctx context.Context, ref string, t *spanSet) error {
	hold := h.records.blobs.hold()
	defer hold.release(ctx)
	desc, err := hold.add(typeTrace, t.encode())
	if err != nil {
		return err
	}
	if err := hold.persist(ctx, desc.Digest); err != nil {
		return err
	}
	return h.change(ctx, ref, func(record *controlapi.BuildHistoryRecord, e *extent) {
		record.Trace = apiDescriptor(desc)
		e.Blobs = append(e.Blobs, blob{Digest: desc.Digest, Size: desc.Size})
	})
}

// spanSet is a trace: JSON objects as BuildKit writes them, each span once.
type spanSet struct {
	id    trace.TraceID
	seen  map[string]bool
	spans []json.RawMessage
}

func newTrace(id trace.TraceID) *spanSet { return &spanSet{id: id, seen: map[string]bool{}} }

// addSpan adds one span of the coordinator's own.
func (t *spanSet) addSpan(span any) {
	if raw, err := json.Marshal(span); err == nil { // a span with values that JSON has not is left out
		t.add(raw)
	}
}

// addBlob adds the spans of another trace blob that are of this trace.
func (t *spanSet) addBlob(blob []byte) error {
	in := json.NewDecoder(bytes.NewReader(blob))
	for {
		var raw json.RawMessage
		if err := in.Decode(&raw); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return fmt.Errorf("reading a trace: %w", err)
		}
		t.add(raw)
	}
}

func (t *spanSet) add(raw json.RawMessage) {
	var span struct {
		SpanContext struct{ TraceID, SpanID string }
	}
	if json.Unmarshal(raw, &span) != nil || span.SpanContext.TraceID != t.id.String() || t.seen[span.SpanContext.SpanID] {
		return
	}
	t.seen[span.SpanContext.SpanID] = true
	t.spans = append(t.spans, raw)
}

// encode writes one object after the other.
func (t *spanSet) encode() []byte {
	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetIndent("", "  ")
	for _, span := range t.spans {
		_ = enc.Encode(span) // it was JSON, and a buffer takes everything
	}
	return out.Bytes()
}
