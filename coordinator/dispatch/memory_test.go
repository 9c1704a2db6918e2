package dispatch_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// kills makes a worker report that its kernel has killed so many processes.
func (d *daemon) kills(n uint64) {
	d.Report(func(r *archfarmv1.Report) {
		r.Load = &archfarmv1.Load{MemoryTotalBytes: 14_200_000_000, OomKills: &n}
	})
	synctest.Wait()
}

// exited is a worker's error of a step that exited, and of which there are sources.
func exited(code uint32, text string) error {
	err := error(&gwpb.ExitError{ExitCode: code})
	if text != "" {
		err = &gwpb.ExitError{ExitCode: code, Err: errors.New(text)}
	}
	err = &stepError{err}
	return grpcerrors.ToGRPC(context.Background(), errdefs.WithSolveError(err, nil, []string{"input"}, []string{"mount"}))
}

type stepError struct{ error }

func (e *stepError) Error() string {
	return `process "/bin/sh -c make" did not complete successfully: ` + e.error.Error()
}
func (e *stepError) Unwrap() error { return e.error }

func TestMemory_AKillIsToldToTheBuildThatSuffered(t *testing.T) {
	const (
		surely   = ": the kernel of worker amd killed a process for want of memory (the machine has 14.2 GB; "
		probably = ": the kernel of worker amd killed a process for want of memory meanwhile, probably one of this step's (the machine has 14.2 GB; "
	)
	tests := map[string]struct {
		err    error
		killed uint64 // meanwhile
		others int    // slots that others use
		want   string // in the message
		silent bool   // nothing is added
	}{
		"killed":                            {exited(137, ""), 1, 0, "exit code: 137" + surely, false},
		"killed, while others ran there":    {exited(137, ""), 1, 1, "exit code: 137" + probably, false},
		"one of its processes":              {exited(2, ""), 3, 0, "exit code: 2" + probably, false},
		"BuildKit saw it":                   {exited(137, "cannot allocate memory"), 0, 1, "cannot allocate memory" + surely, false},
		"killed by somebody else":           {exited(137, ""), 0, 0, "exit code: 137", true},
		"failed by itself":                  {exited(1, ""), 0, 0, "exit code: 1", true},
		"no step at all":                    {status.Error(codes.InvalidArgument, "dockerfile parse error"), 1, 0, "dockerfile parse error", true},
		"words of a step that are no proof": {exited(1, "exit code: 137"), 0, 0, "exit code: 137", true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				d := f.worker(t, "amd", 2, amd64)
				d.kills(7)
				d.Occupy(tt.others)
				d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) {
					n := 7 + tt.killed
					d.Silently(func(r *archfarmv1.Report) {
						r.Load = &archfarmv1.Load{MemoryTotalBytes: 14_200_000_000, OomKills: &n}
					})
					return nil, tt.err
				}
				b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
				_, err := b.Solve(t.Context(), frontend(amd64))
				if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "the kernel") == tt.silent {
					t.Fatalf("got  %v\nwant %s", err, tt.want)
				}
				if status.Code(err) != status.Code(tt.err) {
					t.Errorf("the code is %s", status.Code(err))
				}
				if len(status.Convert(err).Details()) != len(status.Convert(tt.err).Details()) {
					t.Errorf("details were lost: %v", status.Convert(err).Details())
				}
				if strings.Count(err.Error(), "the kernel") > 1 {
					t.Errorf("told twice: %v", err)
				}
				var solve *errdefs.SolveError
				if tt.want != "dockerfile parse error" && !errors.As(grpcerrors.FromGRPC(err), &solve) {
					t.Error("the step cannot be looked into any more")
				}
			})
		})
	}
}

func TestMemory_AnAgentThatDoesNotAnswerDelaysABuildsErrorByTwoSeconds(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.kills(7)
		d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) {
			d.Deafen()
			return nil, exited(137, "")
		}
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		start := time.Now()
		_, err := b.Solve(t.Context(), frontend(amd64))
		if took := time.Since(start); took < 2*time.Second || took > 3*time.Second || err == nil || strings.Contains(err.Error(), "kernel") {
			t.Errorf("after %s: %v", took, err)
		}
	})
}

func TestMemory_AWorkerThatDoesNotTellIsNotAsked(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.Deafen()
		d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { return nil, exited(137, "") }
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		start := time.Now()
		if _, err := b.Solve(t.Context(), frontend(amd64)); err == nil || time.Since(start) > time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}
