package fleet_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestFleet_AWorkerIsThereForAsLongAsItsStream(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		if got := f.last(); !slices.Equal(got, []snapshot{{"amd-1", archfarmv1.Worker_STATE_READY, 0}}) {
			t.Errorf("the scheduler was told %v", got)
		}
		list := must(t, func(ctx ctx) (*archfarmv1.ListWorkersResponse, error) {
			return archfarmv1.NewFleetServiceClient(f.dial(t)).ListWorkers(ctx, &archfarmv1.ListWorkersRequest{})
		})
		if got := list.GetWorkers()[0]; got.GetName() != "amd-1" || got.GetSlots().GetTotal() != 2 || !got.GetSince().AsTime().Equal(time.Now()) ||
			!slices.Equal(got.GetPlatforms(), []string{"linux/amd64", "linux/386"}) || got.GetBuildkitVersion() != "v0.34.2" {
			t.Errorf("ListWorkers: %v", got)
		}
		if err := a.stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := <-a.ended; err.Error() != "EOF" {
			t.Errorf("an agent that leaves in order is told %v", err)
		}
		if got := f.last(); len(got) != 0 || len(f.Workers()) != 0 {
			t.Errorf("still there: %v", got)
		}
		<-w.Gone()
	})
}

func TestFleet_RefusesHostileHellos(t *testing.T) {
	many := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("linux/arch%d", i))
		}
		return out
	}
	for name, spoil := range map[string]func(h *archfarmv1.Hello){
		"no name":                       func(h *archfarmv1.Hello) { h.Name = "" },
		"an endless name":               func(h *archfarmv1.Hello) { h.Name = strings.Repeat("x", 129) },
		"a name of two words":           func(h *archfarmv1.Hello) { h.Name = "amd 1" },
		"a name with a line break":      func(h *archfarmv1.Hello) { h.Name = "amd\n1" },
		"a name that looks like a":      func(h *archfarmv1.Hello) { h.Name = "аmd-1" }, // Cyrillic
		"a name with an escape":         func(h *archfarmv1.Hello) { h.Name = "amd\x1b[2J" },
		"no platform":                   func(h *archfarmv1.Hello) { h.Platforms = nil },
		"too many platforms":            func(h *archfarmv1.Hello) { h.Platforms = many(65) },
		"a platform that is none":       func(h *archfarmv1.Hello) { h.Platforms = []string{"linux/amd64", "../.."} },
		"an empty platform":             func(h *archfarmv1.Hello) { h.Platforms = []string{""} },
		"more slots than any machine":   func(h *archfarmv1.Hello) { h.Report.Slots.Total = 1025 },
		"more slots used than possible": func(h *archfarmv1.Hello) { h.Report.Slots.Used = 1 << 31 },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				h := hello("amd-1")
				spoil(h)
				_, _, err := f.knock(t, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: h}})
				if status.Code(err) != codes.InvalidArgument {
					t.Errorf("got %v", err)
				}
				if f.last() != nil || len(f.Workers()) != 0 {
					t.Error("it was let in")
				}
			})
		})
	}
	t.Run("no hello", func(t *testing.T) {
		bubble(t, func(t *testing.T, f *farm) {
			for _, first := range []*archfarmv1.AttachRequest{{}, {Message: &archfarmv1.AttachRequest_Report{Report: report(archfarmv1.Worker_STATE_READY, 1, 0)}}} {
				if _, _, err := f.knock(t, first); status.Code(err) != codes.InvalidArgument {
					t.Errorf("got %v", err)
				}
			}
		})
	})
}

func TestFleet_BelievesOnlySoMuchOfWhatAnAgentSays(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		h := hello("amd-1")
		h.Report, h.Version, h.Machine = nil, "v1\n\x1b[31mroot", strings.Repeat("m", 1<<20)
		a, w := f.enter(t, h)
		if w.Version != "v1  [31mroot" || len(w.Machine) != 512 {
			t.Errorf("version %q, machine of %d bytes", w.Version, len(w.Machine))
		}
		if got := f.last(); !slices.Equal(got, []snapshot{{"amd-1", archfarmv1.Worker_STATE_UNSPECIFIED, 0}}) {
			t.Errorf("the scheduler was told %v", got)
		}
		a.send(&archfarmv1.AttachRequest{}) // says nothing, harms nobody
		bad := report(archfarmv1.Worker_STATE_READY, 1<<31, 0)
		a.report(bad)
		if _, err := a.stream.Recv(); status.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v", err)
		}
	})
}

