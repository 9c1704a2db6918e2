package dispatch_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// resilient has legs go on elsewhere.
func (f *farm) resilient(attempts int, wait time.Duration) {
	f.Attempts, f.FailoverWait = attempts, wait
}

// spare is a build of one leg on the first of two workers, and the reference of its result.
func spare(t *testing.T, f *farm) (b *dispatch.Build, ref string, first, second *daemon) {
	t.Helper()
	first = f.worker(t, "amd-1", 1, amd64)
	b, _ = f.begin(t.Context(), t, request("b", amd64, "registry/x:1"))
	resp := must(b.Solve(t.Context(), frontend(amd64)))(t)
	return b, resp.GetResult().GetRef().GetId(), first, f.worker(t, "amd-2", 1, amd64)
}

func TestRescue_WhatTheClientKnowsIsTheNextWorkers(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(3, time.Minute)
		b, ref, first, second := spare(t, f)
		if ref != "amd-1-1" {
			t.Fatalf("the result is %q", ref)
		}
		first.Kill()
		file := must(b.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: ref, FilePath: "/etc/x"}))(t)
		if got := string(file.GetData()); got != "amd-2:amd-2-1:/etc/x" {
			t.Errorf("the file is %q", got)
		}
		must(b.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: ref}))(t)
		if second.called("Evaluate amd-2-1") != 1 {
			t.Error("the result was not evaluated under the second worker's name")
		}
		result := &gwpb.Result{
			Result:   &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: ref}},
			Metadata: map[string][]byte{exptypes.ExporterImageConfigKey: []byte("amd-1"), "mine": []byte("kept")},
		}
		if err := b.Return(&gwpb.ReturnRequest{Result: result}); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Export(t.Context(), must(b.Result(t.Context()))(t)); err != nil {
			t.Fatal(err)
		}
		got := second.attempts()[0].result
		if id := got.GetRef().GetId(); id != "amd-2-1" {
			t.Errorf("the second worker was returned %q", id)
		}
		if config, mine := got.GetMetadata()[exptypes.ExporterImageConfigKey], got.GetMetadata()["mine"]; string(config) != "amd-2" || string(mine) != "kept" {
			t.Errorf("the second worker was returned the metadata %q", got.GetMetadata())
		}
		b.End(nil)
		f.idle(t, second)
	})
}

func TestRescue_NobodyNeedAsk(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(3, time.Minute)
		b, _, first, second := spare(t, f)
		first.Cut()
		synctest.Wait()
		if second.called("Solve") != 1 {
			t.Error("the second worker was not asked until somebody wanted something")
		}
		b.End(nil)
		f.idle(t, second)
	})
}

func TestRescue_ACallThatIsUnderWayIsAskedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(3, time.Minute)
		first := f.worker(t, "amd-1", 1, amd64)
		first.Frontend = func(ctx context.Context, _ *gwpb.SolveRequest) (*gwpb.Result, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		b, _ := f.begin(t.Context(), t, request("b", both, "registry/x:1"))
		f.worker(t, "arm-1", 1, arm64)
		var resp *gwpb.SolveResponse
		done := beside(func() (err error) { resp, err = b.Solve(t.Context(), frontend(both)); return err })
		synctest.Wait()
		f.worker(t, "amd-2", 1, amd64)
		first.Kill()
		if err := done(t); err != nil {
			t.Fatal(err)
		}
		if refs := resp.GetResult().GetRefs().GetRefs(); refs[amd64].GetId() != "amd-2-1" || refs[arm64].GetId() != "arm-1-1" {
			t.Errorf("the result is %v", refs)
		}
	})
}

func TestRescue_AttemptsAreBounded(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(2, time.Minute)
		b, ref, first, second := spare(t, f)
		third := f.worker(t, "amd-3", 1, amd64)
		first.Kill()
		must(b.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: ref}))(t)
		for _, d := range []*daemon{second, third} {
			if d.called("Solve") > 0 {
				d.Kill()
			}
		}
		_, err := b.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: ref})
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "attempt 2 of 2") || !strings.Contains(err.Error(), "amd-1") {
			t.Errorf("got %v", err)
		}
		if n := second.called("Solve") + third.called("Solve"); n != 1 {
			t.Errorf("%d workers were tried after the first, want 1", n)
		}
	})
}

