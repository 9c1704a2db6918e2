package storetest

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// clients is how many callers there are at a time.
const clients = 64

// History is how many ended jobs a benchmark of lists goes over. Job i of them, from
// 1, is called as HistoricID says, tenant-(i%10)'s, of registry.example/app-(i%1000);
// it has failed if i%100 is 0, been cancelled if that is 1, else succeeded, and was
// created i seconds after 2020 began.
const History = 1_000_000

// HistoricID is the id of a job of the history.
func HistoricID(i int) string { return fmt.Sprintf("job-%09d", i) }

// realistic is a job of the usual size.
func realistic(id string) store.Job {
	j := job(id)
	j.RequestID, j.Spec, j.Sealed = id, make([]byte, 1200), make([]byte, 300)
	return j
}

// Bench measures what there is most of: open returns an empty store.
func Bench(b *testing.B, open func(testing.TB) store.Store) {
	b.Run("Submit", func(b *testing.B) { benchSubmit(b, open(b)) })
	b.Run("Update", func(b *testing.B) { benchUpdate(b, open(b)) })
	b.Run("Claim", func(b *testing.B) { benchClaim(b, open(b)) })
	b.Run("Events", func(b *testing.B) { benchEvents(b, open(b)) })
}

func parallel(b *testing.B, do func(i int64) error) {
	b.Helper()
	var n atomic.Int64
	b.SetParallelism(max(1, clients/runtime.GOMAXPROCS(0)))
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := do(n.Add(1)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "per-s")
}

func benchSubmit(b *testing.B, s store.Store) {
	parallel(b, func(i int64) error {
		_, _, err := s.Submit(b.Context(), realistic(HistoricID(int(i))), events(1))
		return err
	})
}

func benchUpdate(b *testing.B, s store.Store) {
	for i := range clients {
		submit(b, s, realistic(HistoricID(i)))
	}
	held, err := s.Claim(b.Context(), "farm-1", long, clients)
	ok(b, err)
	leg := store.Leg{Platform: "linux/amd64", State: store.Running, Attempts: []store.Attempt{{Number: 1, Began: created}}}
	parallel(b, func(i int64) error {
		_, err := s.Update(b.Context(), held[i%clients].Lease, store.Update{Legs: []store.Leg{leg}, Events: events(4)})
		return err
	})
}

// benchClaim claims from 10,000 queued jobs, 1,000 others of which are running.
func benchClaim(b *testing.B, s store.Store) {
	fill(b, s, 11_000)
	_, err := s.Claim(b.Context(), "farm-1", long, 1000)
	ok(b, err)
	for b.Loop() {
		got, err := s.Claim(b.Context(), "farm-2", over, 8)
		ok(b, err)
		if len(got) != 8 {
			b.Fatalf("%d jobs were claimed", len(got))
		}
	}
}

// fill submits n jobs, many at a time.
func fill(b *testing.B, s store.Store, n int) {
	b.Helper()
	var next atomic.Int64
	failures := make(chan error, clients)
	for range clients {
		go func() { // until n
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				if _, _, err := s.Submit(b.Context(), realistic(HistoricID(int(i))), events(1)); err != nil {
					failures <- err
					return
				}
			}
			failures <- nil
		}()
	}
	for range clients {
		ok(b, <-failures)
	}
}

// benchEvents reads the last hundred of 100,000 events.
func benchEvents(b *testing.B, s store.Store) {
	submit(b, s, realistic("a"))
	c := claim(b, s, "farm-1", long)
	for range 100 {
		_, err := s.Update(b.Context(), c.Lease, store.Update{Events: events(1000)})
		ok(b, err)
	}
	for b.Loop() {
		got, err := s.Events(b.Context(), "a", 99_901, 100)
		ok(b, err)
		if len(got) != 100 {
			b.Fatalf("%d events", len(got))
		}
	}
}

// BenchList reads pages of a store that holds the History.
func BenchList(b *testing.B, s store.Store) {
	start := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, bench := range []struct {
		name string
		q    store.Query
		rows int
	}{
		{"All", store.Query{Limit: 100}, 100},
		{"All1000", store.Query{Limit: 1000}, 1000},
		{"Middle", store.Query{Limit: 100, Before: HistoricID(History / 2)}, 100},
		{"State", store.Query{Limit: 100, States: []store.State{store.Failed}}, 100},
		{"StateOfNone", store.Query{Limit: 100, States: []store.State{store.Running}}, 0},
		{"Tenant", store.Query{Limit: 100, Tenants: []string{"tenant-3"}}, 100},
		{"TenantState", store.Query{Limit: 100, Tenants: []string{"tenant-0"}, States: []store.State{store.Failed}}, 100},
		{"TwoTenants", store.Query{Limit: 100, Tenants: []string{"tenant-3", "tenant-7"}}, 100},
		{"Repository", store.Query{Limit: 100, Tenants: []string{"tenant-7"}, Repository: "registry.example/app-77"}, 100},
		{"RepositoryState", store.Query{Limit: 100, Repository: "registry.example/app-100", States: []store.State{store.Failed}}, 100},
		{"RepositoryOfAnother", store.Query{Limit: 100, Tenants: []string{"tenant-3"}, Repository: "registry.example/app-77"}, 0},
		{"Since", store.Query{Limit: 100, Since: start.Add((History - 50) * time.Second)}, 51},
		{"SinceTenant", store.Query{Limit: 100, Tenants: []string{"tenant-3"}, Since: start.Add((History - 100) * time.Second)}, 10},
	} {
		b.Run(bench.name, func(b *testing.B) {
			var worst time.Duration
			for b.Loop() {
				began := time.Now()
				got, err := s.List(b.Context(), bench.q)
				worst = max(worst, time.Since(began))
				ok(b, err)
				if len(got) != bench.rows {
					b.Fatalf("%d jobs instead of %d", len(got), bench.rows)
				}
			}
			b.ReportMetric(float64(worst.Microseconds())/1000, "max-ms")
		})
	}
	b.Run("Claim", func(b *testing.B) {
		for b.Loop() {
			_, err := s.Claim(b.Context(), "farm-1", long, 8)
			ok(b, err)
		}
	})
	b.Run("CountJobs", func(b *testing.B) {
		for b.Loop() {
			_, err := s.CountJobs(b.Context())
			ok(b, err)
		}
	})
}
