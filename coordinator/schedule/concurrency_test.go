package schedule

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// Everything at once, for the race detector; and no worker ever runs more attempts
// than it has slots.
func TestScheduler_ConcurrentBuildsNeverShareASlot(t *testing.T) {
	t.Parallel()
	const workers, slots, builders, rounds = 4, 2, 16, 40
	fleet := make([]Worker, workers)
	running := map[string]*atomic.Int64{}
	for i := range fleet {
		fleet[i] = worker(fmt.Sprintf("w%d", i), slots, 0, []string{amd64, arm64}[i%2])
		running[fleet[i].Name] = &atomic.Int64{}
	}
	s := old(fleet...)
	attempt := func(ticket *Ticket, leg int) {
		a, err := ticket.Wait(t.Context(), leg, func(Position) { s.Snapshot() }) // no lock is held
		if err != nil {
			t.Error(err)
			return
		}
		if n := running[a.Worker].Add(1); n > slots {
			t.Errorf("%d attempts run on %s", n, a.Worker)
		}
		running[a.Worker].Add(-1)
	}
	build := func(key string) {
		ticket, err := s.Enqueue([]Demand{{Platform: platform(amd64), Key: key}, {Platform: platform(arm64), Key: key}})
		if err != nil {
			t.Error(err)
			return
		}
		defer ticket.Close()
		var legs sync.WaitGroup
		for leg := range 2 {
			legs.Go(func() {
				attempt(ticket, leg)
				ticket.Requeue(leg)
				attempt(ticket, leg)
				ticket.Release(leg)
			})
		}
		legs.Wait()
	}
	var all sync.WaitGroup
	for b := range builders {
		all.Go(func() {
			for range rounds {
				build(fmt.Sprintf("project-%d", b))
				s.Update(fleet)
			}
		})
	}
	all.Wait()
	for _, w := range s.Snapshot() {
		if w.Used != 0 {
			t.Errorf("%s: %d slots used at the end", w.Name, w.Used)
		}
	}
}
