package client

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// patience is how a call that is tried again waits.
type patience struct {
	client   *Client
	limit    time.Duration
	answered time.Time // when the farm last did
	tries    int       // since then
}

// reset says that the farm has answered.
func (p *patience) reset() { p.answered, p.tries = time.Now(), 0 }

// wait waits before the next try. It returns the error when another try would be
// answered alike, or there have been enough of them, and the context's when that
// has ended. The pauses double, and a quarter of each is chance, so that a farm that
// comes back is not met by all clients at once.
func (p *patience) wait(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !passing(err) {
		return err
	}
	if gone := time.Since(p.answered); gone > p.limit {
		return fmt.Errorf("the farm has not answered for %s: %w", gone.Round(time.Second), err)
	}
	if p.client.Retrying != nil {
		p.client.Retrying(err)
	}
	pause := min(firstPause<<min(p.tries, 16), lastPause)
	p.tries++
	if p.client.pause(ctx, pause-rand.N(pause/4)) != nil {
		return context.Cause(ctx)
	}
	return nil
}

// errGap is that events are missing between two that came, which a connection that
// is made anew may mend.
var errGap = errors.New("the farm has left out events of the job")

// passing tells whether the next try may be answered differently: a coordinator that
// restarts or drains, a proxy that has lost it, too many callers.
func passing(err error) bool {
	if errors.Is(err, errGap) {
		return true
	}
	message := status.Convert(err).Message()
	switch status.Code(err) {
	case codes.Unavailable, codes.Aborted, codes.DeadlineExceeded,
		codes.Canceled: // by the other end: the caller's own context is looked at before
		return true
	case codes.ResourceExhausted:
		return !strings.Contains(message, "message larger than max") // gRPC's own words, and nothing that passes
	case codes.Internal, codes.Unknown:
		return strings.Contains(message, "RST_STREAM") || strings.Contains(message, "unexpected EOF") // a stream that was cut
	default:
		return false
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