func TestFleet_ANewAgentOfTheSameNameReplacesTheOld(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		old, was := f.attach(t, "amd-1")
		_, is := f.attach(t, "amd-1")
		if err := <-old.ended; status.Code(err) != codes.Aborted {
			t.Errorf("the old one is told %v", err)
		}
		<-was.Gone()
		synctest.Wait()
		if w, _ := f.Worker("amd-1"); w != is || is.ID() == was.ID() || len(f.last()) != 1 {
			t.Errorf("now %v, was %v; the scheduler sees %v", is.ID(), was.ID(), f.last())
		}
	})
}

func TestFleet_ReportsAreSeenInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		f.attach(t, "amd-2")
		time.Sleep(time.Second)
		a.report(report(archfarmv1.Worker_STATE_READY, 2, 1))
		a.report(&archfarmv1.Report{State: archfarmv1.Worker_STATE_UNAVAILABLE, Reason: "buildkitd\ndoes not answer"})
		a.report(report(archfarmv1.Worker_STATE_DRAINING, 2, 2))
		want := []snapshot{{"amd-1", archfarmv1.Worker_STATE_READY, 1}, {"amd-1", archfarmv1.Worker_STATE_UNAVAILABLE, 0}, {"amd-1", archfarmv1.Worker_STATE_DRAINING, 2}}
		for i, seen := range f.seen[len(f.seen)-3:] {
			if seen[0] != want[i] || seen[1].name != "amd-2" {
				t.Errorf("report %d: %v", i, seen)
			}
		}
		if !w.Reported().Equal(time.Now()) {
			t.Errorf("reported at %v, now is %v", w.Reported(), time.Now())
		}
	})
}

func TestFleet_TellsOfChangesOneAtATime(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		var agents sync.WaitGroup
		for i := range 20 {
			client := archfarmv1.NewAgentServiceClient(f.dial(t))
			agents.Go(func() {
				stream, err := client.Attach(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				_ = stream.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: hello(fmt.Sprintf("w%d", i%7))}})
				for range 5 {
					_ = stream.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Report{Report: report(archfarmv1.Worker_STATE_READY, 2, uint32(i%3))}})
				}
				_ = stream.CloseSend()
				for err == nil {
					_, err = stream.Recv()
				}
			})
		}
		agents.Wait()
		synctest.Wait()
		if f.overlap {
			t.Error("two changes were told at a time")
		}
		if len(f.last()) != 0 || len(f.Workers()) != 0 {
			t.Errorf("after all have left: %v", f.last())
		}
	})
}

func TestFleet_ASilentAgentIsLostAndItsConnectionsSevered(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		a.works()
		conn := must(t, w.Take)
		defer conn.Close()
		time.Sleep(lostAfter - time.Millisecond)
		a.report(report(archfarmv1.Worker_STATE_READY, 2, 1)) // in the last moment
		time.Sleep(lostAfter - time.Millisecond)
		synctest.Wait()
		if _, attached := f.Worker("amd-1"); !attached || conn.Lost() != nil || answers(t, conn) != nil {
			t.Fatalf("lost before its time: %v", conn.Lost())
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if err := <-a.ended; status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the agent is told %v", err)
		}
		if _, attached := f.Worker("amd-1"); attached || len(f.last()) != 0 {
			t.Error("still in the fleet")
		}
		<-conn.Down()
		lost(t, conn.Lost(), "amd-1")
	})
}

// An agent that is frozen does not read either: what is on its way to it must not
// keep its silence from being noticed.
func TestFleet_AFrozenAgentIsLostHoweverMuchWaitsForIt(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		_, w := f.enter(t, hello("amd-1"))
		var dials []*pending
		for range 5000 { // far more than fit into the stream's window
			dials = append(dials, begin(t.Context(), w.Dial))
		}
		time.Sleep(lostAfter)
		synctest.Wait()
		if _, attached := f.Worker("amd-1"); attached {
			t.Fatal("still in the fleet")
		}
		for _, d := range dials {
			lost(t, d.result(t), "amd-1")
		}
	})
}

func TestFleet_CloseSendsTheAgentsAway(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, _ := f.attach(t, "amd-1")
		b, _ := f.attach(t, "amd-2")
		f.Close()
		for _, agent := range []*agent{a, b} {
			if err := <-agent.ended; status.Code(err) != codes.Unavailable {
				t.Errorf("got %v", err)
			}
		}
		synctest.Wait()
		if len(f.Workers()) != 0 {
			t.Error("workers are left")
		}
	})
}
