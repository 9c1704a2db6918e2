package schedule

import (
	"fmt"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// One worker told by itself is as good as all told at once.
func TestUpdateWorker_IsUpdateOfOne(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var fleet []Worker
		for i := range rapid.IntRange(0, 4).Draw(t, "workers") {
			fleet = append(fleet, worker(fmt.Sprint(i), 2, 0, amd64))
			fleet[i].Reported = time.Unix(1, 0)
		}
		one, all := old(fleet...), old(fleet...)
		var tickets [2][]*Ticket
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			switch rapid.IntRange(0, 3).Draw(t, "step") {
			case 0:
				for i, s := range []*Scheduler{one, all} {
					if ticket, err := s.Enqueue([]Demand{{Platform: platform(amd64)}}); err == nil {
						tickets[i] = append(tickets[i], ticket)
					}
				}
			case 1:
				if n := len(tickets[0]); n > 0 {
					at := rapid.IntRange(0, n-1).Draw(t, "ticket")
					tickets[0][at].Refused(0)
					tickets[1][at].Refused(0)
				}
			default:
				name := fmt.Sprint(rapid.IntRange(0, 5).Draw(t, "worker"))
				next := worker(name, rapid.IntRange(-1, 3).Draw(t, "slots"), rapid.IntRange(-1, 3).Draw(t, "used"), amd64).in(
					rapid.SampledFrom([]State{Ready, Ready, Draining, Cordoned}).Draw(t, "state"), rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "reason"))
				next.Pool = rapid.SampledFrom([]string{"", "", "office"}).Draw(t, "pool")
				next.Reported = time.Unix(rapid.Int64Range(1, 3).Draw(t, "report"), 0)
				one.UpdateWorker(next)
				if i := slices.IndexFunc(fleet, func(w Worker) bool { return w.Name == name }); i >= 0 {
					fleet[i] = next
					all.Update(fleet)
				}
			}
			if a, b := one.Snapshot(), all.Snapshot(); len(a)+len(b) > 0 && !reflect.DeepEqual(a, b) {
				t.Fatalf("by itself %+v\nwith all %+v", a, b)
			}
			if a, b := one.Waiting(), all.Waiting(); !reflect.DeepEqual(a, b) {
				t.Fatalf("by itself %v wait, with all %v", a, b)
			}
		}
	})
}

func TestUpdateWorker_LetsWhoWaitsHaveTheSlot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := old(worker("a", 1, 1, amd64), worker("b", 1, 0, amd64).in(Cordoned, "the disk is full"))
		first, second := enqueue(t, s, amd64), enqueue(t, s, amd64)
		defer first.Close()
		defer second.Close()
		got := make(chan string, 2)
		for _, ticket := range []*Ticket{first, second} {
			go func() {
				a, _ := ticket.Wait(t.Context(), 0, nil)
				got <- a.Worker
			}()
		}
		synctest.Wait()
		if len(got) != 0 {
			t.Fatal("a slot that nobody has was given away")
		}
		s.UpdateWorker(worker("stranger", 4, 0, amd64))
		s.UpdateWorker(worker("a", 1, 0, amd64))
		if w := <-got; w != "a" {
			t.Errorf("the first got %s", w)
		}
		s.UpdateWorker(worker("b", 1, 0, amd64))
		if w := <-got; w != "b" {
			t.Errorf("the second got %s", w)
		}
		if n := len(s.Snapshot()); n != 2 {
			t.Errorf("%d workers", n)
		}
	})
}

// BenchmarkUpdateWorker is a heartbeat of one of 1,000 workers.
func BenchmarkUpdateWorker(b *testing.B) {
	var fleet []Worker
	for i := range 1000 {
		fleet = append(fleet, worker(fmt.Sprintf("worker-%04d", i), 4, 1, amd64, "linux/386"))
	}
	b.Run("alone", func(b *testing.B) {
		s := old(fleet...)
		for i := 0; b.Loop(); i++ {
			s.UpdateWorker(fleet[i%len(fleet)])
		}
	})
	b.Run("with all", func(b *testing.B) {
		s := old(fleet...)
		for b.Loop() {
			s.Update(fleet)
		}
	})
}
