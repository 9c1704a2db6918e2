package schedule

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"
)

// bigFleet is n workers of both kinds with all their variants.
func bigFleet(n int) []Worker {
	kinds := [][]string{
		{amd64, "linux/amd64/v2", "linux/amd64/v3", "linux/386"},
		{arm64, "linux/arm/v7", "linux/arm/v6"},
	}
	fleet := make([]Worker, n)
	for i := range fleet {
		fleet[i] = worker(fmt.Sprintf("worker-%04d", i), 4, 0, kinds[i%2]...)
	}
	return fleet
}

// crowd fills the fleet and queues waiting more legs, two to a build. With each, a
// goroutine waits, as in a coordinator, until stop is called. It returns all tickets,
// oldest first.
func crowd(b *testing.B, s *Scheduler, waiting int) (tickets []*Ticket, stop func()) {
	b.Helper()
	slots := 0
	for _, w := range s.Snapshot() {
		slots += w.Slots
	}
	ctx, cancel := context.WithCancel(b.Context())
	var waits sync.WaitGroup
	for i := range (slots + waiting) / 2 {
		ticket := queueBuild(b, s, i)
		tickets = append(tickets, ticket)
		for leg := range 2 {
			waits.Go(func() { _, _ = ticket.Wait(ctx, leg, func(Position) {}) })
		}
	}
	return tickets, func() { cancel(); waits.Wait() }
}

func queueBuild(b *testing.B, s *Scheduler, i int) *Ticket {
	b.Helper()
	key := fmt.Sprintf("project-%d", i%3000)
	ticket, err := s.Enqueue([]Demand{{Platform: platform(amd64), Key: key}, {Platform: platform(arm64), Key: key}})
	if err != nil {
		b.Fatal(err)
	}
	return ticket
}

// One build ends, so that one that waits gets its slots, and one arrives: four events
// and two grants, with 5,000 legs waiting.
func BenchmarkScheduler_BuildEndsAndNextIsServed(b *testing.B) {
	s := old(bigFleet(1000)...)
	tickets, stop := crowd(b, s, 5000)
	defer stop()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		tickets[0].Release(0)
		tickets[0].Release(1)
		tickets[0].Close()
		tickets = append(tickets[1:], queueBuild(b, s, i))
	}
}

// A build on an idle farm: enqueue, two grants among 1,000 equals, end.
func BenchmarkScheduler_BuildOnAnIdleFarm(b *testing.B) {
	s := old(bigFleet(1000)...)
	for i := 0; b.Loop(); i++ {
		queueBuild(b, s, i).Close()
	}
}

// One agent of 1,000 reports, with 5,000 legs waiting.
func BenchmarkScheduler_Update(b *testing.B) {
	fleet := bigFleet(1000)
	s := old(fleet...)
	_, stop := crowd(b, s, 5000)
	defer stop()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		fleet[i%len(fleet)].Reported = time.Unix(int64(i), 0)
		s.Update(fleet)
	}
}

// A worker comes or goes, which may change who is eligible for what.
func BenchmarkScheduler_UpdateThatChangesTheFleet(b *testing.B) {
	fleet := bigFleet(1000)
	s := old(fleet...)
	_, stop := crowd(b, s, 5000)
	defer stop()
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		s.Update(fleet[i%2:])
	}
}
