package schedule

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestTicket_ARefusedSlotIsQueuedAgainInItsOldPlace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		reported := time.Now()
		w := worker("a", 1, 0, arm64)
		w.Reported = reported
		s := old(w)
		first, second := enqueue(t, s, arm64), enqueue(t, s, arm64)
		wait(t.Context(), first, 0).on(t, "a")
		w2 := wait(t.Context(), second, 0)
		time.Sleep(time.Second)
		first.Refused(0)
		first.Refused(0) // says nothing new
		w1 := wait(t.Context(), first, 0)
		w1.still(t, 0, "linux/arm64: 1 full")
		s.Update([]Worker{w, worker("b", 1, 1, arm64)}) // a has not reported since
		time.Sleep(announceEvery)
		synctest.Wait()
		w1.still(t, 0, "linux/arm64: 2 full")
		w.Reported = reported.Add(time.Second)
		s.Update([]Worker{w})
		synctest.Wait()
		if a := w1.on(t, "a"); a.Waited != time.Second+announceEvery {
			t.Errorf("waited %v since it was queued first", a.Waited)
		}
		time.Sleep(announceEvery)
		synctest.Wait()
		w2.still(t, 0, "linux/arm64: 1 full")
	})
}

func TestTicket_ARefusedSlotWithoutReportTimesCountsUntilTheNextUpdate(t *testing.T) {
	t.Parallel()
	s := old(worker("a", 1, 0, arm64))
	ticket := enqueue(t, s, arm64)
	ticket.Refused(0)
	if free := s.Snapshot()[0].free(); free != 0 {
		t.Errorf("%d slots free", free)
	}
	s.Update([]Worker{worker("a", 1, 0, arm64)})
	if ticket.legs[0].state != granted {
		t.Error("not granted after the update")
	}
}

func TestTicket_AnExcludedWorkerIsNotChosenAgain(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64), worker("b", 1, 1, arm64))
		ticket := enqueue(t, s, arm64)
		wait(t.Context(), ticket, 0).on(t, "a")
		ticket.Exclude(0, "a")
		ticket.Exclude(0, "a")
		ticket.Requeue(0)
		later := enqueue(t, s, arm64)
		wait(t.Context(), later, 0).on(t, "a")
		w := wait(t.Context(), ticket, 0)
		w.still(t, 0, "linux/arm64: 1 full, 1 excluded after an earlier attempt")
		ticket.Exclude(0, "b") // while it waits
		time.Sleep(announceEvery)
		synctest.Wait()
		w.still(t, 0, "linux/arm64: 2 excluded after an earlier attempt")
		time.Sleep(s.Grace)
		synctest.Wait()
		w.refused(t, "2 excluded after an earlier attempt")
	})
}

func TestTicket_AReadmittedWorkerIsChosenAgainInTheSamePlace(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 1, arm64), worker("b", 1, 1, arm64))
		ticket := enqueue(t, s, arm64)
		w := wait(t.Context(), ticket, 0)
		ticket.Exclude(0, "a")
		ticket.Exclude(0, "b")
		later := wait(t.Context(), enqueue(t, s, arm64), 0)
		ticket.Readmit(0)
		ticket.Readmit(0)
		s.Update([]Worker{worker("a", 1, 0, arm64), worker("b", 1, 1, arm64)})
		synctest.Wait()
		w.on(t, "a")
		time.Sleep(announceEvery)
		synctest.Wait()
		later.still(t, 0, "linux/arm64: 2 full")
		ticket.Close()
		ticket.Readmit(0)
		synctest.Wait()
		later.on(t, "a")
	})
}

func TestTicket_RequeueLetsNoLaterBuildIn(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64))
		first, second := enqueue(t, s, arm64), enqueue(t, s, arm64)
		wait(t.Context(), first, 0).on(t, "a")
		w := wait(t.Context(), second, 0)
		first.Requeue(0)
		wait(t.Context(), first, 0).on(t, "a")
		w.still(t, 0, "linux/arm64: 1 full")
		first.Release(0)
		synctest.Wait()
		w.on(t, "a")
		third := wait(t.Context(), enqueue(t, s, arm64), 0)
		third.still(t, 0, "linux/arm64: 1 full")
		again := wait(t.Context(), first, 0) // after Release the slot is gone, but not the place
		again.still(t, 0, "linux/arm64: 1 full")
		time.Sleep(announceEvery)
		synctest.Wait()
		third.still(t, 1, "linux/arm64: 1 full")
	})
}