// TestRescue_AnotherWorkerIsPreferred loses a BuildKit whose agent stays, and is ready again at once.
func TestRescue_AnotherWorkerIsPreferred(t *testing.T) {
	for name, test := range map[string]struct {
		ready time.Duration // when the other worker is; 0: never
		on    string
		after time.Duration
	}{
		"it is ready in a moment":  {3 * time.Second, "amd-2", 3 * time.Second},
		"it is not, for too long":  {time.Hour, "amd-1", 10 * time.Second},
		"it leaves while it is so": {0, "amd-1", 4 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.resilient(2, time.Minute)
				_, _, first, second := spare(t, f)
				second.Become(archfarmv1.Worker_STATE_CORDONED)
				synctest.Wait()
				first.Cut()
				begun := time.Now()
				if test.ready == 0 {
					time.AfterFunc(test.after, second.Kill)
				} else {
					time.AfterFunc(test.ready, func() { second.Become(archfarmv1.Worker_STATE_READY) })
				}
				attempts := func() int { return len(first.attempts()) + len(second.attempts()) }
				for attempts() < 2 && time.Since(begun) < time.Minute {
					time.Sleep(100 * time.Millisecond)
				}
				on := map[bool]string{true: "amd-1", false: "amd-2"}[len(first.attempts()) == 2]
				if took := time.Since(begun); attempts() != 2 || on != test.on || took < test.after || took > test.after+2*time.Second {
					t.Errorf("%d attempts, the last on %s, after %s", attempts(), on, took)
				}
			})
		})
	}
}

// TestRescue_ALostWorkerIsTakenBackOnceItAnswers has the only worker's BuildKit take connections before it can answer:
// that costs no attempt.
func TestRescue_ALostWorkerIsTakenBackOnceItAnswers(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(2, time.Minute)
		only := f.worker(t, "amd-1", 1, amd64)
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		ref := must(b.Solve(t.Context(), frontend(amd64)))(t).GetResult().GetRef().GetId()
		up := time.Now().Add(30 * time.Second)
		only.Ping = func(ctx context.Context) error {
			if time.Now().Before(up) {
				<-ctx.Done()
			}
			return ctx.Err()
		}
		only.Cut()
		time.Sleep(time.Until(up) - time.Second)
		synctest.Wait()
		if n := len(only.attempts()); n != 1 {
			t.Fatalf("%d attempts were begun before it answered", n)
		}
		must(b.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: ref}))(t)
		if late := time.Since(up); late > 10*time.Second || len(only.attempts()) != 2 {
			t.Errorf("%d attempts, the last %s after it answered", len(only.attempts()), late)
		}
		b.End(nil)
		f.idle(t, only)
	})
}

// TestRescue_LegsOfOneFrozenWorkerGoOnTogether: neither takes the other's slot for one that is still there.
func TestRescue_LegsOfOneFrozenWorkerGoOnTogether(t *testing.T) {
	for try := range 20 { // in whichever order they notice
		t.Run(fmt.Sprint(try), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.resilient(2, time.Minute)
				first := f.worker(t, "amd-1", 1, amd64, i386)
				b, _ := f.begin(t.Context(), t, request("b", amd64+","+i386, ""))
				must(b.Solve(t.Context(), frontend(amd64+","+i386)))(t)
				second := f.worker(t, "amd-2", 1, amd64, i386)
				first.Become(archfarmv1.Worker_STATE_UNAVAILABLE)
				time.Sleep(time.Second)
				synctest.Wait()
				if a, b := len(first.attempts()), len(second.attempts()); a != 2 || b != 2 {
					t.Errorf("%d and %d attempts, want 2 each", a, b)
				}
				b.End(nil)
				f.idle(t, first, second)
			})
		})
	}
}

