package store

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
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
// not nil, is called once renew says so; it must not wait for Release.
func Hold(ctx context.Context, l Lease, renew func(context.Context, Lease) (Lease, bool, error), cancelled func()) *Held {
	ctx, stop := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() { // ends with ctx
		defer close(done)
		h := holding{stop: stop, renew: renew, cancelled: cancelled}
		stop(h.hold(ctx, l))
	}()
	return &Held{Context: ctx, Release: func() { stop(context.Canceled); <-done }}
}

// holding is what Hold was asked for.
type holding struct {
	stop      context.CancelCauseFunc
	renew     func(context.Context, Lease) (Lease, bool, error)
	cancelled func()
	failed    atomic.Pointer[error] // why it could not be extended, last
}

func (h *holding) hold(ctx context.Context, l Lease) error {
	for {
		// Whatever renew does, even if it never returns.
		end := l.Asked.Add(l.For - l.For/reserve)
		late := time.AfterFunc(time.Until(end), func() {
			err := context.DeadlineExceeded
			if failed := h.failed.Load(); failed != nil {
				err = fmt.Errorf("%w: %w", err, *failed)
			}
			h.stop(fmt.Errorf("the lease of %s ends: it was not extended in time: %w", l.Job, err))
		})
		renewed, err := h.extend(ctx, l, end)
		late.Stop()
		if err != nil {
			return err
		}
		l = renewed
	}
}

// extend waits until it is time, and asks until it has an answer, or ctx ends.
func (h *holding) extend(ctx context.Context, l Lease, end time.Time) (Lease, error) {
	timer := time.NewTimer(time.Until(l.Asked.Add(l.For / 3)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return Lease{}, context.Cause(ctx)
		case <-timer.C:
		}
		asking, done := context.WithDeadline(ctx, end)
		renewed, cancel, err := h.renew(asking, l)
		done()
		switch {
		case ctx.Err() != nil:
			return Lease{}, context.Cause(ctx)
		case errors.Is(err, ErrLeaseLost):
			return Lease{}, fmt.Errorf("the lease of %s: %w", l.Job, err)
		case err != nil:
			h.failed.Store(&err)
			timer.Reset(l.For / 10)
			continue
		case cancel && h.cancelled != nil:
			h.cancelled()
			h.cancelled = nil
		}
		h.failed.Store(nil)
		return renewed, nil
	}
}
