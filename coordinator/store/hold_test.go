package store_test

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

const lasting = 30 * time.Second

// began is a lease that begins now.
func began() store.Lease {
	return store.Lease{Job: "job-1", Epoch: 1, For: lasting, Asked: time.Now()}
}

// database is what extends a lease: how long that takes, and what it answers.
type database struct {
	delay  func(call int) time.Duration
	answer func(call int) (cancel bool, err error)
	calls  atomic.Int64
}

func (d *database) renew(ctx context.Context, l store.Lease) (store.Lease, bool, error) {
	call := int(d.calls.Add(1))
	l.Asked = time.Now()
	if d.delay != nil {
		select {
		case <-time.After(d.delay(call)):
		case <-ctx.Done():
			return l, false, context.Cause(ctx)
		}
	}
	if d.answer == nil {
		return l, false, nil
	}
	cancel, err := d.answer(call)
	return l, cancel, err
}

func TestHold_LastsAsLongAsItIsExtended(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &database{delay: func(call int) time.Duration { return time.Duration(call%9) * time.Second }}
		h := store.Hold(t.Context(), began(), d.renew, nil)
		time.Sleep(time.Hour)
		synctest.Wait()
		if h.Context.Err() != nil {
			t.Error("it has ended:", context.Cause(h.Context))
		}
		calls, want := d.calls.Load(), int64(time.Hour/(lasting/3))
		if calls < want-2 || calls > want+2 {
			t.Errorf("%d calls in an hour", calls)
		}
		h.Release()
		if !errors.Is(context.Cause(h.Context), context.Canceled) {
			t.Error("after the release:", context.Cause(h.Context))
		}
		calls = d.calls.Load()
		time.Sleep(time.Hour)
		if d.calls.Load() != calls {
			t.Error("it is extended after the release")
		}
		h.Release() // again, harmlessly
	})
}

// The context must end while the lease still lasts, however the database fails.
func TestHold_EndsBeforeTheLease(t *testing.T) {
	t.Parallel()
	down := errors.New("no route to host")
	for name, test := range map[string]struct {
		renew func(context.Context, store.Lease) (store.Lease, bool, error)
		asked time.Duration // before Hold is called
		cause error
	}{
		"unreachable": {func(context.Context, store.Lease) (store.Lease, bool, error) { return store.Lease{}, false, down }, 0, down},
		"silent": {func(ctx context.Context, _ store.Lease) (store.Lease, bool, error) {
			<-ctx.Done()
			return store.Lease{}, false, ctx.Err()
		}, 0, context.DeadlineExceeded},
		"stuck": {func(context.Context, store.Lease) (store.Lease, bool, error) {
			time.Sleep(time.Hour)
			return store.Lease{}, false, down
		}, 0, context.DeadlineExceeded},
		"asked long ago":         {func(context.Context, store.Lease) (store.Lease, bool, error) { return store.Lease{}, false, down }, 20 * time.Second, down},
		"asked for too long ago": {func(context.Context, store.Lease) (store.Lease, bool, error) { return store.Lease{}, false, down }, 29 * time.Second, context.DeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := began()
				time.Sleep(test.asked)
				h := store.Hold(t.Context(), l, test.renew, nil)
				<-h.Context.Done()
				if left := lasting - time.Since(l.Asked); left <= 0 || test.asked < lasting*3/4 && left < lasting/4 {
					t.Errorf("it ended %v before the lease", left)
				}
				if err := context.Cause(h.Context); !errors.Is(err, test.cause) || !strings.Contains(err.Error(), "job-1") {
					t.Errorf("the cause is %v", err)
				}
				h.Release()
			})
		})
	}
}

func TestHold_SurvivesAFailure(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &database{answer: func(call int) (bool, error) {
			if call%3 != 0 {
				return false, errors.New("try again")
			}
			return false, nil
		}}
		h := store.Hold(t.Context(), began(), d.renew, nil)
		time.Sleep(10 * time.Minute)
		if h.Context.Err() != nil {
			t.Error("it has ended:", context.Cause(h.Context))
		}
		h.Release()
	})
}

func TestHold_EndsWhenTheLeaseIsLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := began()
		d := &database{answer: func(int) (bool, error) { return false, store.ErrLeaseLost }}
		h := store.Hold(t.Context(), l, d.renew, nil)
		<-h.Context.Done()
		if !errors.Is(context.Cause(h.Context), store.ErrLeaseLost) || time.Since(l.Asked) != lasting/3 {
			t.Errorf("after %v: %v", time.Since(l.Asked), context.Cause(h.Context))
		}
		h.Release()
	})
}

func TestHold_TellsOfCancellingOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &database{answer: func(call int) (bool, error) { return call >= 2, nil }}
		var told atomic.Int64
		h := store.Hold(t.Context(), began(), d.renew, func() { told.Add(1) })
		time.Sleep(lasting/3 + time.Second)
		synctest.Wait()
		if told.Load() != 0 {
			t.Error("it was told too early")
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if told.Load() != 1 || h.Context.Err() != nil {
			t.Errorf("it was told %d times, and the lease: %v", told.Load(), context.Cause(h.Context))
		}
		h.Release()
	})
}

func TestHold_EndsWithItsParent(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancelCause(t.Context())
		h := store.Hold(ctx, began(), (&database{}).renew, nil)
		reason := errors.New("the coordinator stops")
		stop(reason)
		<-h.Context.Done()
		if !errors.Is(context.Cause(h.Context), reason) {
			t.Error(context.Cause(h.Context))
		}
		h.Release()
	})
}