// TestRescue_ASlotOnAWorkerThatIsLostTooIsNotShared has a leg prefer a sibling's slot, whose worker has just been
// frozen as well.
func TestRescue_ASlotOnAWorkerThatIsLostTooIsNotShared(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(2, time.Minute)
		first, second := f.worker(t, "amd-1", 1, amd64, i386), f.worker(t, "amd-2", 1, amd64, i386)
		b, _ := f.begin(t.Context(), t, request("b", amd64+","+i386, ""))
		must(b.Solve(t.Context(), frontend(amd64+","+i386)))(t)
		third := f.worker(t, "amd-3", 2, amd64, i386)
		second.Ping = func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		}
		first.Cut()
		time.Sleep(10 * time.Second)
		second.Become(archfarmv1.Worker_STATE_UNAVAILABLE)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if n := []int{len(first.attempts()), len(second.attempts()), len(third.attempts())}; n[0] != 1 || n[1] != 1 || n[2] != 2 {
			t.Errorf("attempts on the workers: %d", n)
		}
		b.End(nil)
		f.idle(t, first, second, third)
	})
}

// TestRescue_WhatAStepReportsIsNotTriedAgain, whatever its code is.
func TestRescue_WhatAStepReportsIsNotTriedAgain(t *testing.T) {
	for _, code := range []codes.Code{codes.Unknown, codes.Unavailable, codes.Canceled, codes.DeadlineExceeded} {
		reported := status.Error(code, "as the step says")
		for name, scripted := range map[string]func(*daemon){
			"the frontend": func(d *daemon) {
				d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { return nil, reported }
			},
			"the solve": func(d *daemon) {
				d.Frontend = func(ctx context.Context, _ *gwpb.SolveRequest) (*gwpb.Result, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				d.Early = func(context.Context) error { return reported }
			},
			"the export": func(d *daemon) { d.Export = func(context.Context) error { return reported } },
		} {
			t.Run(fmt.Sprintf("%s: %s", name, code), func(t *testing.T) {
				bubble(t, func(t *testing.T, f *farm) {
					f.resilient(3, time.Minute)
					workers := []*daemon{f.worker(t, "amd-1", 1, amd64), f.worker(t, "amd-2", 1, amd64)}
					for _, d := range workers {
						scripted(d)
					}
					b, end := f.begin(t.Context(), t, request("b", amd64, "registry/x:1"))
					resp, err := b.Solve(t.Context(), frontend(amd64))
					if err == nil {
						if err := b.Return(&gwpb.ReturnRequest{Result: resp.GetResult()}); err != nil {
							t.Fatal(err)
						}
						_, err = b.Export(t.Context(), must(b.Result(t.Context()))(t))
					}
					if status.Code(err) != code || !strings.Contains(err.Error(), "as the step says") {
						t.Errorf("got %v", err)
					}
					end(err)
					f.idle(t, workers...)
					if n := len(workers[0].attempts()) + len(workers[1].attempts()); n != 1 {
						t.Errorf("%d attempts, want 1", n)
					}
				})
			})
		}
	}
}

func TestRescue_TheWaitForAWorkerIsBoundedAndTheBuildsEndEndsIt(t *testing.T) {
	for name, wait := range map[string]bool{"until its end": true, "the build ends": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.resilient(3, time.Minute)
				only := f.worker(t, "amd-1", 1, amd64)
				b, end := f.begin(t.Context(), t, request("b", amd64, ""))
				ref := must(b.Solve(t.Context(), frontend(amd64)))(t).GetResult().GetRef().GetId()
				only.Kill()
				asked := beside(func() error { _, err := b.Evaluate(t.Context(), &gwpb.EvaluateRequest{Ref: ref}); return err })
				if wait {
					time.Sleep(time.Minute + time.Second)
					if err := asked(t); !strings.Contains(err.Error(), "none came back within 1m0s") {
						t.Errorf("got %v", err)
					}
					return
				}
				time.Sleep(10 * time.Second)
				end(errors.New("enough"))
				if err := asked(t); err == nil {
					t.Error("a call of a build that has ended is answered")
				}
			})
		})
	}
}

