package dispatch_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestBuild_EndIsSafeAtAnyTime(t *testing.T) {
	t.Run("before anything", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *farm) {
			d := f.worker(t, "amd", 1, amd64)
			b, end := f.begin(t.Context(), t, request("b", amd64, ""))
			end(nil)
			if _, err := b.Solve(t.Context(), frontend(amd64)); status.Code(err) != codes.Canceled {
				t.Errorf("a call after the end: %v", err)
			}
			f.idle(t, d)
		})
	})
	t.Run("while its legs are queued", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *farm) {
			amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
			arm.Occupy(1)
			b, end := f.begin(t.Context(), t, request("b", both, ""))
			call := beside(func() error { _, err := b.Solve(t.Context(), frontend(both)); return err })
			synctest.Wait()
			if amd.Used() != 1 || arm.Used() != 0 {
				t.Fatalf("slots used: %d and %d", amd.Used(), arm.Used())
			}
			end(errors.New("enough"))
			if err := call(t); err == nil {
				t.Error("the call ended well")
			}
			arm.Occupy(0)
			f.idle(t, amd, arm)
		})
	})
}

func TestBuild_EndIsSafeWhileSomebodyIsAsked(t *testing.T) {
	t.Run("while its worker is dialing back", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *farm) {
			d := f.worker(t, "amd", 1, amd64)
			goOn := make(chan struct{})
			d.Answer(func(*archfarmv1.Open) archfarmv1.Refused_Cause { <-goOn; return archfarmv1.Refused_CAUSE_UNSPECIFIED })
			b, end := f.begin(t.Context(), t, request("b", amd64, ""))
			call := beside(func() error { _, err := b.Solve(t.Context(), frontend(amd64)); return err })
			synctest.Wait()
			end(nil)
			if err := call(t); status.Code(err) != codes.Canceled {
				t.Errorf("got %v", err)
			}
			close(goOn) // what comes too late is closed
			f.idle(t, d)
		})
	})
	t.Run("while a call that nobody answers runs", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *farm) {
			d := f.worker(t, "amd", 1, amd64)
			d.Frontend = func(ctx context.Context, _ *gwpb.SolveRequest) (*gwpb.Result, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			b, end := f.begin(t.Context(), t, request("b", amd64, ""))
			call := beside(func() error { _, err := b.Solve(t.Context(), frontend(amd64)); return err })
			synctest.Wait()
			end(nil)
			if err := call(t); err == nil {
				t.Error("it ended well")
			}
			f.idle(t, d)
		})
	})
}

func TestBuild_ACallThatIsGivenUpWhileLegsAreQueuedLeavesTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.Occupy(1)
		ctx, cancel := context.WithCancel(t.Context())
		b, end := f.begin(t.Context(), t, request("b", amd64, ""))
		call := beside(func() error { _, err := b.Solve(ctx, frontend(amd64)); return err })
		synctest.Wait()
		cancel()
		if err := call(t); err == nil {
			t.Error("it ended well")
		}
		d.Occupy(0)
		f.idle(t, d)
		end(nil)
	})
}

func TestBuild_ASlotThatTheAgentRefusesIsLookedForElsewhere(t *testing.T) {
	for _, cause := range []archfarmv1.Refused_Cause{archfarmv1.Refused_CAUSE_NO_SLOT, archfarmv1.Refused_CAUSE_DRAINING} {
		t.Run(cause.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				refusing, taking := f.worker(t, "a", 4, amd64), f.worker(t, "b", 1, amd64)
				refusing.Answer(func(*archfarmv1.Open) archfarmv1.Refused_Cause { return cause })
				b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
				must(b.Solve(t.Context(), frontend(amd64)))(t)
				if taking.Used() != 1 || refusing.Opened() != 0 {
					t.Errorf("a has opened %d connections, b uses %d slots", refusing.Opened(), taking.Used())
				}
			})
		})
	}
}

func TestBuild_AWorkerThatLeavesWhileItIsAskedIsReplaced(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		leaving, staying := f.worker(t, "a", 4, amd64), f.worker(t, "b", 1, amd64)
		stop := make(chan struct{})
		leaving.Answer(func(*archfarmv1.Open) archfarmv1.Refused_Cause {
			leaving.Leave()
			<-stop
			return archfarmv1.Refused_CAUSE_UNAVAILABLE
		})
		defer close(stop)
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		if staying.Used() != 1 {
			t.Errorf("b uses %d slots", staying.Used())
		}
	})
}

