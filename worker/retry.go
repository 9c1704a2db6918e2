package worker

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// retry spaces attempts: 0.2 s, doubling up to 10 s, each with a random part so
// that a fleet that lost its coordinator does not come back in step.
type retry struct{ delay time.Duration }

func newRetry() *retry { return &retry{delay: firstRetry} }

// next is the time to wait before the next attempt.
func (r *retry) next() time.Duration {
	d := r.delay
	r.delay = min(2*r.delay, lastRetry)
	return d/2 + rand.N(d/2+1)
}

// reset begins again after a success.
func (r *retry) reset() { r.delay = firstRetry }

// sleep waits for d and tells whether ctx let it.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
