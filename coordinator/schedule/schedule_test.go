package schedule

import (
	"fmt"
	"reflect"
	"testing"
	"testing/synctest"
	"time"
)

func TestScheduler_LegsOfABuildSpreadByLoad(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 2, 0, arm64), worker("b", 2, 0, arm64))
		ticket := enqueue(t, s, arm64, arm64)
		first, second := wait(t.Context(), ticket, 0), wait(t.Context(), ticket, 1)
		if !first.look().done || !second.look().done || first.look().assignment.Worker == second.look().assignment.Worker {
			t.Errorf("got %+v and %+v", first, second)
		}
		if len(first.look().positions) != 0 {
			t.Errorf("a leg that did not wait was told %v", first.look().positions)
		}
	})
}

func TestScheduler_WaitTellsPositionAndReasonThenGrants(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64), worker("b", 1, 0, arm64).in(Draining, ""), worker("c", 1, 0, amd64))
		running := enqueue(t, s, arm64)
		second, third := enqueue(t, s, arm64), enqueue(t, s, arm64)
		w2, w3 := wait(t.Context(), second, 0), wait(t.Context(), third, 0)
		w2.still(t, 0, "linux/arm64: 1 full, 1 draining")
		w3.still(t, 1, "linux/arm64: 1 full, 1 draining")
		time.Sleep(time.Minute)
		running.Release(0)
		synctest.Wait()
		if a := w2.on(t, "a"); a.Waited != time.Minute {
			t.Errorf("waited %v", a.Waited)
		}
		w3.still(t, 0, "linux/arm64: 1 full, 1 draining")
		s.Update([]Worker{worker("a", 1, 1, arm64).in(Draining, "")})
		time.Sleep(announceEvery)
		synctest.Wait()
		w3.still(t, 0, "linux/arm64: 1 draining")
		if len(w3.look().positions) != 3 {
			t.Errorf("told %v", w3.look().positions)
		}
	})
}

func TestScheduler_PositionsAreNotToldMoreOftenThanAnyoneReads(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64))
		var before []*Ticket
		for range 20 {
			before = append(before, enqueue(t, s, arm64))
		}
		w := wait(t.Context(), enqueue(t, s, arm64), 0)
		w.still(t, 19, "linux/arm64: 1 full")
		for _, ticket := range before[1:] {
			ticket.Close()
			synctest.Wait()
		}
		time.Sleep(announceEvery)
		synctest.Wait()
		w.still(t, 0, "linux/arm64: 1 full")
		if len(w.look().positions) != 2 {
			t.Errorf("told %v", w.look().positions)
		}
	})
}

func TestScheduler_OnlyLegsForTheSameWorkersAreAhead(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, amd64, "linux/amd64/v2"), worker("b", 1, 0, arm64), worker("c", 1, 0, amd64))
		enqueue(t, s, amd64, arm64, amd64)
		enqueue(t, s, amd64, arm64, "linux/amd64/v2", "*")
		last := enqueue(t, s, "linux/amd64/v2", arm64, "*")
		wait(t.Context(), last, 0).still(t, 3, "linux/amd64/v2: 1 full")
		wait(t.Context(), last, 1).still(t, 2, "linux/arm64: 1 full")
		wait(t.Context(), last, 2).still(t, 6, "any worker: 3 full")
		last.Close()
	})
}

func TestScheduler_ALaterLegTakesOnlyWhatNoEarlierOneCanUse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, amd64), worker("b", 1, 0, arm64))
		enqueue(t, s, amd64)
		blocked, other := enqueue(t, s, amd64), enqueue(t, s, amd64, arm64)
		w, wAmd, wArm := wait(t.Context(), blocked, 0), wait(t.Context(), other, 0), wait(t.Context(), other, 1)
		wArm.on(t, "b")
		s.Update([]Worker{worker("a", 2, 1, amd64), worker("b", 1, 1, arm64)})
		synctest.Wait()
		w.on(t, "a")
		if wAmd.look().done {
			t.Error("the later leg was served, too")
		}
	})
}