// The legs of a first try are stopped when one of them finds its platform gone.
// That is no failure of the build, which tries again.
func TestBuild_AnAttemptThatWasStoppedToBePlacedAgainFailsNothing(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 2, amd64), f.worker(t, "arm", 1, arm64)
		arm.Occupy(1)
		b, _ := f.begin(t.Context(), t, request("b", both, ""))
		call := beside(func() error { _, err := b.Solve(t.Context(), frontend(both)); return err })
		synctest.Wait()
		arm.Leave()
		time.Sleep(2 * f.Scheduler.Grace) // then the leg may run anywhere
		if err := call(t); err != nil {
			t.Fatal(err)
		}
		if n := len(amd.attempts()); n != 3 { // the one that was stopped, and two
			t.Errorf("%d attempts", n)
		}
		result := beside(func() error { _, err := b.Result(t.Context()); return err })
		if err := b.Return(&gwpb.ReturnRequest{Result: &gwpb.Result{}}); err != nil {
			t.Fatal(err)
		}
		if err := result(t); err != nil {
			t.Errorf("the build failed: %v", err)
		}
	})
}

func TestBuild_LegsShareASlotUntilBothHaveEnded(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64, i386)
		last := make(chan struct{})
		exports := make(chan struct{}, 1)
		exports <- struct{}{}
		d.Export = func(context.Context) error {
			select {
			case <-exports: // the first
			case <-last:
			}
			return nil
		}
		platforms := amd64 + "," + i386
		b, end := f.begin(t.Context(), t, request("b", platforms, ""))
		resp := must(b.Solve(t.Context(), frontend(platforms)))(t)
		if d.Used() != 1 || d.Open() != 2 {
			t.Errorf("%d slots used, %d connections", d.Used(), d.Open())
		}
		export := beside(func() error { _, err := b.Export(t.Context(), resp.GetResult()); return err })
		synctest.Wait()
		if used := f.Scheduler.Snapshot()[0].Used; used != 1 || d.Used() != 1 {
			t.Errorf("after one leg has ended %d slots are used, the agent has %d", used, d.Used())
		}
		close(last)
		if err := export(t); err != nil {
			t.Error(err)
		}
		end(nil)
		f.idle(t, d)
	})
}

// Each leg is to run in the slot that the other has asked for: one after the other
// is refused, and neither must go on waiting for what it was promised before.
func TestBuild_LegsThatWereToShareEachOthersSlotsDoNotWaitForEachOther(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, b := f.worker(t, "a", 1, amd64, i386), f.worker(t, "b", 1, amd64, i386)
		answers := map[*daemon]chan archfarmv1.Refused_Cause{}
		for _, d := range []*daemon{a, b} {
			answer := make(chan archfarmv1.Refused_Cause)
			answers[d] = answer
			d.Answer(func(*archfarmv1.Open) archfarmv1.Refused_Cause { return <-answer })
		}
		platforms := amd64 + "," + i386
		bd, end := f.begin(t.Context(), t, request("b", platforms, ""))
		call := beside(func() error { _, err := bd.Solve(t.Context(), frontend(platforms)); return err })
		synctest.Wait()
		a.Occupy(1) // by another coordinator, just now
		answers[a] <- archfarmv1.Refused_CAUSE_NO_SLOT
		synctest.Wait() // the leg that asked a is to share the other's slot on b
		b.Occupy(1)
		answers[b] <- archfarmv1.Refused_CAUSE_NO_SLOT
		synctest.Wait()
		close(answers[a]) // which means yes
		close(answers[b])
		a.Occupy(0)
		time.Sleep(time.Second)
		if err := call(t); err != nil {
			t.Error(err)
		}
		end(nil)
		b.Occupy(0)
		f.idle(t, a, b)
	})
}

func TestBuild_AWorkerWhoseDaemonIsAwaySaysSo(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.Answer(func(*archfarmv1.Open) archfarmv1.Refused_Cause { return archfarmv1.Refused_CAUSE_UNAVAILABLE })
		b, end := f.begin(t.Context(), t, request("b", amd64, ""))
		_, err := b.Solve(t.Context(), frontend(amd64))
		if status.Code(err) != codes.Unavailable {
			t.Errorf("got %v", err)
		}
		if lost := (*build.LostError)(nil); errors.As(err, &lost) {
			t.Errorf("it is not lost: %v", err)
		}
		end(err)
		f.idle(t, d)
	})
}

func TestBuild_ASessionThatIsNeverOpenedDelaysButDoesNotFail(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		req := request("b", amd64, "")
		req.Session = "never-opened"
		b, end := f.begin(t.Context(), t, req)
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		end(nil)
		f.idle(t, d)
	})
}
