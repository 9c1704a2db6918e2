package trace

import (
	"context"
	"crypto/rand"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// builder answers every call, and keeps the spans of its builds' traces.
type builder struct {
	controlapi.UnimplementedControlServer
	traces *Traces
	mu     sync.Mutex
	spans  []trace.SpanContext // of the calls
	stop   []func() []tracetest.SpanStub
}

func (b *builder) saw(ctx context.Context) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spans = append(b.spans, trace.SpanContextFromContext(ctx))
	b.stop = append(b.stop, b.traces.Record(ctx))
}

func (b *builder) Solve(ctx context.Context, _ *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	b.saw(ctx)
	return &controlapi.SolveResponse{}, nil
}

func (b *builder) Info(ctx context.Context, _ *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	b.saw(ctx)
	return &controlapi.InfoResponse{}, nil
}

// serve returns a client of a server whose calls are traced.
func serve(t *testing.T) (*builder, *grpc.ClientConn) {
	t.Helper()
	traces, err := New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := &builder{traces: traces}
	server := grpc.NewServer(grpc.StatsHandler(traces.StatsHandler()), grpc.WaitForHandlers(true))
	controlapi.RegisterControlServer(server, b)
	tracev1.RegisterTraceServiceServer(server, traces)
	l := bufconn.Listen(1 << 16)
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	conn, err := grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		running.Wait()
		if err := traces.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return b, conn
}

func names(spans []tracetest.SpanStub) []string {
	var out []string
	for _, s := range spans {
		out = append(out, s.Name)
	}
	slices.Sort(out)
	return out
}

func TestTraces_EveryBuildHasOneAndItsClientsSpansJoin(t *testing.T) {
	t.Setenv("OTEL_TRACES_EXPORTER", "none")
	synctest.Test(t, func(t *testing.T) {
		b, conn := serve(t)
		control := controlapi.NewControlClient(conn)
		const parent = "00-0102030405060708090a0b0c0d0e0f10-0102030405060708-"
		for _, traceparent := range []string{"", parent + "01", parent + "00"} {
			ctx := t.Context()
			if traceparent != "" {
				ctx = metadata.AppendToOutgoingContext(ctx, "traceparent", traceparent)
			}
			if _, err := control.Solve(ctx, &controlapi.SolveRequest{}); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := control.Info(t.Context(), &controlapi.InfoRequest{}); err != nil {
			t.Fatal(err)
		}
		id, err := trace.TraceIDFromHex(parent[3:35])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tracev1.NewTraceServiceClient(conn).Export(t.Context(), clientsSpan(id)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i, want := range []struct {
			sampled bool
			spans   []string
		}{
			{true, []string{solveMethod}}, {true, []string{"client's", solveMethod}}, {false, []string{"client's", solveMethod}}, {false, nil},
		} {
			if got := b.spans[i].IsSampled(); got != want.sampled {
				t.Errorf("call %d: sampled %v", i, got)
			}
			if got := names(b.stop[i]()); !slices.Equal(got, want.spans) {
				t.Errorf("call %d: spans %v, want %v", i, got, want.spans)
			}
		}
		if b.spans[1].TraceID() != id {
			t.Errorf("the client's trace is %v, the build's %v", id, b.spans[1].TraceID())
		}
		if b.traces.Record(t.Context()) != nil {
			t.Error("without a trace, one is recorded")
		}
	})
}

// collector is an OpenTelemetry collector.
type collector struct {
	tracev1.UnimplementedTraceServiceServer
	names chan string
}

func (c *collector) Export(_ context.Context, req *tracev1.ExportTraceServiceRequest) (*tracev1.ExportTraceServiceResponse, error) {
	for _, resource := range req.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				c.names <- span.GetName()
			}
		}
	}
	return &tracev1.ExportTraceServiceResponse{}, nil
}

func TestTraces_GoToTheCollectorThatTheEnvironmentNames(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{names: make(chan string, 10)}
	server := grpc.NewServer()
	tracev1.RegisterTraceServiceServer(server, c)
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	defer func() { server.Stop(); running.Wait() }()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+l.Addr().String())
	traces, err := New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, span := traces.provider.Tracer("test").Start(t.Context(), solveMethod)
	span.End()
	if _, err := traces.Export(t.Context(), clientsSpan(trace.TraceID{1})); err != nil {
		t.Fatal(err)
	}
	if err := traces.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := []string{<-c.names, <-c.names}
	slices.Sort(got)
	if !slices.Equal(got, []string{"client's", solveMethod}) {
		t.Errorf("the collector got %v", got)
	}
}

func clientsSpan(id trace.TraceID) *tracev1.ExportTraceServiceRequest {
	return &tracev1.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{{
		ScopeSpans: []*tracepb.ScopeSpans{{Spans: []*tracepb.Span{{Name: "client's", TraceId: id[:], SpanId: []byte("12345678")}}}},
	}}}
}

func TestNew_AnExporterThatIsNotThereIsAnError(t *testing.T) {
	t.Setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
	if _, err := New(t.Context()); err == nil {
		t.Error("no error")
	}
}

func spansOf(id trace.TraceID, n int) []sdktrace.ReadOnlySpan {
	var out tracetest.SpanStubs
	for range n {
		var span trace.SpanID
		_, _ = rand.Read(span[:])
		out = append(out, tracetest.SpanStub{Name: "s", SpanContext: trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, SpanID: span})})
	}
	return out.Snapshots()
}

func TestRecorder_TracesAreKeptWhileABuildWantsThemAndAMinute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(*testing.T) {
		r := newRecorder()
		wanted, unwanted := trace.TraceID{1}, trace.TraceID{2}
		r.add(spansOf(wanted, 2), 0) // before the build begins
		r.add(spansOf(unwanted, 2), 0)
		stop := r.record(wanted)
		time.Sleep(2 * lingering)
		r.add(spansOf(wanted, 1), 0)
		if r.traces[unwanted] != nil || r.total != 3*overhead {
			t.Errorf("kept %d traces, %d bytes", len(r.traces), r.total)
		}
		if first, again := stop(), stop(); len(first) != 3 || len(again) != 3 {
			t.Errorf("%d and then %d spans", len(first), len(again))
		}
		time.Sleep(2 * lingering)
		r.add(spansOf(unwanted, 1), 0)
		if r.traces[wanted] != nil || r.total != overhead {
			t.Errorf("kept %d traces, %d bytes", len(r.traces), r.total)
		}
	})
}

func TestRecorder_IsBounded(t *testing.T) {
	t.Parallel()
	r := newRecorder()
	r.add(spansOf(trace.TraceID{1}, 10), 5*maxTrace)
	if got := len(r.traces[trace.TraceID{1}].stubs); got != 1 {
		t.Errorf("%d spans of half the limit each are kept", got)
	}
	for i := range 100 {
		r.add(spansOf(trace.TraceID{2, byte(i)}, 1), maxTrace/2)
	}
	if r.total > maxTotal || r.total < maxTotal/2 {
		t.Errorf("%d bytes are kept", r.total)
	}
}
