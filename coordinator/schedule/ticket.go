package schedule

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/platforms"
)

// ErrClosed is what Wait returns once its ticket is closed.
var ErrClosed = errors.New("the build has left the queue")

// announceEvery bounds how often a waiting leg's position is told again. With thousands
// of legs waiting each grant moves them all; nobody reads that fast.
const announceEvery = 250 * time.Millisecond

// Ticket is a build's place in the queue and the slots its legs hold. The legs are
// numbered as the demands were.
type Ticket struct {
	scheduler *Scheduler
	legs      []*leg
}

// Wait returns the assignment of leg i once it has one. While it waits it calls queued,
// if not nil, from the caller's goroutine: at once, and when position or reason have
// changed, or the estimate proves to be off by more than half of what it was, at most
// four times a second. After Release or an error, Wait queues the leg again, at the same
// priority.
//
// The errors: *build.NoWorkerError when for Grace the fleet has had no worker at all that
// may ever take the leg; ErrClosed; and ctx's, when it ends, with the leg out of the queue
// and its slot, if it just got one, given back.
func (t *Ticket) Wait(ctx context.Context, i int, queued func(Position)) (Assignment, error) {
	l := t.legs[i]
	var told *Position
	var toldAt time.Time
	for {
		if ctx.Err() != nil {
			t.withdraw(l)
			return Assignment{}, fmt.Errorf("waiting for a %s worker: %w", platforms.Format(l.demand.Platform), context.Cause(ctx))
		}
		at := t.look(l)
		if at.settled {
			return at.assignment, at.err
		}
		if told == nil || told.outdated(at.position, at.now.Sub(toldAt)) {
			told, toldAt = &at.position, at.now
			if queued != nil {
				queued(at.position)
			}
		}
		at.doubtful = -1
		if told.Estimate > 0 {
			at.doubtful = max(told.doubtful()-at.now.Sub(toldAt), 0)
		}
		at.sleep(ctx)
	}
}

// Refused says that the agent refused the slot that leg i was granted, because another
// coordinator has taken it: the leg waits again, as if it had never been granted, and
// the worker counts as full until it reports again. Legs that share the slot are
// refused with it: they have to Wait again, too.
func (t *Ticket) Refused(i int) {
	s, l := t.scheduler, t.legs[i]
	s.event(func() {
		if l.state != granted {
			return
		}
		name := l.assignment.Worker
		if w, attached := s.index[name]; attached {
			s.refused[name] = s.fleet[w].Reported
			s.reckon(w)
		}
		for _, other := range t.legs {
			if other.host == l {
				s.yield(other)
				s.enter(other, other.since)
			}
		}
		s.yield(l)
		s.enter(l, l.since)
	})
}

// Requeue ends the attempt of leg i and queues the leg for another one, in one step: no
// later build can slip in between, as it could between Release and Wait. A worker that
// was at fault should be excluded first.
func (t *Ticket) Requeue(i int) {
	s, l := t.scheduler, t.legs[i]
	s.event(func() {
		if s.yield(l) {
			s.enter(l, s.clock())
		}
	})
}

// Exclude keeps leg i off the worker from now on. An assignment that it holds there
// stays.
func (t *Ticket) Exclude(i int, worker string) {
	l := t.legs[i]
	t.scheduler.event(func() {
		if at, found := slices.BinarySearch(l.excluded, worker); !found {
			t.scheduler.bar(l, slices.Insert(slices.Clone(l.excluded), at, worker))
		}
	})
}

// Readmit takes back every Exclude of leg i, which keeps its place in the queue.
func (t *Ticket) Readmit(i int) {
	l := t.legs[i]
	t.scheduler.event(func() {
		if len(l.excluded) > 0 {
			t.scheduler.bar(l, nil)
		}
	})
}

// bar sets the workers that a leg is kept off.
func (s *Scheduler) bar(l *leg, workers []string) {
	if l.state != queued {
		l.excluded = workers
		return
	}
	since := l.since
	s.leave(l)
	l.excluded = workers
	s.enter(l, since)
}

