package job

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestRun_WhatWasBuiltBeforeARestartIsNotBuiltAgain(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	began := make(chan Leg, 1)
	first := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		if leg.Platform == arm64 {
			return untilDone(began)(ctx, leg, report)
		}
		return pushes(ctx, leg, report)
	}}
	c := f.start(first, nil)
	id := c.submit(request(t)).GetId()
	receive(t, began)
	until(t, c, id, func(j *archfarmv1.Job) bool { return legOf(j, amd64).GetState() == archfarmv1.JobLeg_STATE_SUCCEEDED })
	seen := c.get(id).GetLastSeq()
	c.stop()

	second := &builds{}
	c = f.start(second, func(o *Options) { o.Owner = "coordinator-2" })
	c.watched(id, seen) // goes on without a gap
	j := c.get(id)
	wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
	if second.count(amd64) != 0 || second.count(arm64) != 1 {
		t.Errorf("%d and %d attempts after the restart", second.count(amd64), second.count(arm64))
	}
	attempts := legOf(j, arm64).GetAttempts()
	if len(attempts) != 2 || attempts[0].GetError() != interruption || attempts[0].GetEndTime() == nil || attempts[1].GetCoordinator() != "coordinator-2" {
		t.Errorf("attempts are %v", attempts)
	}
}

// until waits for a job to be as wanted, as a watcher.
func until(t *testing.T, c *coordinator, id string, wanted func(*archfarmv1.Job) bool) {
	t.Helper()
	ctx, done := context.WithTimeout(t.Context(), soon)
	defer done()
	stream, err := c.Watch(ctx, &archfarmv1.WatchRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	for !wanted(c.get(id)) {
		if _, err := stream.Recv(); err != nil {
			t.Fatalf("job is %v: %v", c.get(id), err)
		}
	}
}

// A store whose renewals fail is how a coordinator sees a partition.
type partitioned struct {
	store.Store
	off atomic.Bool
}

func (p *partitioned) Renew(ctx context.Context, l store.Lease) (store.Lease, bool, error) {
	if p.off.Load() {
		return l, false, errPartition
	}
	return p.Store.Renew(ctx, l)
}

func (p *partitioned) Update(ctx context.Context, l store.Lease, u store.Update) (int64, error) {
	if p.off.Load() {
		return 0, errPartition
	}
	return p.Store.Update(ctx, l, u)
}

func (p *partitioned) Claim(ctx context.Context, owner string, lease time.Duration, n int) ([]store.Claimed, error) {
	if p.off.Load() {
		return nil, errPartition
	}
	return p.Store.Claim(ctx, owner, lease, n)
}

var errPartition = errors.New("the database is out of reach")

func TestRun_ACoordinatorThatIsCutOffStopsBeforeItsLeaseEnds(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	cut := &partitioned{Store: f.store}
	began, stopped := make(chan Leg, 2), make(chan time.Time, 2)
	first := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		defer func() { stopped <- time.Now() }()
		return untilDone(began)(ctx, leg, report)
	}}
	c := f.start(first, func(o *Options) { o.Store, o.Lease = cut, 3*time.Second })
	id := c.submit(request(t)).GetId()
	receive(t, began)
	receive(t, began)
	cut.off.Store(true)

	takenOver := make(chan time.Time, 2)
	second := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		takenOver <- time.Now()
		return pushes(ctx, leg, report)
	}}
	d := f.start(second, func(o *Options) { o.Owner = "coordinator-2" })
	wantState(t, d.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
	if end, begin := receive(t, stopped), receive(t, takenOver); !end.Before(begin) {
		t.Errorf("the first stopped at %v, the second began at %v", end, begin)
	}
	if got := tagged(t, repository(t)+":"+commit); got != d.get(id).GetDigest() {
		t.Errorf("the tag is %s", got)
	}
}

