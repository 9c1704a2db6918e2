package dispatch_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/dispatch"
)

// emulating is the pool that the test's farm allows emulation in.
const emulating = "emulating"

// steps are the names of the steps that the client sees, of a build that has ended.
func steps(t *testing.T, b *dispatch.Build) []string {
	t.Helper()
	var names []string
	if err := b.Progress.Follow(t.Context(), func(s *controlapi.StatusResponse) error {
		for _, v := range s.GetVertexes() {
			if !slices.Contains(names, v.GetName()) {
				names = append(names, v.GetName())
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func TestEmulation_OnlyWhereThePoolAllowsIt(t *testing.T) {
	for pool, allowed := range map[string]bool{emulating: true, "strict": false} {
		t.Run(pool, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				amd := f.in(t, pool, "amd", 1, amd64, arm64)
				amd.pinned(map[string][]string{arm64: {"arm64"}})
				b, end := f.begin(t.Context(), t, request("b", arm64, ""))
				_, err := b.Solve(t.Context(), frontend(arm64))
				if allowed {
					if err != nil {
						t.Fatal(err)
					}
					end(nil)
					if want := "[linux/arm64] assigned to worker amd (emulated: no native worker)"; !slices.Contains(steps(t, b), want) {
						t.Errorf("the client sees %q, not %q", steps(t, b), want)
					}
					f.idle(t, amd)
					return
				}
				var none *build.NoWorkerError
				if !errors.As(err, &none) || none.Emulators != 1 || none.Step != "[linux/arm64 1/1] RUN make" || !strings.Contains(err.Error(), "--allow-emulation") {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestEmulation_NotWhileAnybodyIsNative(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.in(t, emulating, "amd", 9, amd64, arm64), f.in(t, "office", "arm", 1, arm64)
		arm.Occupy(1)
		synctest.Wait()
		b, end := f.begin(t.Context(), t, request("b", arm64, ""))
		solve := aside(func() error { _, err := b.Solve(t.Context(), frontend(arm64)); return err })
		solve.waits(t)
		if amd.Used() != 0 {
			t.Error("it is emulated")
		}
		arm.Occupy(0)
		if err := solve.ended(t); err != nil {
			t.Fatal(err)
		}
		end(nil)
		own, end := f.begin(t.Context(), t, pooled(request("b2", arm64, ""), emulating)) // where nobody is
		amd.pinned(map[string][]string{arm64: {"arm64"}})
		must(own.Solve(t.Context(), frontend(arm64)))(t)
		if amd.Used() != 1 {
			t.Error("it does not run in its pool")
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestEmulation_AnEmulatedLegGoesOnWhenANativeWorkerComes(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd := f.in(t, emulating, "amd", 1, amd64, arm64)
		amd.pinned(map[string][]string{arm64: {"arm64", "amd64"}})
		b, _ := f.begin(t.Context(), t, request("b", arm64, ""))
		first := must(b.Solve(t.Context(), frontend(arm64)))(t)
		arm := f.in(t, "office", "arm", 1, arm64)
		must(b.Solve(t.Context(), frontend(arm64)))(t)
		must(b.Export(t.Context(), first.GetResult()))(t)
		if arm.Opened() != 0 {
			t.Error("it went elsewhere")
		}
	})
}

func TestEmulation_OfSingleStepsIsTold(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd := f.in(t, emulating, "amd", 1, amd64, arm64)
		amd.pinned(map[string][]string{amd64: {"amd64", "arm64", "arm64"}})
		b, end := f.begin(t.Context(), t, request("b", amd64, ""))
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		if n := len(amd.attempts()); n != 1 {
			t.Errorf("%d attempts", n)
		}
		end(nil)
		const want = "[linux/amd64] steps for linux/arm64 on worker amd (emulated: no native worker)"
		if got := steps(t, b); len(got) != 1 || got[0] != want {
			t.Errorf("the client sees %q", got)
		}
	})
}

func TestEmulation_ALegMovesToAWorkerThatEmulatesItsSteps(t *testing.T) {
	for platforms, want := range map[string]string{
		arm64: "[linux/arm64] assigned to worker amd (emulated: no native worker)",
		both:  "[linux/arm64] moved to worker amd (its steps execute on linux/riscv64, emulated: no native worker)", // in a sibling's slot
	} {
		t.Run(platforms, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				amd, arm := f.in(t, emulating, "amd", 1, amd64, "linux/riscv64"), f.in(t, "office", "arm", 1, arm64)
				for _, d := range []*daemon{amd, arm} {
					d.pinned(map[string][]string{amd64: {"amd64"}, arm64: {"riscv64"}})
				}
				b, end := f.begin(t.Context(), t, request("b", platforms, ""))
				solve := aside(func() error { _, err := b.Solve(t.Context(), frontend(platforms)); return err })
				if err := solve.ended(t); err != nil {
					t.Fatal(err)
				}
				if amd.Used() != 1 || arm.Used() != 0 {
					t.Errorf("amd has %d slots used, arm %d", amd.Used(), arm.Used())
				}
				end(nil)
				if got := steps(t, b); !slices.Contains(got, want) || strings.Contains(strings.Join(got, "\n"), "steps for") {
					t.Errorf("the client sees %q", got)
				}
				f.idle(t, amd, arm)
			})
		})
	}
}

func TestEmulation_AContainerOfAnotherPlatform(t *testing.T) {
	for pool, want := range map[string]codes.Code{emulating: codes.OK, "strict": codes.FailedPrecondition} {
		t.Run(pool, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.in(t, pool, "amd", 1, amd64, arm64)
				b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
				must(b.Solve(t.Context(), frontend(amd64)))(t)
				req := &gwpb.NewContainerRequest{ContainerID: "c", Platform: runsOn("arm64")}
				if _, err := b.NewContainer(t.Context(), req); status.Code(err) != want {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestEmulation_ALentSlotEmulates(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd := f.in(t, emulating, "amd", 1, amd64, arm64)
		amd.pinned(map[string][]string{amd64: {"amd64"}, arm64: {"arm64"}})
		bake := connection(t.Context(), t)
		_, first, endFirst := f.solving(bake, t, "first")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		second, end := f.begin(bake, t, request("second", arm64, ""))
		solve := aside(func() error { _, err := second.Solve(bake, frontend(arm64)); return err })
		if err := solve.ended(t); err != nil {
			t.Fatal(err)
		}
		end(nil)
		endFirst(nil)
		time.Sleep(time.Second)
		if got := strings.Join(steps(t, second), "\n"); !strings.Contains(got, "(emulated: no native worker; shares the slot of another build") {
			t.Errorf("the client sees %s", got)
		}
		f.idle(t, amd)
	})
}
