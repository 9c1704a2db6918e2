package trace

import (
	"context"
	"sync"
	"time"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
)

const (
	// lingering is for how long spans are kept that belong to no build: a client may
	// report some before it starts one (BuildKit util/tracing/detect/recorder.go).
	lingering = time.Minute
	// maxTrace and maxTotal bound the spans of one trace and of all, in bytes as they
	// arrived. What comes beyond is left out.
	maxTrace = 16 << 20
	maxTotal = 128 << 20
	// overhead is what a span counts for at least.
	overhead = 1 << 10
)

// recorder keeps spans by their trace.
type recorder struct {
	mu     sync.Mutex
	traces map[trace.TraceID]*spans
	total  int // of all sizes
	swept  time.Time
}

type spans struct {
	stubs  []tracetest.SpanStub
	size   int
	last   time.Time
	builds int // that want them
}

func newRecorder() *recorder { return &recorder{traces: map[trace.TraceID]*spans{}} }

// record keeps a trace until stop is called.
func (r *recorder) record(id trace.TraceID) (stop func() []tracetest.SpanStub) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.of(id).builds++
	return sync.OnceValue(func() []tracetest.SpanStub {
		r.mu.Lock()
		defer r.mu.Unlock()
		kept := r.of(id)
		kept.builds--
		return kept.stubs[:len(kept.stubs):len(kept.stubs)]
	})
}

// of returns the spans of a trace. r.mu is held.
func (r *recorder) of(id trace.TraceID) *spans {
	s, ok := r.traces[id]
	if !ok {
		s = &spans{last: time.Now()}
		r.traces[id] = s
	}
	return s
}

// ExportSpans takes the coordinator's own spans.
func (r *recorder) ExportSpans(_ context.Context, own []sdktrace.ReadOnlySpan) error {
	r.add(own, 0)
	return nil
}

// Shutdown does nothing.
func (r *recorder) Shutdown(context.Context) error { return nil }

// add takes spans that arrived with so many bytes, as long as there is room.
func (r *recorder) add(all []sdktrace.ReadOnlySpan, size int) {
	if len(all) == 0 {
		return
	}
	each := size/len(all) + overhead
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sweep(now)
	for _, span := range all {
		if r.total+each > maxTotal {
			return
		}
		s := r.of(span.SpanContext().TraceID())
		s.last = now
		if s.size+each > maxTrace {
			continue
		}
		s.size += each
		r.total += each
		s.stubs = append(s.stubs, tracetest.SpanStubFromReadOnlySpan(span))
	}
}

// sweep forgets, every now and then, what no build wants. r.mu is held.
func (r *recorder) sweep(now time.Time) {
	if now.Sub(r.swept) < lingering/4 {
		return
	}
	r.swept = now
	for id, s := range r.traces {
		if s.builds == 0 && now.Sub(s.last) > lingering {
			r.total -= s.size
			delete(r.traces, id)
		}
	}
}
