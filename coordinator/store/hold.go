package store

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Held is a lease that is kept for as long as it is needed.
type Held struct {
	// Context ends before the lease does, when it cannot be extended or is lost; its
	// cause tells why.
	Context context.Context
	// Release ends the context and the renewals, and waits for the latter. The lease
	// itself stays as it is.
	Release func()
}

// reserve is the part of a lease that is left to it when its holder stops: what is
// under way must have ended by then.
const reserve = 4

// Hold extends a lease, a third of it at a time, until Release. Each call of renew
// extends it by as much again, counted from when the call began. Cancelled, when
// not nil, is called once renew says so.
func Hold(ctx context.Context, l Lease, renew func(context.Context, Lease) (Lease, bool, error), cancelled func()) *Held {
	ctx, stop := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() { // ends with ctx
		defer close(done)
		stop(hold(ctx, l, renew, cancelled))
	}()
	return &Held{Context: ctx, Release: func() { stop(context.Canceled); <-done }}
}

func hold(ctx context.Context, l Lease, renew func(context.Context, Lease) (Lease, bool, error), cancelled func()) error {
	timer := time.NewTimer(l.For / 3)
	defer timer.Stop()
	var failed error
	for {
		end := l.Asked.Add(l.For - l.For/reserve)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
		}
		if !time.Now().Before(end) {
			return fmt.Errorf("the lease of %s ends: it could not be extended in time: %w", l.Job, errors.Join(failed, context.DeadlineExceeded))
		}
		asking, done := context.WithDeadline(ctx, end)
		renewed, cancel, err := renew(asking, l)
		done()
		switch {
		case errors.Is(err, ErrLeaseLost):
			return fmt.Errorf("the lease of %s: %w", l.Job, err)
		case err != nil:
			failed = err
			timer.Reset(min(l.For/10, time.Until(end)))
			continue
		case cancel && cancelled != nil:
			cancelled()
			cancelled = nil
		}
		l, failed = renewed, nil
		timer.Reset(l.For / 3)
	}
}
