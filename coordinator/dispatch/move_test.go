package dispatch_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// pinned makes the daemon's frontend answer with steps of the architectures that
// are listed for the platform asked for.
func (d *daemon) pinned(steps map[string][]string) {
	d.Frontend = func(_ context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error) {
		return d.reference(runs(steps[req.GetFrontendOpt()["platform"]]...)), nil
	}
}

// wantRefs checks which daemon made which platform's reference.
func wantRefs(t *testing.T, resp *gwpb.SolveResponse, want map[string]string) {
	t.Helper()
	for platform, name := range want {
		if id := resp.GetResult().GetRefs().GetRefs()[platform].GetId(); !strings.HasPrefix(id, name+"-") {
			t.Errorf("%s is %q, not of %s", platform, id, name)
		}
	}
}

func TestMove_ALegRunsInTheSlotOfASiblingOnTheWorkerOfItsSteps(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		for _, d := range []*daemon{amd, arm} {
			d.pinned(map[string][]string{amd64: {"amd64"}, arm64: {"amd64"}})
		}
		b, end := f.begin(t.Context(), t, request("b", both, ""))
		resp := must(b.Solve(t.Context(), frontend(both)))(t)
		wantRefs(t, resp, map[string]string{amd64: "amd", arm64: "amd"})
		id := resp.GetResult().GetRefs().GetRefs()[arm64].GetId()
		if got := must(b.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: id, FilePath: "/x"}))(t); string(got.GetData()) != "amd:"+id+":/x" {
			t.Errorf("read %q", got.GetData())
		}
		synctest.Wait()
		if amd.Used() != 1 || amd.Open() != 2 || arm.Used() != 0 || arm.Open() != 0 {
			t.Errorf("amd has %d slots used, %d connections, arm %d, %d", amd.Used(), amd.Open(), arm.Used(), arm.Open())
		}
		must(b.Export(t.Context(), resp.GetResult()))(t)
		if legs := b.Legs(); legs[0].Worker != "amd" || legs[1].Worker != "amd" || legs[1].Platform != arm64 {
			t.Errorf("records %v", legs)
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestMove_ALegWithoutASiblingThereQueuesAndGivesItsSlotBack(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		arm.pinned(map[string][]string{arm64: {"amd64"}})
		amd.pinned(map[string][]string{arm64: {"amd64"}})
		amd.Occupy(1)
		b, end := f.begin(t.Context(), t, request("b", arm64, ""))
		solve := aside(func() error {
			resp, err := b.Solve(t.Context(), frontend(arm64))
			if id := resp.GetResult().GetRef().GetId(); err == nil && !strings.HasPrefix(id, "amd-") {
				t.Errorf("the reference is %q", id)
			}
			return err
		})
		solve.waits(t)
		if arm.Used() != 0 || len(amd.attempts()) != 0 {
			t.Errorf("arm has %d slots used, amd %d attempts", arm.Used(), len(amd.attempts()))
		}
		amd.Occupy(0)
		if err := solve.ended(t); err != nil {
			t.Fatal(err)
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestMove_LegsThatChangePlacesDoNotQueueForEachOther(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		for _, d := range []*daemon{amd, arm} {
			steps := map[string]string{amd64: "arm64", arm64: "amd64"}
			d.Frontend = func(_ context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error) {
				time.Sleep(time.Second)
				return d.reference(runs(steps[req.GetFrontendOpt()["platform"]])), nil
			}
		}
		b, end := f.begin(t.Context(), t, request("b", both, ""))
		next, endNext := f.begin(t.Context(), t, request("next", both, "")) // would take what the first gave up
		solve := aside(func() error {
			resp, err := b.Solve(t.Context(), frontend(both))
			wantRefs(t, resp, map[string]string{amd64: "arm", arm64: "amd"})
			return err
		})
		synctest.Wait()
		other := aside(func() error { _, err := next.Solve(t.Context(), frontend(both)); return err })
		if err := solve.ended(t); err != nil {
			t.Fatal(err)
		}
		other.waits(t)
		end(nil)
		if err := other.ended(t); err != nil {
			t.Fatal(err)
		}
		endNext(nil)
		f.idle(t, amd, arm)
	})
}

func TestMove_ALegWithStepsForTwoWorkersIsRefusedByTheNameOfOne(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		for _, d := range []*daemon{amd, arm} {
			d.pinned(map[string][]string{arm64: {"amd64", "arm64"}})
		}
		b, end := f.begin(t.Context(), t, request("b", arm64, ""))
		_, err := b.Solve(t.Context(), frontend(arm64))
		if want := `"[linux/arm64 2/2] RUN make" executes on linux/arm64, but its leg linux/arm64 has steps for worker amd, which runs linux/amd64`; status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v", err)
		}
		end(err)
		f.idle(t, amd, arm)
	})
}

func TestMove_ALegThatTheClientHasUsedStays(t *testing.T) {
	for name, use := range map[string]func(t *testing.T, f *farm, arm *daemon, solve func() error){
		"its result": func(t *testing.T, _ *farm, _ *daemon, solve func() error) {
			t.Helper()
			if err := solve(); err != nil {
				t.Fatal(err)
			}
		},
		"its step that failed": func(t *testing.T, _ *farm, arm *daemon, solve func() error) {
			t.Helper()
			arm.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) {
				return nil, failedStep("input-1", "mount-1")
			}
			if err := solve(); err == nil {
				t.Fatal("it did not fail")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
				arm.pinned(map[string][]string{arm64: {"arm64"}})
				b, end := f.begin(t.Context(), t, request("b", arm64, ""))
				use(t, f, arm, func() error { _, err := b.Solve(t.Context(), frontend(arm64)); return err })
				arm.pinned(map[string][]string{arm64: {"amd64"}})
				_, err := b.Solve(t.Context(), frontend(arm64))
				if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), `"[linux/amd64 1/1] RUN make" executes on linux/amd64`) {
					t.Errorf("got %v", err)
				}
				synctest.Wait()
				if len(amd.attempts()) != 0 || len(arm.attempts()) != 1 {
					t.Errorf("%d attempts on amd, %d on arm", len(amd.attempts()), len(arm.attempts()))
				}
				end(err)
				f.idle(t, amd, arm)
			})
		})
	}
}

func TestMove_CallsAtOnceMoveALegOnce(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		arm.pinned(map[string][]string{arm64: {"amd64"}})
		amd.pinned(map[string][]string{arm64: {"amd64"}})
		b, end := f.begin(t.Context(), t, request("b", arm64, ""))
		var calls []*call
		for range 5 {
			calls = append(calls, aside(func() error { _, err := b.Solve(t.Context(), frontend(arm64)); return err }))
		}
		for _, c := range calls {
			if err := c.ended(t); err != nil {
				t.Error(err)
			}
		}
		if n := len(amd.attempts()); n != 1 {
			t.Errorf("%d attempts on amd", n)
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestMove_ABuildThatEndsWhileItsLegQueuesLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		arm.pinned(map[string][]string{arm64: {"amd64"}})
		amd.Occupy(1)
		b, end := f.begin(t.Context(), t, request("b", arm64, ""))
		solve := aside(func() error { _, err := b.Solve(t.Context(), frontend(arm64)); return err })
		solve.waits(t)
		end(nil)
		if err := solve.ended(t); status.Code(err) != codes.Canceled {
			t.Errorf("got %v", err)
		}
		amd.Occupy(0)
		f.idle(t, amd, arm)
	})
}