// Release ends the attempt of leg i and gives its slot back, if it holds one. A leg
// that is waiting goes on waiting. It may be called any number of times.
func (t *Ticket) Release(i int) {
	t.scheduler.event(func() { t.scheduler.release(t.legs[i]) })
}

// Close takes all legs out of the queue, gives their slots back and ends their waiting
// with ErrClosed. It may be called any number of times.
func (t *Ticket) Close() {
	s := t.scheduler
	s.event(func() {
		for _, l := range t.legs {
			s.release(l)
			s.withdraw(l)
			l.state = closed
			s.signal(&l.moved)
		}
	})
}

// withdraw leaves the leg idle, unless its ticket is closed.
func (t *Ticket) withdraw(l *leg) {
	t.scheduler.event(func() { t.scheduler.withdraw(l) })
}

// release ends the leg's attempt, if it has one, and learns how long it took.
func (s *Scheduler) release(l *leg) {
	if l.state == granted {
		s.warm.took(l.demand, max(s.clock().Sub(l.began), 0))
	}
	s.yield(l)
}

// withdraw takes the leg out of the queue or its slot back, whichever it has.
func (s *Scheduler) withdraw(l *leg) {
	if l.state == queued {
		s.leave(l)
	}
	s.yield(l)
}

// standing is what a waiting leg sees when it looks.
type standing struct {
	settled    bool // there is an assignment or an error
	assignment Assignment
	err        error

	now      time.Time
	position Position
	doubtful time.Duration   // until the estimate told last has proved to be wrong; negative: none was told
	patience time.Duration   // until the wait is hopeless; negative: for ever
	moved    <-chan struct{} // closed when the leg is granted a slot, closed, …
	changed  <-chan struct{} // closed when its position or reason may have changed
}

// look reads where the leg stands, after queueing it if it is idle.
func (t *Ticket) look(l *leg) standing {
	s := t.scheduler
	var at standing
	s.event(func() {
		if l.state == idle {
			s.enter(l, s.clock())
			s.pass()
		}
		at = s.inspect(l)
	})
	return at
}

// inspect tells where the leg, which is not idle, stands, and takes it out of the queue
// if that is hopeless.
func (s *Scheduler) inspect(l *leg) standing {
	if l.state == granted {
		return standing{settled: true, assignment: l.assignment}
	}
	if l.state == closed {
		return standing{settled: true, err: ErrClosed}
	}
	at := standing{now: s.clock(), patience: -1}
	if gone := l.class.gone; !gone.IsZero() {
		at.patience = max(cmp.Or(l.demand.Patience, s.Grace)-at.now.Sub(gone), 0)
	}
	if at.patience == 0 {
		err := s.noWorker(l.demand, l.excluded)
		s.leave(l)
		return standing{settled: true, err: err}
	}
	at.position = s.position(l)
	at.changed = subscribe(&l.class.changed)
	at.moved = subscribe(&l.moved)
	return at
}

// subscribe returns the channel, made if there is none.
func subscribe(c *chan struct{}) <-chan struct{} {
	if *c == nil {
		*c = make(chan struct{})
	}
	return *c
}

// sleep returns when it is time to look again.
func (at standing) sleep(ctx context.Context) {
	var hopeless <-chan time.Time
	if at.patience >= 0 {
		timer := time.NewTimer(at.patience)
		defer timer.Stop()
		hopeless = timer.C
	}
	var doubtful <-chan time.Time
	if at.doubtful >= 0 {
		timer := time.NewTimer(at.doubtful)
		defer timer.Stop()
		doubtful = timer.C
	}
	pause := time.NewTimer(announceEvery)
	defer pause.Stop()
	// Deaf to mere changes for a while; one that happens meanwhile is not missed, since
	// its channel stays closed.
	select {
	case <-ctx.Done():
		return
	case <-at.moved:
		return
	case <-hopeless:
		return
	case <-pause.C:
	}
	select {
	case <-ctx.Done():
	case <-at.moved:
	case <-hopeless:
	case <-doubtful:
	case <-at.changed:
	}
}
