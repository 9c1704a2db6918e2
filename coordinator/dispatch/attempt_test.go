package dispatch

import (
	"testing"
	"time"

	"go.opentelemetry.io/otel/baggage"
	oteltrace "go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/metadata"
)

func TestOutgoing_KeepsTheTraceAndDropsTheRest(t *testing.T) {
	t.Parallel()
	bag, err := baggage.Parse("who=client")
	if err != nil {
		t.Fatal(err)
	}
	span := oteltrace.NewSpanContext(oteltrace.SpanContextConfig{TraceID: oteltrace.TraceID{1}, SpanID: oteltrace.SpanID{2}, TraceFlags: oteltrace.FlagsSampled})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "buildkit-controlapi-buildid", "the client's")
	ctx = baggage.ContextWithBaggage(oteltrace.ContextWithSpanContext(ctx, span), bag)
	got, _ := metadata.FromOutgoingContext(outgoing(ctx))
	want := metadata.Pairs("traceparent", "00-01000000000000000000000000000000-0200000000000000-01", "baggage", "who=client")
	if len(got) != len(want) || got.Get("traceparent")[0] != want.Get("traceparent")[0] || got.Get("baggage")[0] != want.Get("baggage")[0] {
		t.Errorf("sent %v, want %v", got, want)
	}
	if none, _ := metadata.FromOutgoingContext(outgoing(metadata.AppendToOutgoingContext(t.Context(), "a", "b"))); len(none) > 0 {
		t.Errorf("without a trace: %v", none)
	}
}

func TestClockSkew_IsReadFromBuildKitsHeader(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for name, test := range map[string]struct {
		header metadata.MD
		want   time.Duration
		known  bool
	}{
		"ahead":    {metadata.Pairs("buildkit-current-timestamp", now.Add(time.Minute).Format(time.RFC3339Nano)), -time.Minute, true},
		"no time":  {metadata.Pairs("buildkit-current-timestamp", "noon"), 0, false},
		"none":     {nil, 0, false},
		"other":    {metadata.Pairs("date", now.Format(time.RFC3339Nano)), 0, false},
		"too many": {metadata.Pairs("buildkit-current-timestamp", "a", "buildkit-current-timestamp", "b"), 0, false},
	} {
		if got, known := clockSkew(test.header, now); got != test.want || known != test.known {
			t.Errorf("%s: %v, %v", name, got, known)
		}
	}
}