func TestTicket_ReleaseAndCloseAreIdempotent(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 2, 0, arm64))
		ticket, other := enqueue(t, s, arm64, arm64, arm64), enqueue(t, s, arm64)
		w2, wOther := wait(t.Context(), ticket, 2), wait(t.Context(), other, 0)
		ticket.Release(2) // waits: stays so
		synctest.Wait()
		w2.still(t, 0, "linux/arm64: 1 full")
		ticket.Release(0)
		ticket.Release(0)
		synctest.Wait()
		w2.on(t, "a")
		if wOther.look().done {
			t.Fatal("one slot was given back twice")
		}
		idle := wait(t.Context(), ticket, 0)
		ticket.Close()
		ticket.Close()
		ticket.Release(1)
		ticket.Refused(1)
		ticket.Requeue(1)
		ticket.Exclude(1, "a")
		synctest.Wait()
		wOther.on(t, "a")
		if !errors.Is(idle.look().err, ErrClosed) {
			t.Errorf("waiting on a closed ticket: %v", idle.look().err)
		}
		if w := wait(t.Context(), ticket, 1); !errors.Is(w.look().err, ErrClosed) {
			t.Errorf("got %v", w.look().err)
		}
		if used := s.Snapshot()[0].Used; used != 1 {
			t.Errorf("%d slots used, want 1", used)
		}
	})
}

func TestTicket_AWaitThatIsCancelledLeavesTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64))
		running := enqueue(t, s, arm64)
		gone := errors.New("the client has gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		w, next := wait(ctx, enqueue(t, s, arm64), 0), wait(t.Context(), enqueue(t, s, arm64), 0)
		next.still(t, 1, "linux/arm64: 1 full")
		cancel(gone)
		synctest.Wait()
		if !w.look().done || !errors.Is(w.look().err, gone) || !strings.Contains(w.look().err.Error(), "waiting for a linux/arm64 worker") {
			t.Fatalf("got %v", w.look().err)
		}
		running.Close()
		synctest.Wait()
		next.on(t, "a")

		s.Update([]Worker{worker("a", 2, 1, arm64)})
		if late := wait(ctx, enqueue(t, s, arm64), 0); !errors.Is(late.look().err, gone) {
			t.Errorf("got %v", late.look().err)
		}
		if used := s.Snapshot()[0].Used; used != 1 || len(s.classes) != 0 {
			t.Errorf("%d slots used and %d queues are left", used, len(s.classes))
		}
	})
}

func TestTicket_RefusingASlotRefusesThoseWhoShareIt(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, amd64))
		s.Share = true
		ticket := enqueue(t, s, amd64, amd64)
		wait(t.Context(), ticket, 1).on(t, "a")
		ticket.Refused(0)
		w0, w1 := wait(t.Context(), ticket, 0), wait(t.Context(), ticket, 1)
		w0.still(t, 0, "linux/amd64: 1 full")
		w1.still(t, 1, "linux/amd64: 1 full")
		s.Update([]Worker{worker("a", 2, 0, amd64)})
		synctest.Wait()
		w0.on(t, "a")
		w1.on(t, "a")
	})
}

func TestTicket_ALegForOneWorkerWaitsForItAndHoldsUpNobodyElse(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64), worker("b", 1, 0, arm64))
		onA := func() *Ticket {
			ticket, err := s.Enqueue([]Demand{{Platform: platform(arm64), On: "a"}})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(ticket.Close)
			return ticket
		}
		first, second := onA(), onA()
		wait(t.Context(), first, 0).on(t, "a")
		w2 := wait(t.Context(), second, 0)
		w2.still(t, 0, "linux/arm64: 1 full")
		wait(t.Context(), enqueue(t, s, arm64), 0).on(t, "b")
		third := wait(t.Context(), enqueue(t, s, arm64), 0)
		third.still(t, 1, "linux/arm64: 2 full") // both compete for a
		first.Release(0)
		synctest.Wait()
		w2.on(t, "a")
		time.Sleep(announceEvery)
		synctest.Wait()
		third.still(t, 0, "linux/arm64: 2 full")
	})
}

func TestTicket_ALegForOneWorkerThatHasLeftIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 1, arm64), worker("b", 1, 0, arm64))
		if _, err := s.Enqueue([]Demand{{Platform: platform(arm64), On: "c"}}); err == nil {
			t.Error("a worker that nobody knows was waited for")
		}
		ticket, err := s.Enqueue([]Demand{{Platform: platform(arm64), On: "a"}})
		if err != nil {
			t.Fatal(err)
		}
		defer ticket.Close()
		w := wait(t.Context(), ticket, 0)
		s.Update([]Worker{worker("b", 1, 0, arm64)})
		time.Sleep(s.Grace - time.Second)
		synctest.Wait()
		w.still(t, 0, "linux/arm64: no worker attached")
		time.Sleep(2 * time.Second)
		synctest.Wait()
		w.refused(t, "")
	})
}
