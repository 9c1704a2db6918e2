package legbuild

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
)

func TestFailure_Codes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]codes.Code{
		"failed to push localhost:1/x: unexpected status from PUT request to http://localhost:1/v2/x/manifests/y: 503 Service Unavailable":                                            codes.Unavailable,
		"failed to push x: unexpected status from POST request to http://x/v2/: 429 Too Many Requests":                                                                                codes.Unavailable,
		`failed to push x: failed to do request: Head "http://x/v2/": dial tcp 127.0.0.1:1: connect: connection refused`:                                                              codes.Unavailable,
		"failed to push x: unexpected status from PUT request to http://x/: 404 Not Found":                                                                                            codes.Unknown,
		"failed to push x: server message: insufficient_scope: authorization failed":                                                                                                  codes.Unknown,
		`process "/bin/sh -c curl || echo 'failed to do request: connection refused, unexpected status code x: 503 Service Unavailable'" did not complete successfully: exit code: 1`: codes.Unknown,
		"failed to push x: unknown: unknown error":                           codes.Unavailable,
		"failed to push x: toomanyrequests: You have reached your limit":     codes.Unavailable,
		"failed to push x: denied: requested access to the resource":         codes.Unknown,
		"failed to resolve source metadata for x: unavailable: later please": codes.Unavailable,
		"COPY 500 /x: not found":                                             codes.Unknown,
	} {
		if got := status.Code(failure(t.Context(), errors.New(text), secretive())); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
	for code, want := range map[codes.Code]codes.Code{
		codes.Canceled: codes.Aborted, codes.Unavailable: codes.Unavailable, codes.FailedPrecondition: codes.FailedPrecondition,
		codes.ResourceExhausted: codes.ResourceExhausted, codes.InvalidArgument: codes.InvalidArgument,
	} {
		if got := status.Code(failure(t.Context(), fmt.Errorf("failed to solve: %w", status.Error(code, "x")), secretive())); got != want {
			t.Errorf("%v became %v, want %v", code, got, want)
		}
	}
	if got := status.Code(failure(t.Context(), &build.LostError{Worker: "w"}, secretive())); got != codes.Unavailable {
		t.Error(got)
	}
}

func TestFailure_OfAnEndedContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := status.Code(failure(ctx, status.Error(codes.Unavailable, "x"), secretive())); got != codes.Canceled {
		t.Error(got)
	}
	ctx, cancel = context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	if got := status.Code(failure(ctx, status.Error(codes.Canceled, "x"), secretive())); got != codes.DeadlineExceeded {
		t.Error(got)
	}
}

func TestFailure_Message(t *testing.T) {
	t.Parallel()
	source := &errdefs.Source{
		Info:   &pb.SourceInfo{Filename: "Dockerfile", Data: []byte("FROM scratch\nRUN hunter2\n")},
		Ranges: []*pb.Range{{Start: &pb.Position{Line: 2}, End: &pb.Position{Line: 2}}},
	}
	err := fmt.Errorf("failed to solve: %w", errdefs.WithSource(status.Error(codes.Unknown, "exit hunter2\xff"), source))
	got := failure(t.Context(), err, secretive("hunter2")).Error()
	if want := "exit ***\uFFFD\nDockerfile:2\n--------------------\n   1 |     FROM scratch\n   2 | >>> RUN ***\n"; !strings.HasPrefix(got, want) {
		t.Errorf("%q", got)
	}
	source.Ranges = append(source.Ranges, &pb.Range{}) // which would make Print panic
	if got := failure(t.Context(), err, secretive()).Error(); got != "exit hunter2\uFFFD" {
		t.Errorf("%q", got)
	}
	if got := failure(t.Context(), errors.New(strings.Repeat("ä", maxMessage)), secretive()).Error(); len(got) > maxMessage+3 || !strings.HasSuffix(got, "…") {
		t.Errorf("%d bytes", len(got))
	}
}
