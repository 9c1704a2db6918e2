package dispatch

import (
	"context"
	"errors"
	"maps"
	"slices"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// misplacedError tells of a leg whose steps execute on another platform than its
// worker's, for which there are other workers.
type misplacedError struct {
	platform ocispecs.Platform
	refusal  error // what the client is told if the leg cannot move
}

func (e *misplacedError) Error() string { return e.refusal.Error() }
func (e *misplacedError) Unwrap() error { return e.refusal }

// solveSomewhere runs a frontend request on a leg, or on what continues it when its
// worker is lost.
func (b *Build) solveSomewhere(ctx context.Context, l *leg, req *gwpb.SolveRequest) (*leg, *gwpb.SolveResponse, error) {
	for {
		resp, err := l.solve(ctx, req)
		if err == nil {
			return l, resp, nil
		}
		next, err := b.goOn(ctx, l, err)
		if err != nil {
			return l, nil, err
		}
		l = next
	}
}

// solveNative runs a frontend request on a leg, which moves to a worker on which
// its steps are native if they are not where it is. It returns the leg that the
// answer is of.
func (b *Build) solveNative(ctx context.Context, l *leg, req *gwpb.SolveRequest) (*leg, *gwpb.SolveResponse, error) {
	l, resp, err := b.solveSomewhere(ctx, l, req)
	if err == nil {
		return l, resp, nil
	}
	moved := b.now(ctx, l)
	var misplaced *misplacedError
	switch {
	case moved != l: // for another call, which may have stopped this one
	case !errors.As(err, &misplaced):
		return l, nil, err
	case b.used(l): // what the client has of it stays where it is
		return l, nil, misplaced.refusal
	default:
		if moved, err = b.move(ctx, l, misplaced.platform); err != nil {
			return l, nil, err
		}
	}
	moved, resp, err = b.solveSomewhere(ctx, moved, req)
	if errors.As(err, &misplaced) { // some steps execute here, some there: no worker runs them all
		err = misplaced.refusal
	}
	return moved, resp, err
}

// used tells whether the client holds something of the leg's worker.
func (b *Build) used(l *leg) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.ContainsFunc(slices.Collect(maps.Values(b.refs)), func(h held) bool { return h.leg == l }) || slices.Contains(slices.Collect(maps.Values(b.containers)), l)
}

// now is the leg itself, or what it has become by moving. It waits for a move that
// is under way.
func (b *Build) now(ctx context.Context, l *leg) *leg {
	b.mu.Lock()
	moving := l.moving
	b.mu.Unlock()
	if moving != nil {
		select {
		case <-moving:
		case <-ctx.Done():
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.legs[l.index]
}

// move starts a leg again, on a worker of another platform. It runs in the slot of
// a sibling there, if there is one, which may wait for its result; else it queues,
// its own slot given back unless siblings may move there.
func (b *Build) move(ctx context.Context, l *leg, to ocispecs.Platform) (*leg, error) {
	b.starting.Lock() // as for every start of legs; End cancels it
	defer b.starting.Unlock()
	if b.ctx.Err() != nil {
		return nil, context.Cause(b.ctx)
	}
	if moved := b.now(ctx, l); moved != l { // meanwhile
		return moved, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(b.ctx, func() { cancel(context.Cause(b.ctx)) })()

	moved := b.newLeg(l.Leg, l.index, l.split)
	moved.guest, moved.exporters, moved.log = true, l.exporters, l.log
	host := b.hostFor(l, to)
	defer close(b.vacate(l))
	if err := moved.startAs(ctx, host, to); err != nil {
		b.ending.Go(func() { moved.end(err) })
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if moved.rescue == nil { // else it is lost already, and what continues it takes its place
		b.legs[l.index] = moved
	}
	return moved, nil
}

// hostFor returns a leg of the build, other than the one given, on a worker that
// runs the platform, which keeps its slot until its guests have ended; nil when
// there is none.
func (b *Build) hostFor(l *leg, p ocispecs.Platform) *leg {
	demand := b.wish(p, "")
	would := func(s *leg) bool {
		if s == l || s.worker == nil || s.retired || l.trial && slices.Contains(l.lostOn, s.worker.Name) {
			return false // what was lost with its worker may not know yet
		}
		suits, _ := b.farm.Scheduler.Suits(s.worker.Name, demand)
		return suits
	}
	for _, s := range b.running() {
		if would(s) && b.client.join(s) {
			return s
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range b.vacated {
		if would(s) {
			s.guests.Add(1) // the vacancy is one, too
			return s
		}
	}
	return nil
}

// vacate ends a leg that moves. Its slot is kept for siblings that move to its
// worker, which are on their way: two that change places would else have to queue,
// each for the slot that the other gives up. The leg counts as moving until the
// caller closes what is returned.
func (b *Build) vacate(l *leg) chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l.split {
		l.guests.Add(1)
		b.vacated = append(b.vacated, l)
	}
	l.moving = make(chan struct{})
	b.ending.Go(func() { l.end(nil) })
	return l.moving
}

// movesDone gives back the slots that were kept for moves: the legs of a frontend
// call have been solved.
func (b *Build) movesDone() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range b.vacated {
		l.guests.Done()
	}
	b.vacated = nil
}

// startAs starts a leg in the slot of its host, or else where the platform is native.
func (l *leg) startAs(ctx context.Context, host *leg, p ocispecs.Platform) error {
	platform := split.Leg{Platform: p}.String()
	l.demand = l.build.wish(p, l.build.warmthKey()+l.String())
	if host == nil {
		ticket, err := l.build.farm.Scheduler.Enqueue([]schedule.Demand{l.demand})
		if err != nil {
			return err
		}
		l.ticket, l.seat, l.siblings = ticket, 0, []*leg{l}
		l.build.client.expect(l)
		l.build.show(l)
		l.build.log.Info("leg moves", "platform", l.String(), "to", platform)
		return l.start(ctx)
	}
	l.siblings = []*leg{l}
	return l.startIn(ctx, host, "its steps execute on "+platform)
}
