package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/moby/buildkit/solver/errdefs"
	solverpb "github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestErrors_TextAndCode(t *testing.T) {
	t.Parallel()
	const fleet = "linux/amd64 (3), linux/arm64 (5)"
	refused := status.Error(codes.PermissionDenied, "push refused")
	tests := []struct {
		name string
		err  error
		text string
		code codes.Code
	}{
		{
			"a step needs a platform that nobody has",
			&NoWorkerError{Platform: "linux/s390x", Step: "[linux/s390x 3/4] RUN make", Fleet: fleet},
			`no native worker for linux/s390x, needed by "[linux/s390x 3/4] RUN make": the farm has ` + fleet,
			codes.FailedPrecondition,
		},
		{
			"a leg needs it",
			&NoWorkerError{Platform: "linux/s390x", Fleet: fleet},
			`no native worker for linux/s390x: the farm has ` + fleet,
			codes.FailedPrecondition,
		},
		{
			"an empty farm",
			&NoWorkerError{Platform: "linux/arm64"},
			`no native worker for linux/arm64: the farm has no workers; start one with "archfarm worker"`,
			codes.FailedPrecondition,
		},
		{
			"an empty farm, in words",
			&NoWorkerError{Platform: "linux/arm64", Fleet: "no workers"},
			`no native worker for linux/arm64: the farm has no workers; start one with "archfarm worker"`,
			codes.FailedPrecondition,
		},
		{
			"workers that do not count",
			&NoWorkerError{Platform: "linux/arm64", Step: "RUN x", Fleet: fleet, Detail: "2 draining"},
			`no native worker for linux/arm64, needed by "RUN x": 2 draining; the farm has ` + fleet,
			codes.FailedPrecondition,
		},
		{
			"a step with control characters stays on one line",
			&NoWorkerError{Platform: "linux/arm64", Step: "RUN a\n\x1b[2J", Fleet: fleet},
			`no native worker for linux/arm64, needed by "RUN a\n\x1b[2J": the farm has ` + fleet,
			codes.FailedPrecondition,
		},
		{
			"a lost worker",
			&LostError{Worker: "mac-2", Cause: errors.New("connection closed")},
			"worker mac-2 was lost: connection closed",
			codes.Unavailable,
		},
		{
			"a lost worker, nobody knows how",
			&LostError{Worker: "mac-2"},
			"worker mac-2 was lost",
			codes.Unavailable,
		},
		{
			"the cause's own code does not count",
			&LostError{Worker: "mac-2", Cause: status.Error(codes.Internal, "bad frame")},
			"worker mac-2 was lost: bad frame",
			codes.Unavailable,
		},
		{
			"a leg with a plain error",
			&LegError{Platform: "linux/arm64", Worker: "mac-mini-3", Attempt: 2, Err: io.ErrUnexpectedEOF},
			"linux/arm64 on mac-mini-3 (attempt 2): unexpected EOF",
			codes.Unknown,
		},
		{
			"a leg that was never tried",
			&LegError{Platform: "linux/arm64", Err: &NoWorkerError{Platform: "linux/arm64"}},
			`linux/arm64: no native worker for linux/arm64: the farm has no workers; start one with "archfarm worker"`,
			codes.FailedPrecondition,
		},
		{
			"a leg with a status error keeps the code and loses gRPC's decoration",
			&LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1, Err: refused},
			"linux/arm64 on m (attempt 1): push refused",
			codes.PermissionDenied,
		},
		{
			"also when the status error is wrapped",
			&LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1, Err: fmt.Errorf("solving: %w", refused)},
			"linux/arm64 on m (attempt 1): solving: push refused",
			codes.PermissionDenied,
		},
		{
			"a code put on by grpcerrors",
			&LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1, Err: grpcerrors.WrapCode(errors.New("too big"), codes.ResourceExhausted)},
			"linux/arm64 on m (attempt 1): too big",
			codes.ResourceExhausted,
		},
		{
			"a cancelled leg",
			&LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1, Err: context.Canceled},
			"linux/arm64 on m (attempt 1): context canceled",
			codes.Canceled,
		},
		{
			"a leg on a lost worker",
			&LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1, Err: &LostError{Worker: "m", Cause: io.EOF}},
			"linux/arm64 on m (attempt 1): worker m was lost: EOF",
			codes.Unavailable,
		},
		{
			"no error at all is still a failure",
			&LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1},
			"linux/arm64 on m (attempt 1): unknown error",
			codes.Unknown,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if got := test.err.Error(); got != test.text {
				t.Errorf("text\n got %s\nwant %s", got, test.text)
			}
			for name, onTheWire := range map[string]error{
				"by grpc alone":   test.err,
				"by grpcerrors":   grpcerrors.ToGRPC(t.Context(), test.err),
				"through a layer": grpcerrors.ToGRPC(t.Context(), fmt.Errorf("building: %w", test.err)),
			} {
				if got := status.Code(onTheWire); got != test.code {
					t.Errorf("code %s: got %v, want %v", name, got, test.code)
				}
			}
			st, _ := status.FromError(grpcerrors.ToGRPC(t.Context(), test.err))
			if st.Message() != test.text {
				t.Errorf("message on the wire\n got %s\nwant %s", st.Message(), test.text)
			}
		})
	}
}