func TestRun_DrainLetsAttemptsEndAndGivesTheRestBack(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	began, goOn := make(chan Leg, 1), make(chan struct{})
	first := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		began <- leg
		<-goOn
		return pushes(ctx, leg, report)
	}}
	c := f.start(first, func(o *Options) { o.MaxJobs = 1 })
	req := request(t)
	req.Spec.Platforms = []string{amd64}
	running := c.submit(req).GetId()
	receive(t, began)
	queued := c.submit(request(t)).GetId() // accepted all the same
	drained := make(chan error, 1)
	go func() { drained <- c.Drain(t.Context()) }()
	select {
	case <-c.runner.draining:
	case <-time.After(soon):
		t.Fatal("it does not drain")
	}
	close(goOn)
	if err := receive(t, drained); err != nil {
		t.Fatal(err)
	}
	wantState(t, c.get(running), archfarmv1.Job_STATE_SUCCEEDED)
	wantState(t, c.get(queued), archfarmv1.Job_STATE_QUEUED)
	d := f.start(&builds{}, func(o *Options) { o.Owner = "coordinator-2" })
	d.ended(queued)
}

func TestRun_StopGivesJobsBackAtOnce(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	began := make(chan Leg, 2)
	c := f.start(&builds{do: untilDone(began)}, func(o *Options) { o.Lease = time.Hour })
	id := c.submit(request(t)).GetId()
	receive(t, began)
	c.stop()
	d := f.start(&builds{}, func(o *Options) { o.Owner = "coordinator-2" })
	wantState(t, d.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
}

func TestRun_CancelledByAnotherCoordinator(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	began := make(chan Leg, 2)
	// It is told when it renews its lease, which is after a third of it.
	c := f.start(&builds{do: untilDone(began)}, func(o *Options) { o.Lease = 3 * time.Second })
	id := c.submit(request(t)).GetId()
	receive(t, began)
	d := f.start(&builds{}, func(o *Options) { o.Owner = "coordinator-2" })
	if err := d.Drain(t.Context()); err != nil { // lest it run the job itself, should the lease be lost
		t.Fatal(err)
	}
	if _, err := d.Cancel(t.Context(), &archfarmv1.CancelRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	wantState(t, d.ended(id), archfarmv1.Job_STATE_CANCELLED)
}

// shared is a store that others may have open, too.
type shared struct{ store.Store }

func (shared) Shared() bool { return true }

func TestRun_CancelledByAnotherCoordinatorLongBeforeTheLeaseIsRenewed(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	began := make(chan Leg, 2)
	c := f.start(&builds{do: untilDone(began)}, func(o *Options) { o.Store, o.Lease = shared{o.Store}, time.Hour })
	id := c.submit(request(t)).GetId()
	receive(t, began)
	receive(t, began)
	d := f.start(&builds{}, func(o *Options) { o.Store, o.Owner = shared{o.Store}, "coordinator-2" })
	events := make(chan error, 1)
	go func() {
		_, err := d.watch(t.Context(), id, 0)
		events <- err
	}()
	// Hints are looked at now and then: another one, as each event is, comes later.
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		if _, err := d.Cancel(t.Context(), &archfarmv1.CancelRequest{Id: id}); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-events:
			if err != nil {
				t.Fatal(err)
			}
			wantState(t, d.get(id), archfarmv1.Job_STATE_CANCELLED)
			return
		case <-tick.C:
		}
	}
}

