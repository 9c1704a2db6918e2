package fleet_test

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"testing"

	"github.com/archfarm/archfarm/coordinator/fleet"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestFleet_TellsOfAReportByItself(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		var told []string
		f.Reported = func(w *fleet.Worker) {
			told = append(told, fmt.Sprintf("%s %d", w.Name, w.Report().GetSlots().GetUsed()))
			f.Workers() // nothing is locked
		}
		a, _ := f.attach(t, "amd-1")
		b, _ := f.attach(t, "amd-2")
		before := len(f.seen)
		a.report(report(archfarmv1.Worker_STATE_READY, 2, 1))
		b.report(report(archfarmv1.Worker_STATE_READY, 2, 2))
		a.report(report(archfarmv1.Worker_STATE_READY, 2, 1)) // also one that changes nothing: it vouches for what it says
		if got := fmt.Sprint(told); got != "[amd-1 1 amd-2 2 amd-1 1]" || len(f.seen) != before {
			t.Errorf("told %s, and %d times of all", got, len(f.seen)-before)
		}
	})
}

func TestFleet_TellsTogetherOfWhatHappensAtOneTime(t *testing.T) {
	t.Parallel()
	const crowd = 51
	var f *fleet.Fleet
	var told []int
	f = fleet.New(slog.New(slog.DiscardHandler), func(all []*fleet.Worker) { // calls do not overlap
		for len(told) == 0 && len(f.Workers()) < crowd { // the first takes until all have come
			runtime.Gosched()
		}
		told = append(told, len(all))
	})
	var attached, ended sync.WaitGroup
	attached.Add(crowd)
	for i := range crowd {
		a := &arriving{conversation: talk(t.Context(), &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: hello(fmt.Sprint(i))}}), in: attached.Done}
		ended.Go(func() { _ = f.Attach(a) })
	}
	attached.Wait()
	if len(told) > 2 || told[len(told)-1] != crowd {
		t.Errorf("told of %v workers", told)
	}
	f.Close()
	ended.Wait()
	if told[len(told)-1] != 0 || len(f.Workers()) != 0 {
		t.Errorf("in the end told of %d workers", told[len(told)-1])
	}
}

// conversation is an agent's stream without a network.
type conversation struct {
	archfarmv1.AgentService_AttachServer
	ctx  context.Context
	said chan *archfarmv1.AttachRequest
}

func talk(ctx context.Context, said ...*archfarmv1.AttachRequest) *conversation {
	c := &conversation{ctx: ctx, said: make(chan *archfarmv1.AttachRequest, len(said))}
	for _, m := range said {
		c.said <- m
	}
	return c
}

func (c *conversation) Context() context.Context              { return c.ctx }
func (c *conversation) Send(*archfarmv1.AttachResponse) error { return nil }
func (c *conversation) Recv() (*archfarmv1.AttachRequest, error) {
	select {
	case m := <-c.said:
		return m, nil
	case <-c.ctx.Done():
		return nil, c.ctx.Err()
	}
}

// BenchmarkJoin attaches 1,000 workers at once, over gRPC, to a coordinator that
// looks at all of them after each change.
func BenchmarkJoin(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		f := newFarm(b)
		calls, seen := 0, 0
		f.Fleet = fleet.New(slog.New(slog.DiscardHandler), func(all []*fleet.Worker) {
			calls++
			for _, w := range all {
				seen += int(w.Report().GetSlots().GetTotal())
			}
		})
		ctx, cancel := context.WithCancel(b.Context())
		var attached, ended sync.WaitGroup
		attached.Add(1000)
		b.StartTimer()
		for i := range 1000 {
			c := &arriving{conversation: talk(ctx, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: hello(fmt.Sprintf("worker-%d", i))}}), in: attached.Done}
			ended.Go(func() { _ = f.Attach(c) })
		}
		attached.Wait()
		b.StopTimer()
		b.ReportMetric(float64(calls), "calls/join")
		cancel()
		ended.Wait()
		b.StartTimer()
	}
}

// arriving tells when its worker is in the fleet: when it is listened to again.
type arriving struct {
	*conversation
	in   func()
	once sync.Once
	asks int
}

func (a *arriving) Recv() (*archfarmv1.AttachRequest, error) {
	if a.asks++; a.asks == 2 {
		a.once.Do(a.in)
	}
	return a.conversation.Recv()
}

// BenchmarkReports has each of 1,000 workers report once.
func BenchmarkReports(b *testing.B) {
	for name, alone := range map[string]bool{"each by itself": true, "with all others": false} {
		b.Run(name, func(b *testing.B) {
			told := make(chan struct{}, 2000) // room for all arrivals and departures
			work := 0
			look := func(all ...*fleet.Worker) {
				for _, w := range all {
					work += int(w.Report().GetSlots().GetTotal())
				}
				told <- struct{}{}
			}
			f := fleet.New(slog.New(slog.DiscardHandler), func(all []*fleet.Worker) { look(all...) })
			if alone {
				f.Reported = func(w *fleet.Worker) { look(w) }
			}
			ctx, cancel := context.WithCancel(b.Context())
			var attached, ended sync.WaitGroup
			defer ended.Wait()
			defer cancel()
			attached.Add(1000)
			var agents []*arriving
			for i := range 1000 {
				c := &arriving{conversation: talk(ctx, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: hello(fmt.Sprintf("worker-%d", i))}}), in: attached.Done}
				agents = append(agents, c)
				ended.Go(func() { _ = f.Attach(c) })
			}
			attached.Wait()
			for len(told) > 0 {
				<-told
			}
			m := &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Report{Report: report(archfarmv1.Worker_STATE_READY, 2, 1)}}
			for b.Loop() {
				for _, a := range agents {
					a.said <- m
					<-told
				}
			}
		})
	}
}
