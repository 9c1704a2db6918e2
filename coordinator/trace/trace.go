// Package trace keeps the spans of builds while they run, as a buildkitd does: the
// coordinator's own, and what clients and steps report by OTLP. They also go to an
// OpenTelemetry collector, if the environment names one.
package trace

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/moby/buildkit/util/tracing"
	"github.com/moby/buildkit/util/tracing/detect"
	"github.com/moby/buildkit/util/tracing/forwarder"
	"github.com/moby/buildkit/util/tracing/transform"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/proto"
)

// nameService sets what spans say they are from, which is the process's.
var nameService = sync.OnceFunc(func() { detect.ServiceName = "archfarm" })

// solveMethod is the call that begins a trace when its client has none.
const solveMethod = "moby.buildkit.v1.Control/Solve"

// Propagator reads and writes the W3C keys that join the spans of both ends of a
// call.
var Propagator = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})

// Traces are the traces of a coordinator. It serves OTLP's TraceService.
type Traces struct {
	tracev1.UnimplementedTraceServiceServer

	recorder  *recorder
	provider  *sdktrace.TracerProvider
	forwarder *forwarder.Exporter // nil: there is no collector
}

// New reads the environment (OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_*,
// OTEL_SERVICE_NAME, …) as a buildkitd does. Shutdown must be called.
func New(ctx context.Context) (*Traces, error) {
	nameService()
	t := &Traces{recorder: newRecorder()}
	options := []sdktrace.TracerProviderOption{
		sdktrace.WithResource(detect.Resource()), sdktrace.WithSyncer(t.recorder), sdktrace.WithSampler(sdktrace.ParentBased(builds{})),
	}
	collector, err := detect.NewSpanExporter(ctx)
	if err != nil {
		return nil, fmt.Errorf("finding the OpenTelemetry collector that the environment names: %w", err)
	}
	if collector != nil && !detect.IsNoneSpanExporter(collector) {
		options = append(options, sdktrace.WithBatcher(collector))
		if t.forwarder, err = forwarder.New(ctx, collector); err != nil {
			return nil, fmt.Errorf("forwarding traces: %w", err)
		}
	}
	t.provider = sdktrace.NewTracerProvider(options...)
	return t, nil
}

// builds begins a trace with each build that has none, and with no other call:
// nobody would ask for it.
type builds struct{}

func (builds) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	result := sdktrace.SamplingResult{Tracestate: trace.SpanContextFromContext(p.ParentContext).TraceState()}
	if p.Name == solveMethod {
		result.Decision = sdktrace.RecordAndSample
	}
	return result
}

func (builds) Description() string { return "builds" }

// StatsHandler makes a span of every call that a gRPC server takes.
func (t *Traces) StatsHandler() stats.Handler {
	return tracing.ServerStatsHandler(
		otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(Propagator), otelgrpc.WithMeterProvider(metricnoop.NewMeterProvider()),
	)
}

// Export takes spans that a client reports. It never fails for want of room: a
// client's build must not suffer from its trace.
func (t *Traces) Export(ctx context.Context, req *tracev1.ExportTraceServiceRequest) (*tracev1.ExportTraceServiceResponse, error) {
	spans := transform.Spans(req.GetResourceSpans())
	t.recorder.add(spans, proto.Size(req))
	if t.forwarder != nil {
		if err := t.forwarder.ExportSpans(ctx, spans); err != nil {
			return nil, err
		}
	}
	return &tracev1.ExportTraceServiceResponse{}, nil
}

// Record keeps the spans of ctx's trace until stop is called, which returns them;
// stop is nil when ctx has no trace.
func (t *Traces) Record(ctx context.Context) (stop func() []tracetest.SpanStub) {
	span := trace.SpanContextFromContext(ctx)
	if !span.IsValid() {
		return nil
	}
	return t.recorder.record(span.TraceID())
}

// Shutdown lets the collector have what is on its way.
func (t *Traces) Shutdown(ctx context.Context) error {
	err := t.provider.Shutdown(ctx)
	if t.forwarder != nil {
		err = errors.Join(err, t.forwarder.Shutdown(ctx))
	}
	return err
}
