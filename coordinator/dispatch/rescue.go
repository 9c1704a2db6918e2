package dispatch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
)

// rescue is the continuation of a leg, whose worker was lost, on another one.
type rescue struct {
	done chan struct{} // closed when next or err is set
	next *leg
	err  error
}

// goOn returns the leg that continues one which failed because its worker was lost, or
// the error if it failed of anything else or cannot be continued. The caller asks the
// new leg again what the old one did not answer.
func (b *Build) goOn(ctx context.Context, l *leg, failure error) (*leg, error) {
	b.mu.Lock()
	r := b.rescue(l, failure)
	b.mu.Unlock()
	if r == nil {
		return nil, failure
	}
	select {
	case <-r.done:
		return r.next, r.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// rescued tells whether a leg that failed is being continued: nobody need be waiting
// for it. If that fails, too, the build is told.
func (b *Build) rescued(l *leg, failure error) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if l.trial { // who makes it continue another one notices by itself
		return true
	}
	if l.index >= len(b.legs) && b.rescuable(failure) != nil { // others are still on their way to their workers
		l.lost = failure
		return true
	}
	r := b.rescue(l, failure)
	if r == nil {
		return false
	}
	b.rescues.Go(func() { // ends with the rescue
		<-r.done
		if r.err != nil {
			select {
			case b.failed <- r.err:
			default: // another leg was first
			}
		}
	})
	return true
}

// rescuable returns the loss of which a leg failed, if it may be continued. b.mu is held.
func (b *Build) rescuable(failure error) *build.LostError {
	var lost *build.LostError
	if b.farm.Attempts <= 1 || b.over || !errors.As(failure, &lost) {
		return nil
	}
	return lost
}

// rescue begins to continue a leg, or returns how that goes; nil when it may not be.
// b.mu is held.
func (b *Build) rescue(l *leg, failure error) *rescue {
	if l.rescue != nil {
		return l.rescue
	}
	lost := b.rescuable(failure)
	if lost == nil {
		return nil
	}
	r, moving := &rescue{done: make(chan struct{})}, l.moving
	l.rescue = r
	if moving == nil {
		l.moving = r.done
	}
	b.rescues.Go(func() { // ends when it has begun elsewhere, with the build at the latest
		defer close(r.done)
		if moving == nil {
			r.next, r.err = b.restart(b.rescuing, l, lost)
			b.farm.Metrics.rescued(l.label(), r.err)
			return
		}
		<-moving
		if r.next = b.now(b.rescuing, l); r.next == l {
			r.err = failure
		}
	})
	return r
}

// endRescues stops what is under way, for good.
func (b *Build) endRescues() {
	b.mu.Lock()
	b.over = true
	b.mu.Unlock()
	b.stopRescues()
	b.rescues.Wait()
}

// restart continues a leg on another worker: it is asked again what the lost one has
// answered, until one has answered everything.
func (b *Build) restart(ctx context.Context, l *leg, lost *build.LostError) (*leg, error) {
	turn := b.turn(lost.Worker)
	turn.Lock()
	defer turn.Unlock()
	calls, err := l.retire(lost)
	for last := l; err == nil; {
		var next *leg
		if next, err = b.follow(ctx, last, lost); err != nil {
			break
		}
		var renamed map[string]string
		if renamed, err = next.replay(ctx, calls); err == nil {
			b.mu.Lock()
			defer b.mu.Unlock()
			b.succeed(l, next, renamed)
			return next, nil
		}
		failed := err
		b.ending.Go(func() { next.end(failed) })
		if errors.As(err, &lost) {
			last, err = next, nil
		}
	}
	b.log.Warn("leg not continued", "platform", l.String(), "lost", lost.Worker, "error", err)
	return nil, err
}

// turn keeps legs that one worker held from looking for another at the same time: they
// may have to share a slot again, for which one must have it first.
func (b *Build) turn(worker string) *sync.Mutex {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.turns == nil {
		b.turns = map[string]*sync.Mutex{}
	}
	if b.turns[worker] == nil {
		b.turns[worker] = &sync.Mutex{}
	}
	return b.turns[worker]
}

// retire ends a leg that others will continue, and returns what it was asked. What it
// was doing shows as canceled.
func (l *leg) retire(lost *build.LostError) ([]exchange, error) {
	b := l.build
	b.mu.Lock()
	l.retired = true
	calls, size := slices.Clone(l.calls), l.size
	b.mu.Unlock()
	b.publish(l.log.Interrupt(time.Now(), "worker "+lost.Worker+" was lost"))
	b.ending.Go(func() { l.end(nil) })
	if size > maxReplay {
		return nil, l.stranded(lost, fmt.Sprintf("it was asked for builds of %d MiB, at most %d are asked again elsewhere", size>>20, maxReplay>>20))
	}
	return calls, nil
}

// stranded is the error of a leg that lost its worker and cannot be continued.
func (l *leg) stranded(lost *build.LostError, why string) error {
	return &build.LegError{
		Platform: l.String(), Worker: lost.Worker, Attempt: len(l.lostOn) + 1,
		Err: status.Error(codes.Unavailable, lost.Error()+"; "+why),
	}
}

// follow starts the leg that comes after one whose worker was lost.
func (b *Build) follow(ctx context.Context, l *leg, lost *build.LostError) (*leg, error) {
	lostOn := append(slices.Clone(l.lostOn), lost.Worker)
	if len(lostOn) >= b.farm.Attempts {
		return nil, l.stranded(lost, fmt.Sprintf("that was attempt %d of %d, before it on %s: what it builds may be what ends its workers",
			len(lostOn), b.farm.Attempts, strings.Join(l.lostOn, ", ")))
	}
	next := b.newLeg(l.Leg, l.index, l.split)
	next.guest, next.exporters, next.log, next.key, next.demand = l.guest, l.exporters, l.log, l.key, l.demand
	next.lostOn, next.trial, next.retold = lostOn, true, map[string]retelling{}
	maps.Copy(next.retold, l.retold)
	next.siblings = []*leg{next}
	b.log.Warn("leg lost its worker", "platform", l.String(), "worker", lost.Worker, "reason", lost.Cause, "attempt", len(lostOn))
	if err := next.resume(ctx, lost); err != nil {
		b.ending.Go(func() { next.end(err) })
		return nil, err
	}
	return next, nil
}

const (
	// reviewEvery is how often a leg that lost its worker looks who else there is.
	reviewEvery = time.Second
	// preferOthers is for how long such a leg waits for another worker that is not ready,
	// but may be in a moment, before it takes one that was lost.
	preferOthers = 10 * time.Second
	// pingLimit is how long a worker may take to answer such a leg.
	pingLimit = 8 * time.Second
)

// errAlone ends the wait for a worker when only lost ones would do.
var errAlone = errors.New("nobody came back")

// resume finds the leg another worker than those that were lost. While there is no
// other, it waits, for as long as the operator allows, for one of them to come back.
func (l *leg) resume(ctx context.Context, lost *build.LostError) error {
	b := l.build
	if host := b.hostFor(l, l.demand.Platform); host != nil {
		err := l.startIn(ctx, host, "worker "+lost.Worker+" was lost")
		if ctx.Err() != nil || status.Code(err) != codes.Unavailable {
			return err
		}
		l.depart() // that worker is lost, too
	}
	l.demand.On, l.demand.Patience = "", b.farm.FailoverWait
	if ready, _ := l.others(); !ready && b.farm.FailoverWait <= 0 {
		return l.stranded(lost, "there is no other worker for it")
	}
	ticket, err := b.farm.Scheduler.Enqueue([]schedule.Demand{l.demand})
	if err != nil {
		return err
	}
	l.ticket, l.seat = ticket, 0
	for _, name := range l.lostOn {
		ticket.Exclude(0, name)
	}
	ticket.Requeue(0) // it may have been granted one of them at once
	ctx, stop := context.WithCancelCause(ctx)
	reviewed := make(chan struct{})
	go func() { // ends with ctx
		defer close(reviewed)
		l.review(ctx, stop)
	}()
	b.client.expect(l)
	b.show(l)
	err = l.start(ctx)
	stop(nil)
	<-reviewed
	var none *build.NoWorkerError
	if errors.Is(err, errAlone) || errors.As(err, &none) {
		return l.stranded(lost, fmt.Sprintf("there is no other worker for it, and none came back within %s", b.farm.FailoverWait))
	}
	return err
}

// depart undoes a start that failed, for another one.
func (l *leg) depart() {
	l.part()
	if l.forget != nil {
		l.forget()
		l.session, l.forget = "", nil
	}
}

// review takes the lost workers into consideration again once there is no other, or
// none has become ready for a while; and ends the wait when it has been too long.
func (l *leg) review(ctx context.Context, end context.CancelCauseFunc) {
	again := time.NewTicker(reviewEvery)
	defer again.Stop()
	limit := l.build.farm.FailoverWait
	alone, readmitted := time.Now(), false
	for {
		ready, attached := l.others()
		if ready {
			alone = time.Now()
		}
		waited := time.Since(alone)
		if !readmitted && !ready && (!attached || waited >= min(preferOthers, limit/2)) {
			readmitted = true
			l.ticket.Readmit(l.seat)
		}
		if !ready && waited >= limit {
			end(errAlone)
			return
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return
		}
	}
}

// others tells whether a worker that was not lost takes such a leg now, or at least is
// attached and may later.
func (l *leg) others() (ready, attached bool) {
	for _, w := range l.build.farm.Scheduler.Snapshot() {
		if suits, _ := l.build.farm.Scheduler.Suits(w.Name, l.demand); suits && !slices.Contains(l.lostOn, w.Name) {
			ready, attached = ready || w.State == schedule.Ready, true
		}
	}
	return ready, attached
}

// ping returns an error unless the BuildKit at the other end answers: where a worker was
// lost, one that only seems to be there would cost the leg an attempt.
func (l *leg) ping(ctx context.Context, conn *fleet.Conn) error {
	ctx, cancel := context.WithTimeoutCause(ctx, pingLimit, fmt.Errorf("it has not answered for %s", pingLimit))
	defer cancel()
	_, err := controlapi.NewControlClient(conn).Info(ctx, &controlapi.InfoRequest{})
	switch {
	case err == nil || status.Code(err) == codes.Unimplemented:
		return nil
	case conn.Lost() != nil:
		err = conn.Lost()
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return status.Errorf(codes.Unavailable, "asking BuildKit on worker %s: %s", l.worker.Name, build.Message(err))
}

// startIn starts the leg in the slot of another one, for a reason that clients see.
func (l *leg) startIn(ctx context.Context, host *leg, why string) error {
	l.host = host
	if _, l.emulated = l.build.farm.Scheduler.Suits(host.worker.Name, l.demand); l.emulated {
		why += ", emulated: no native worker"
		l.build.farm.Metrics.emulates(l.label(), host.worker.Name)
	}
	step := l.build.Progress.Step(progress.StepName(l.String(), fmt.Sprintf("moved to worker %s (%s)", host.worker.Name, why)))
	step.Start()
	l.alias()
	conn, err := l.take(ctx, host.worker.Name)
	step.Done(err)
	if err != nil {
		return l.failed(err, host.worker.Name)
	}
	l.build.log.Info("leg moves", "platform", l.String(), "worker", host.worker.Name, "why", why)
	l.build.show(l)
	l.begin(conn)
	return nil
}