func TestErrors_Unwrap(t *testing.T) {
	t.Parallel()
	lost := &LostError{Worker: "m", Cause: io.EOF}
	leg := fmt.Errorf("building: %w", &LegError{Platform: "linux/arm64", Err: lost})
	var found *LostError
	if !errors.As(leg, &found) || found != lost {
		t.Error("the LostError is not found in the LegError")
	}
	if !errors.Is(leg, io.EOF) {
		t.Error("the cause is not found in the LegError")
	}
}

func TestLegError_KeepsDetailsItDoesNotKnow(t *testing.T) {
	t.Parallel()
	st, err := status.New(codes.InvalidArgument, "bad").WithDetails(durationpb.New(42))
	if err != nil {
		t.Fatal(err)
	}
	got := (&LegError{Platform: "linux/arm64", Err: st.Err()}).GRPCStatus()
	if len(got.Details()) != 1 || got.Code() != codes.InvalidArgument {
		t.Errorf("got %v", got.Proto())
	}
	if st.Message() != "bad" {
		t.Errorf("the wrapped status was changed: %v", st.Proto())
	}
}

// A Dockerfile's lines must reach the client exactly once, whether or not the
// coordinator's client has decoded them on the way.
func TestLegError_KeepsTheLinesOfTheDockerfile(t *testing.T) {
	t.Parallel()
	source := &errdefs.Source{
		Info:   &solverpb.SourceInfo{Filename: "Dockerfile", Data: []byte("FROM scratch\nRUN false\n")},
		Ranges: []*solverpb.Range{{Start: &solverpb.Position{Line: 2}, End: &solverpb.Position{Line: 2}}},
	}
	fromWorker := grpcerrors.ToGRPC(t.Context(), errdefs.WithSource(errors.New("exit code: 1"), source))
	for name, received := range map[string]error{
		"raw":     fromWorker,
		"decoded": grpcerrors.FromGRPC(fromWorker),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			leg := &LegError{Platform: "linux/arm64", Worker: "m", Attempt: 1, Err: received}
			atClient := grpcerrors.FromGRPC(grpcerrors.ToGRPC(t.Context(), leg))
			sources := errdefs.Sources(atClient)
			if len(sources) != 1 || sources[0].Info.GetFilename() != "Dockerfile" || sources[0].Ranges[0].Start.Line != 2 {
				t.Errorf("the client sees the sources %v", sources)
			}
			if want := "linux/arm64 on m (attempt 1): exit code: 1"; atClient.Error() != want {
				t.Errorf("the client sees %q, want %q", atClient, want)
			}
		})
	}
}
