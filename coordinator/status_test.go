package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/build"
)

// detailed is a status as workers return them.
func detailed(t *testing.T) error {
	t.Helper()
	s, err := status.New(codes.NotFound, "no such file").WithDetails(&errdetails.ErrorInfo{Reason: "Dockerfile:3"})
	if err != nil {
		t.Fatal(err)
	}
	return s.Err()
}

func TestAsStatus_AWorkersStatusPassesUntouched(t *testing.T) {
	t.Parallel()
	want := detailed(t)
	for name, err := range map[string]error{
		"itself":      want,
		"of one leg":  &build.LegError{Platform: "linux/arm64", Worker: "mac-1", Attempt: 1, Err: want},
		"and another": &build.LegError{Platform: "linux/arm64", Err: want},
	} {
		got := status.Convert(asStatus(t.Context(), err))
		if got.Code() != codes.NotFound {
			t.Errorf("%s: code %s", name, got.Code())
		}
		if len(got.Details()) != 1 || got.Details()[0].(*errdetails.ErrorInfo).GetReason() != "Dockerfile:3" {
			t.Errorf("%s: details %v", name, got.Details())
		}
	}
	if got := asStatus(t.Context(), want); !proto.Equal(status.Convert(got).Proto(), status.Convert(want).Proto()) {
		t.Errorf("changed to %v", got)
	}
}

func TestAsStatus_TheTextAroundAStatusIsKept(t *testing.T) {
	t.Parallel()
	got := status.Convert(asStatus(t.Context(), fmt.Errorf("reading the index of worker amd-1: %w", status.Error(codes.Unavailable, "gone"))))
	if got.Code() != codes.Unavailable || got.Message() != "reading the index of worker amd-1: rpc error: code = Unavailable desc = gone" {
		t.Errorf("code %s, message %q", got.Code(), got.Message())
	}
}

func TestAsStatus_BuildKitsTypedErrorsReachTheClient(t *testing.T) {
	t.Parallel()
	typed := errdefs.WithSource(errors.New("no such step"), &errdefs.Source{Info: &pb.SourceInfo{Filename: "Dockerfile"}})
	back := grpcerrors.FromGRPC(asStatus(t.Context(), typed))
	if sources := errdefs.Sources(back); len(sources) != 1 || sources[0].GetInfo().GetFilename() != "Dockerfile" {
		t.Errorf("arrives with the sources %v", sources)
	}
}

func TestAsStatus_EveryErrorHasACode(t *testing.T) {
	t.Parallel()
	for want, err := range map[codes.Code]error{
		codes.OK:                 nil,
		codes.Canceled:           context.Canceled,
		codes.DeadlineExceeded:   context.DeadlineExceeded,
		codes.FailedPrecondition: &build.NoWorkerError{Platform: "linux/s390x"},
		codes.Unavailable:        &build.LostError{Worker: "mac-1"},
		codes.Unknown:            errors.New("anything"),
	} {
		if got := status.Code(asStatus(t.Context(), err)); got != want {
			t.Errorf("%v has code %s, want %s", err, got, want)
		}
	}
}

func TestInterceptors_AnswerWithAStatus(t *testing.T) {
	t.Parallel()
	c := &coordinator{log: slog.New(slog.DiscardHandler)}
	call, stream := &grpc.UnaryServerInfo{FullMethod: "/a/Call"}, &grpc.StreamServerInfo{FullMethod: "/a/Stream"}
	_, err := c.unary(t.Context(), nil, call, func(context.Context, any) (any, error) { return nil, &build.LostError{Worker: "mac-1"} })
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a call ends with %v", err)
	}
	err = c.stream(nil, serverStream{ctx: t.Context()}, stream, func(any, grpc.ServerStream) error { return context.Canceled })
	if status.Code(err) != codes.Canceled {
		t.Errorf("a stream ends with %v", err)
	}
	resp, err := c.unary(t.Context(), 1, call, func(_ context.Context, req any) (any, error) { return req, nil })
	if resp != 1 || err != nil {
		t.Errorf("a call that works ends with %v, %v", resp, err)
	}
}

func TestInterceptors_APanicEndsItsCallOnly(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	c := &coordinator{log: slog.New(slog.NewTextHandler(&log, nil))}
	_, err := c.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/a/Call"}, func(context.Context, any) (any, error) { panic("oops") })
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "/a/Call") || strings.Contains(err.Error(), "oops") {
		t.Errorf("a call that panics ends with %v", err)
	}
	err = c.stream(nil, serverStream{ctx: t.Context()}, &grpc.StreamServerInfo{FullMethod: "/a/Stream"}, func(any, grpc.ServerStream) error { panic("oops") })
	if status.Code(err) != codes.Internal {
		t.Errorf("a stream that panics ends with %v", err)
	}
	if strings.Count(log.String(), "cause=oops") != 2 {
		t.Errorf("the log does not tell of both: %s", log.String())
	}
}

type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s serverStream) Context() context.Context { return s.ctx }
