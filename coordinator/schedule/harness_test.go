package schedule

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	amd64 = "linux/amd64"
	arm64 = "linux/arm64"
)

// platform parses and normalises a platform.
func platform(s string) ocispecs.Platform {
	return platforms.Normalize(platforms.MustParse(s))
}

// worker is a ready one.
func worker(name string, slots, used int, names ...string) Worker {
	w := Worker{Name: name, Slots: slots, Used: used}
	for _, n := range names {
		w.Platforms = append(w.Platforms, platform(n))
	}
	return w
}

// in returns the worker in another state.
func (w Worker) in(s State, reason string) Worker {
	w.State, w.Reason = s, reason
	return w
}

// old returns a scheduler whose time for workers to attach is over.
func old(workers ...Worker) *Scheduler {
	s := New(nil)
	s.started = s.started.Add(-time.Hour)
	s.Update(workers)
	return s
}

// enqueue queues a build with a leg for each platform; "*" is a leg for anywhere.
func enqueue(t *testing.T, s *Scheduler, names ...string) *Ticket {
	t.Helper()
	demands := make([]Demand, len(names))
	for i, name := range names {
		if name == "*" {
			demands[i] = Demand{Platform: platform("linux/s390x"), Anywhere: true}
			continue
		}
		demands[i] = Demand{Platform: platform(name)}
	}
	ticket, err := s.Enqueue(demands)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ticket.Close)
	return ticket
}

// waiting is a Wait under way in a synctest bubble.
type waiting struct {
	mu  sync.Mutex // synctest orders in time, but the race detector cannot know
	now outcome
}

// outcome is what a Wait has come to so far.
type outcome struct {
	positions  []Position
	done       bool
	assignment Assignment
	err        error
}

func wait(ctx context.Context, ticket *Ticket, i int) *waiting {
	w := &waiting{}
	go func() {
		a, err := ticket.Wait(ctx, i, func(p Position) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.now.positions = append(w.now.positions, p)
		})
		w.mu.Lock()
		defer w.mu.Unlock()
		w.now.done, w.now.assignment, w.now.err = true, a, err
	}()
	synctest.Wait()
	return w
}

// look returns what the wait has come to.
func (w *waiting) look() outcome {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

// on checks that the wait is over, with a slot on that worker, and returns it.
func (w *waiting) on(t *testing.T, name string) Assignment {
	t.Helper()
	o := w.look()
	if !o.done || o.err != nil || o.assignment.Worker != name {
		t.Fatalf("done %v, %+v, %v; want %s", o.done, o.assignment, o.err, name)
	}
	return o.assignment
}

// still checks that the wait is not over, and where it stands.
func (w *waiting) still(t *testing.T, ahead int, reason string) {
	t.Helper()
	o := w.look()
	if o.done {
		t.Fatalf("the wait is over: %+v, %v", o.assignment, o.err)
	}
	want := Position{Ahead: ahead, Reason: reason}
	if len(o.positions) == 0 || o.positions[len(o.positions)-1] != want {
		t.Fatalf("told %+v, want %+v at last", o.positions, want)
	}
}

// refused checks that the wait ended with a NoWorkerError, and its detail.
func (w *waiting) refused(t *testing.T, detail string) {
	t.Helper()
	o := w.look()
	var none *build.NoWorkerError
	if !o.done || !errors.As(o.err, &none) || none.Detail != detail {
		t.Fatalf("done %v, %v; want NoWorkerError with %q", o.done, o.err, detail)
	}
}

func bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, f)
}
