package job

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// BenchmarkWatch_FanOut is from an event's commit until each of 1,000 watchers has
// it, encoded.
func BenchmarkWatch_FanOut(b *testing.B) {
	const watchers = 1000
	dir := b.TempDir()
	s, err := sqlite.Open(b.Context(), sqlite.Options{Path: filepath.Join(dir, "db"), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	if _, _, err := s.Submit(b.Context(), store.Job{ID: "j", Tenant: "t", Spec: []byte{}, Legs: []store.Leg{{Platform: amd64}}}, nil); err != nil {
		b.Fatal(err)
	}
	claimed, err := s.Claim(b.Context(), "c", time.Hour, 1)
	if err != nil {
		b.Fatal(err)
	}
	f := newFeed(Options{Store: s, Poll: time.Second, MaxWatchers: watchers, Log: slog.New(slog.DiscardHandler)})
	ctx, stop := context.WithCancel(b.Context())
	var all sync.WaitGroup
	all.Go(func() { f.run(ctx) })
	sent := make([]time.Time, b.N+1)
	late := make([][]time.Duration, watchers)
	for i := range watchers {
		t, err := f.join(claimed[0].Job)
		if err != nil {
			b.Fatal(err)
		}
		all.Go(func() {
			defer f.leave(t)
			_ = f.watch(ctx, t, 0, func(e *archfarmv1.JobEvent) error {
				_, err := proto.Marshal(e)
				late[i] = append(late[i], time.Since(sent[e.GetSeq()]))
				return err
			})
		})
	}
	b.ResetTimer()
	for i := range b.N {
		events, err := stored(noticeEvent(fmt.Sprint(i)))
		if err != nil {
			b.Fatal(err)
		}
		last := i == b.N-1
		if last {
			if events, err = stored(jobEvent(store.Job{ID: "j", State: store.Succeeded})); err != nil {
				b.Fatal(err)
			}
		}
		sent[i+1] = time.Now()
		if _, err := s.Update(b.Context(), claimed[0].Lease, store.Update{Events: events}); err != nil {
			b.Fatal(err)
		}
		f.wake("j")
		if !last {
			time.Sleep(flushAfter) // as a recorder does
		}
	}
	for f.watching() > 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	all.Wait()
	times := slices.Concat(late...)
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "ms-p50")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1000, "ms-p99")
	b.ReportMetric(float64(len(times))/float64(b.N), "deliveries/op")
}

func (f *feed) watching() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.watchers
}