func TestRescue_WhatHasChangedMeanwhileIsNotMixed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(3, time.Minute)
		b, ref, first, _ := spare(t, f)
		first.Kill()
		made := &gwpb.Result{
			Result:   &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: ref}},
			Metadata: map[string][]byte{exptypes.ExporterImageConfigKey: []byte("made of amd-1 by the client")},
		}
		if err := b.Return(&gwpb.ReturnRequest{Result: made}); err != nil {
			t.Fatal(err)
		}
		_, err := b.Export(t.Context(), must(b.Result(t.Context()))(t))
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "changed meanwhile") {
			t.Errorf("got %v", err)
		}
	})
}

func TestRescue_ContainersEndWithTheirWorker(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.resilient(3, time.Minute)
		b, ref, first, _ := spare(t, f)
		mounts := []*pb.Mount{{ResultID: ref, Dest: "/"}}
		must(b.NewContainer(t.Context(), &gwpb.NewContainerRequest{ContainerID: "c", Mounts: mounts}))(t)
		first.Kill()
		synctest.Wait()
		if _, err := b.ReadFileContainer(t.Context(), &gwpb.ReadFileRequest{Ref: "c"}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "do not go on elsewhere") {
			t.Errorf("reading from it: %v", err)
		}
		must(b.ReleaseContainer(t.Context(), &gwpb.ReleaseContainerRequest{ContainerID: "c"}))(t)
		must(b.NewContainer(t.Context(), &gwpb.NewContainerRequest{ContainerID: "d", Mounts: mounts}))(t) // another one may begin
	})
}

// TestRescue_WhateverIsLostWhenever loses workers at random between and during random calls: each call is answered by
// the worker that has the leg by then, and what is exported is of one worker alone for each leg.
func TestRescue_WhateverIsLostWhenever(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.resilient(100, time.Minute)
				random, count := rand.New(rand.NewPCG(seed, 1)), 0 //nolint:gosec // a reproducible test
				fleet, platforms := map[string]*daemon{}, map[string]string{}
				join := func(platform string) {
					count++
					name := fmt.Sprintf("w%d", count)
					d := f.worker(t, name, 2, platform)
					d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { return d.reference(nil), nil }
					fleet[name], platforms[name] = d, platform
				}
				join(amd64)
				join(arm64)
				b, _ := f.begin(t.Context(), t, request("b", both, "registry/x:1"))
				result := must(b.Solve(t.Context(), frontend(both)))(t).GetResult()
				for range 20 {
					platform := []string{amd64, arm64}[random.IntN(2)]
					ref := result.GetRefs().GetRefs()[platform].GetId()
					answered := beside(func() error {
						resp, err := b.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: ref, FilePath: "x"})
						if err == nil && fleet[strings.Split(string(resp.GetData()), ":")[0]] == nil {
							err = fmt.Errorf("%q is of a worker that was lost", resp.GetData())
						}
						return err
					})
					if random.IntN(2) == 0 {
						for name, d := range fleet {
							if len(d.attempts()) > 0 && random.IntN(2) == 0 {
								join(platforms[name])
								d.Kill()
								delete(fleet, name)
								break
							}
						}
					}
					if err := answered(t); err != nil && !strings.Contains(err.Error(), "of a worker that was lost") { // it was answered before
						t.Fatal(err)
					}
				}
				if err := b.Return(&gwpb.ReturnRequest{Result: result}); err != nil {
					t.Fatal(err)
				}
				if _, err := b.Export(t.Context(), must(b.Result(t.Context()))(t)); err != nil {
					t.Fatal(err)
				}
				for name, d := range fleet {
					for _, j := range d.attempts() {
						for _, ref := range j.result.GetRefs().GetRefs() {
							if !strings.HasPrefix(ref.GetId(), name+"-") {
								t.Errorf("%s was returned %s", name, ref.GetId())
							}
						}
						for k, v := range j.result.GetMetadata() {
							if strings.HasPrefix(k, exptypes.ExporterImageConfigKey) && string(v) != name {
								t.Errorf("%s was returned %s of %s", name, k, v)
							}
						}
					}
				}
			})
		})
	}
}