// TestScheduler_TargetsOfAMonorepoDoNotPileUp builds one target after the other on idle workers: each gets one of its
// own, and the same again.
func TestScheduler_TargetsOfAMonorepoDoNotPileUp(t *testing.T) {
	t.Parallel()
	var workers []Worker
	for i := range 10 {
		workers = append(workers, worker(fmt.Sprintf("mac-%d", i), 2, 0, arm64))
	}
	s := old(workers...)
	build := func(target int) string {
		ticket, err := s.Enqueue([]Demand{{Platform: platform(arm64), Key: fmt.Sprintf("monorepo\x00target-%d", target)}})
		if err != nil {
			t.Fatal(err)
		}
		defer ticket.Close()
		a, err := ticket.Wait(t.Context(), 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		return a.Worker
	}
	first := map[int]string{}
	used := map[string]bool{}
	for target := range 10 {
		first[target] = build(target)
		used[first[target]] = true
	}
	if len(used) != 10 {
		t.Errorf("10 targets were built on %d of 10 idle workers", len(used))
	}
	for target := range 10 {
		if again := build(target); again != first[target] {
			t.Errorf("target %d was built on %s, then on %s", target, first[target], again)
		}
	}
}

func TestScheduler_TheWarmWorkerIsChosenIfFree(t *testing.T) {
	t.Parallel()
	s := old(worker("a", 2, 0, arm64), worker("b", 2, 0, arm64), worker("c", 2, 0, arm64))
	demand := []Demand{{Platform: platform(arm64), Key: "app"}}
	run := func() (*Ticket, Assignment) {
		ticket, err := s.Enqueue(demand)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ticket.Close)
		a, err := ticket.Wait(t.Context(), 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		return ticket, a
	}
	_, first := run()
	_, second := run()
	if first.Warm || !second.Warm || second.Worker != first.Worker {
		t.Errorf("got %+v, then %+v", first, second)
	}
	_, third := run()
	if third.Warm || third.Worker == first.Worker {
		t.Errorf("with the warm one full: %+v", third)
	}
	if _, fourth := run(); fourth.Worker != third.Worker || !fourth.Warm {
		t.Errorf("got %+v, but %s was the last to build it", fourth, third.Worker)
	}
}

func TestScheduler_DrainingWorkerTakesNothingNew(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 4, 0, arm64))
		running := enqueue(t, s, arm64, arm64)
		wait(t.Context(), running, 0).on(t, "a")
		w := worker("a", 4, 1, arm64)
		s.Update([]Worker{w.in(Unavailable, "no heartbeat")})
		queued := wait(t.Context(), enqueue(t, s, arm64), 0)
		queued.still(t, 0, "linux/arm64: 1 unavailable (no heartbeat)")
		s.Update([]Worker{w.in(Draining, "")})
		time.Sleep(time.Hour)
		synctest.Wait()
		queued.still(t, 0, "linux/arm64: 1 draining")
		s.Update([]Worker{w})
		synctest.Wait()
		queued.on(t, "a")
	})
}

func TestScheduler_ReportedLoadAndGrantsCountOnce(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 3, 1, arm64)) // one slot is another coordinator's
		ticket := enqueue(t, s, arm64, arm64, arm64, arm64)
		for i := range 3 { // the agent has not reported yet: max(1, granted) are used
			wait(t.Context(), ticket, i).on(t, "a")
		}
		w := wait(t.Context(), ticket, 3)
		w.still(t, 0, "linux/arm64: 1 full")
		s.Update([]Worker{worker("a", 5, 4, arm64)}) // theirs and ours
		synctest.Wait()
		w.on(t, "a")
		if used := s.Snapshot()[0].Used; used != 4 {
			t.Errorf("%d used, want 4", used)
		}
		ticket.Close()
		if used := s.Snapshot()[0].Used; used != 4 {
			t.Errorf("%d used before the agent reports, want 4", used)
		}
	})
}

func TestScheduler_EnqueueRefusesWhatNobodyServes(t *testing.T) {
	t.Parallel()
	s := old(worker("a", 1, 0, amd64), worker("b", 1, 0, arm64).in(Draining, ""))
	for _, test := range []struct {
		demand Demand
		text   string
	}{
		{Demand{Platform: platform("linux/s390x")}, "no native worker for linux/s390x: the farm has linux/amd64 (1), linux/arm64 (1)"},
		{Demand{Platform: platform(arm64), On: "b"}, "no native worker for linux/arm64: 1 draining; the farm has linux/amd64 (1), linux/arm64 (1)"},
	} {
		_, err := s.Enqueue([]Demand{{Platform: platform(amd64)}, test.demand})
		if err == nil || err.Error() != test.text {
			t.Errorf("got %v, want %s", err, test.text)
		}
	}
	if _, err := s.Enqueue(nil); err == nil {
		t.Error("a build without legs was queued")
	}
	if used := s.Snapshot()[0].Used; used != 0 || len(s.classes) != 0 {
		t.Errorf("a refused build left %d slots used and %d queues", used, len(s.classes))
	}
}

// A drain kills nothing, what comes later included.
func TestScheduler_WaitsForADrainedWorkerToComeBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("b", 1, 0, arm64).in(Draining, "drained by an operator"))
		ticket := enqueue(t, s, arm64)
		w := wait(t.Context(), ticket, 0)
		w.still(t, 0, "linux/arm64: 1 draining")
		s.Update([]Worker{worker("b", 1, 0, arm64)})
		synctest.Wait()
		w.on(t, "b")
	})
}