// Events that come fast, over what a tail keeps, at the paces of several watchers.
func TestWatch_NobodyMissesOrRepeatsAnything(t *testing.T) {
	t.Parallel()
	const lines = 1500
	half := make(gate)
	c := newFarm(t).start(&builds{do: func(_ context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		for i := range lines {
			p := logged(fmt.Sprintf("%d\n", i))
			p.Logs[0].Msg = append(p.Logs[0].Msg, make([]byte, 1000)...)
			report("", p)
			if i == lines/2 && leg.Platform == amd64 {
				close(half)
			}
		}
		return ocispecs.Descriptor{}, nil
	}}, nil)
	req := request(t)
	req.Spec.Tags = nil
	id := c.submit(req).GetId()
	var all sync.WaitGroup
	histories := make([][]*archfarmv1.JobEvent, 8)
	for i := range histories {
		all.Go(func() {
			if i%2 == 0 {
				half.wait(t)
			}
			histories[i] = c.watched(id, 0)
		})
	}
	all.Wait()
	for _, h := range histories {
		want := 0
		for _, e := range h {
			if p := e.GetProgress(); p != nil && p.GetPlatform() == amd64 {
				for _, l := range p.GetLogs() {
					if got := string(l.GetMsg()[:slices.Index(l.GetMsg(), '\n')]); got != fmt.Sprint(want) {
						t.Fatalf("line %s comes where %d should", got, want)
					}
					want++
				}
			}
		}
		if want != lines {
			t.Errorf("%d lines, not %d", want, lines)
		}
	}
}

func TestWatch_ReconnectingAnywhereGivesTheSameEvents(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	id := c.submit(request(t)).GetId()
	whole := c.watched(id, 0)
	for after := range whole {
		rest := c.watched(id, int64(after+1))
		if len(rest) != len(whole)-after-1 {
			t.Fatalf("after %d come %d events of %d", after+1, len(rest), len(whole))
		}
		for i, e := range rest {
			if e.String() != whole[after+1+i].String() {
				t.Errorf("event %d is %v, and was %v", e.GetSeq(), e, whole[after+1+i])
			}
		}
	}
	_, err := c.watch(t.Context(), id, int64(len(whole)+1))
	wantCode(t, err, codes.OutOfRange)
}

func TestWatch_ARetriedJobHasNotEndedForThoseWhoComeAfterIt(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	ctx := t.Context()
	ended, err := stored(jobEvent(store.Job{ID: "j", State: store.Cancelled}))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.store.Submit(ctx, store.Job{ID: "j", Tenant: "t", Spec: []byte{}}, nil); err != nil {
		t.Fatal(err)
	}
	j, err := f.store.Cancel(ctx, "j", ended)
	if err != nil {
		t.Fatal(err)
	}
	o := f.options("c").withDefaults()
	o.Poll = time.Hour
	d := newFeed(o) // nothing wakes it
	defer d.end()
	first, err := d.join(j)
	if err != nil {
		t.Fatal(err)
	}
	defer d.leave(first)
	if err := d.watch(ctx, first, j.LastSeq, nil); err != nil { // it has ended
		t.Fatal(err)
	}
	queued, err := stored(noticeEvent("retried"))
	if err != nil {
		t.Fatal(err)
	}
	if j, err = f.store.Retry(ctx, "j", nil, queued); err != nil {
		t.Fatal(err)
	}
	second, err := d.join(j)
	if err != nil {
		t.Fatal(err)
	}
	defer d.leave(second)
	within, done := context.WithTimeout(ctx, soon)
	defer done()
	enough := errors.New("enough")
	got := d.watch(within, second, 1, func(e *archfarmv1.JobEvent) error {
		if e.GetNotice() == "retried" {
			return enough
		}
		return nil
	})
	if !errors.Is(got, enough) {
		t.Errorf("watching after the retry: %v", got)
	}
}

func TestWatch_EndsWhenTheCoordinatorDoes(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	began := make(chan Leg, 2)
	c := f.start(&builds{do: untilDone(began)}, nil)
	id := c.submit(request(t)).GetId()
	receive(t, began)
	failed := make(chan error, 1)
	go func() {
		_, err := c.watch(t.Context(), id, 0)
		failed <- err
	}()
	until(t, c, id, func(*archfarmv1.Job) bool { return true })
	c.feed.end()
	wantCode(t, receive(t, failed), codes.Unavailable, "after_seq")
}
