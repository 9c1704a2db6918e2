package dispatch

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/schedule"
)

// maxPlacements bounds how often a leg looks for another worker because the one
// assigned had given its slot away or left before anything ran there.
const maxPlacements = 100

// place waits for a worker with a free slot, takes the slot, and makes the
// client's sessions known there.
func (l *leg) place(ctx context.Context) (*fleet.Conn, error) {
	wait := &placing{leg: l}
	var last error
	for range maxPlacements {
		assigned, err := l.await(ctx, wait)
		if err != nil {
			wait.failed(err)
			return nil, err
		}
		if assigned.Shared && !l.join(ctx, assigned, wait.queued) {
			continue
		}
		conn, err := l.take(ctx, assigned.Worker)
		if err == nil {
			l.emulated = assigned.Emulated
			wait.assigned(assigned)
			close(l.placed)
			return conn, nil
		}
		wait.tried = append(wait.tried, l.host)
		l.part()
		if ctx.Err() != nil {
			wait.failed(err)
			return nil, err
		}
		last = err
		l.build.log.Info("placing again", "platform", l.String(), "worker", assigned.Worker, "reason", err)
		if !errors.Is(err, fleet.ErrNoSlot) {
			var lost *build.LostError
			again := len(l.lostOn) > 0 && status.Code(err) == codes.Unavailable // the worker may be on its way back
			if !again && !errors.As(err, &lost) {                               // its buildkitd does not answer, or the session is gone: elsewhere may be no better
				wait.failed(err)
				return nil, l.failed(err, assigned.Worker)
			}
		}
		l.refused()
	}
	err := status.Errorf(codes.ResourceExhausted, "%s: no worker kept its slot free in %d tries: %v", l, maxPlacements, last)
	wait.failed(err)
	return nil, err
}

// await waits for a slot: one for the leg or its siblings, or one that another
// build of the client lends, whose leg hosts this one then.
func (l *leg) await(ctx context.Context, wait *placing) (schedule.Assignment, error) {
	waiting, stop := context.WithCancel(ctx)
	defer stop()
	lent := make(chan *leg, 1)
	look := sync.OnceFunc(func() { // only when there is no slot at once
		go func() { // ends when the wait does
			lent <- l.build.client.lender(waiting, l, func(host *leg) bool { return l.mayJoin(host) && !slices.Contains(wait.tried, host) })
			stop()
		}()
	})
	since := time.Now()
	assigned, err := l.ticket.Wait(waiting, l.seat, func(at schedule.Position) {
		look()
		wait.queued(at)
	})
	if wait.queue == nil { // it has not waited
		return assigned, err
	}
	look()
	stop()
	l.host = <-lent
	if err == nil || ctx.Err() != nil {
		l.part()
	}
	if l.host == nil {
		return assigned, err
	}
	why := "shares the slot of another build of this client, which waits for the client"
	_, emulated := l.build.farm.Scheduler.Suits(l.host.worker.Name, l.demand)
	if emulated {
		why = "emulated: no native worker; " + why
	}
	return schedule.Assignment{Worker: l.host.worker.Name, Waited: time.Since(since), Why: why, Emulated: emulated}, nil
}

// mayJoin tells whether the leg could run in another build's slot.
func (l *leg) mayJoin(host *leg) bool {
	if host.build == l.build || host.attempt.conn.Lost() != nil {
		return false
	}
	suits, _ := l.build.farm.Scheduler.Suits(host.worker.Name, l.demand)
	return suits
}

// refused gives the leg's slot back, and with it those of the siblings that were
// to run in it: they look again where they stand.
func (l *leg) refused() {
	l.ticket.Refused(l.seat)
	l.build.mu.Lock()
	defer l.build.mu.Unlock()
	close(l.round)
	l.round = make(chan struct{})
}

// join waits for the sibling in whose slot the leg is to run. It tells whether
// the assignment still holds then: the slot may have been refused, and the
// sibling may even be waiting for this leg's by now.
func (l *leg) join(ctx context.Context, assigned schedule.Assignment, queued func(schedule.Position)) bool {
	host := l.siblings[assigned.With]
	l.build.mu.Lock()
	round := host.round
	l.build.mu.Unlock()
	if !l.holds(ctx, assigned, queued) { // asked after that, since a later refusal ends the round
		return false
	}
	select {
	case <-host.placed:
	case <-round:
		return false
	case <-ctx.Done():
		return false
	}
	if !l.holds(ctx, assigned, queued) {
		return false
	}
	l.host = host
	host.guests.Add(1)
	return true
}

// holds tells whether the leg still has that assignment.
func (l *leg) holds(ctx context.Context, assigned schedule.Assignment, queued func(schedule.Position)) bool {
	now, err := l.ticket.Wait(ctx, l.seat, queued)
	return err == nil && now == assigned
}

// part lets go of the sibling's slot.
func (l *leg) part() {
	if l.host != nil {
		l.host.guests.Done()
		l.host = nil
	}
}

// take opens the attempt's connection while the sessions are being relayed.
func (l *leg) take(ctx context.Context, name string) (*fleet.Conn, error) {
	worker, ok := l.build.farm.Fleet.Worker(name)
	if !ok {
		return nil, &build.LostError{Worker: name, Cause: errors.New("it left before the leg started")}
	}
	l.worker = worker
	var conn *fleet.Conn
	group, groupCtx := errgroup.WithContext(ctx)
	open := worker.Take
	if l.host != nil {
		open = worker.Dial
	}
	group.Go(func() (err error) {
		conn, err = open(groupCtx)
		return err
	})
	for _, id := range l.sessions() {
		group.Go(func() error { return l.expose(groupCtx, id) })
	}
	err := group.Wait()
	if err == nil && len(l.lostOn) > 0 {
		err = l.ping(ctx, conn)
	}
	if err != nil {
		l.release()
		if conn != nil {
			_ = conn.Close()
		}
		return nil, err
	}
	return conn, nil
}

// expose makes one of the client's sessions known on the leg's worker. A session
// that the client never opened is not missed before a step asks for it, and
// BuildKit says so then.
func (l *leg) expose(ctx context.Context, id string) error {
	l.build.mu.Lock()
	_, known := l.releases[id]
	l.build.mu.Unlock()
	if known {
		return nil
	}
	release, err := l.build.farm.Relays.Expose(ctx, sessionWorker{l.worker}, id)
	if status.Code(err) == codes.NotFound {
		l.build.log.Info("session not relayed", "session", id, "reason", err)
		return nil
	}
	if err != nil {
		return err
	}
	if l.split {
		l.build.farm.Relays.Share(id) // before any step can ask for a file
	}
	if !l.keep(id, release) {
		release()
	}
	return nil
}

// keep notes what ends a relay, unless nobody would call it any more or another
// frontend call was quicker.
func (l *leg) keep(id string, release func()) bool {
	l.build.mu.Lock()
	defer l.build.mu.Unlock()
	if _, known := l.releases[id]; known || l.over {
		return false
	}
	if l.releases == nil {
		l.releases = map[string]func(){}
	}
	l.releases[id] = release
	return true
}

func (l *leg) release() {
	l.build.mu.Lock()
	releases := l.releases
	l.releases = nil
	l.build.mu.Unlock()
	for _, release := range releases {
		release()
	}
}