func TestScheduler_Native(t *testing.T) {
	t.Parallel()
	s := old(worker("a", 1, 1, amd64, "linux/amd64/v2").in(Unavailable, ""), worker("b", 1, 0, arm64).in(Draining, ""))
	for name, want := range map[string]bool{amd64: true, "linux/amd64/v2": true, "linux/amd64/v3": false, arm64: true} {
		if got := s.Native(platform(name)); got != want {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
}

func TestScheduler_RightAfterTheStartBuildsWaitForWorkersToAttach(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := New(nil)
		time.Sleep(10 * time.Second)
		ticket := enqueue(t, s, arm64, amd64)
		arm, amd := wait(t.Context(), ticket, 0), wait(t.Context(), ticket, 1)
		arm.still(t, 0, "linux/arm64: no worker attached")
		time.Sleep(10 * time.Second)
		s.Update([]Worker{worker("a", 1, 0, arm64)})
		synctest.Wait()
		arm.on(t, "a")
		time.Sleep(10*time.Second - 1)
		synctest.Wait()
		amd.still(t, 0, "linux/amd64: no worker attached")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		amd.refused(t, "")
		if _, err := s.Enqueue([]Demand{{Platform: platform(amd64)}}); err == nil {
			t.Error("a platform that nobody serves was queued after the grace")
		}
	})
}

func TestScheduler_AWaitingLegOutlivesTheLossOfItsWorkers(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 1, arm64), worker("b", 1, 1, arm64).in(Draining, ""))
		w := wait(t.Context(), enqueue(t, s, arm64), 0)
		s.Update([]Worker{worker("b", 1, 1, arm64).in(Draining, "")})
		time.Sleep(time.Hour) // b exists, in whatever state
		synctest.Wait()
		w.still(t, 0, "linux/arm64: 1 draining")
		s.Update(nil)
		time.Sleep(s.Grace - time.Second)
		s.Update([]Worker{worker("c", 1, 1, arm64)}) // the time starts anew
		s.Update(nil)
		time.Sleep(s.Grace - time.Second)
		synctest.Wait()
		w.still(t, 0, "linux/arm64: no worker attached")
		s.Update([]Worker{worker("c", 1, 0, arm64)})
		synctest.Wait()
		w.on(t, "c")
	})
}

func TestScheduler_AWaitingLegIsRefusedWhenItsPlatformIsGoneForGood(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 1, arm64), worker("b", 1, 1, amd64))
		ticket := enqueue(t, s, arm64, amd64, "*")
		arm, amd, anywhere := wait(t.Context(), ticket, 0), wait(t.Context(), ticket, 1), wait(t.Context(), ticket, 2)
		s.Update([]Worker{worker("b", 1, 1, amd64)})
		time.Sleep(s.Grace)
		synctest.Wait()
		arm.refused(t, "")
		if amd.look().done || anywhere.look().done {
			t.Errorf("legs that b can run were refused: %v, %v", amd.look().err, anywhere.look().err)
		}
		s.Update(nil)
		time.Sleep(s.Grace)
		synctest.Wait()
		amd.refused(t, "")
		anywhere.refused(t, "")
		if len(s.classes) != 0 {
			t.Errorf("%d queues are left", len(s.classes))
		}
	})
}

func TestScheduler_GrantsOnALostWorkerCountAgainWhenItIsBack(t *testing.T) {
	t.Parallel()
	s := old(worker("a", 2, 0, arm64))
	ticket := enqueue(t, s, arm64)
	s.Update(nil)
	s.Update([]Worker{worker("a", 2, 0, arm64)})
	if used := s.Snapshot()[0].Used; used != 1 {
		t.Errorf("%d used, want 1", used)
	}
	s.Update(nil)
	ticket.Release(0)
	s.Update([]Worker{worker("a", 2, 0, arm64)})
	if used := s.Snapshot()[0].Used; used != 0 {
		t.Errorf("%d used, want 0", used)
	}
}

func TestScheduler_SharedSlotsKeepABuildFromWaitingForItself(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, amd64, "linux/386"))
		s.Share = true
		ticket := enqueue(t, s, amd64, "linux/386", "*")
		own, shared, third := wait(t.Context(), ticket, 0), wait(t.Context(), ticket, 1), wait(t.Context(), ticket, 2)
		third.on(t, "a")
		want := Assignment{Worker: "a", Shared: true, With: 0, Why: "shares the slot of leg 0 of this build: no other is free"}
		if a, b := own.on(t, "a"), shared.on(t, "a"); a.Shared || b != want {
			t.Errorf("got %+v and %+v", a, b)
		}
		other := wait(t.Context(), enqueue(t, s, amd64), 0)
		ticket.Release(0)
		ticket.Release(2)
		synctest.Wait()
		other.still(t, 0, "linux/amd64: 1 full") // the slot is in use until the last leg ends
		ticket.Release(1)
		synctest.Wait()
		other.on(t, "a")
	})
}

func TestScheduler_SnapshotIsSortedAndBelievesNoNonsense(t *testing.T) {
	t.Parallel()
	s := old(worker("b", -1, -5, arm64), worker("a", 1<<62, 1<<62, arm64), worker("b", 7, 0, arm64))
	got := s.Snapshot()
	want := []Worker{worker("a", maxSlots, maxSlots, arm64), worker("b", 0, 0, arm64)}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	got[0].Name = "changed"
	if s.Snapshot()[0].Name != "a" {
		t.Error("the snapshot is not a copy")
	}
}

func TestState_String(t *testing.T) {
	t.Parallel()
	for state, want := range map[State]string{Ready: "ready", Draining: "draining", Unavailable: "unavailable", State(9): "unknown"} {
		if got := state.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
