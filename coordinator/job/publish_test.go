package job

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// halting is a publisher whose coordinator stops before or after it has published.
type halting struct {
	Publisher
	before, after chan struct{} // sent to, then it waits for its context
	calls         atomic.Int32
}

func (h *halting) Publish(ctx context.Context, r publish.Request, o publish.Observer) error {
	h.calls.Add(1)
	if h.before != nil {
		h.before <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	if err := h.Publisher.Publish(ctx, r, o); err != nil {
		return err
	}
	h.after <- struct{}{}
	<-ctx.Done()
	return ctx.Err()
}

func TestPublish_GoesOnAfterARestart(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]*halting{
		"before it was published": {before: make(chan struct{})},
		"after it was published":  {after: make(chan struct{})},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			c := f.start(&builds{}, func(o *Options) { h.Publisher, o.Publisher = o.Publisher, h })
			id := c.submit(request(t)).GetId()
			receive(t, firstOf(h.before, h.after))
			_, err := c.Cancel(t.Context(), &archfarmv1.CancelRequest{Id: id})
			wantCode(t, err, codes.FailedPrecondition, "being pushed")
			c.stop()

			again := &builds{}
			d := f.start(again, func(o *Options) { o.Owner = "coordinator-2" })
			j := d.ended(id)
			wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
			if got := tagged(t, repository(t)+":"+commit); got == "" || got != j.GetDigest() || again.count(amd64)+again.count(arm64) > 0 {
				t.Errorf("the tag is %q, the job says %q; %d builds", got, j.GetDigest(), again.count(amd64))
			}
			resp, err := d.ListTags(t.Context(), &archfarmv1.ListTagsRequest{Repository: repository(t)})
			if err != nil || len(resp.GetBindings()) != 1 {
				t.Errorf("tags are %v, %v", resp, err)
			}
		})
	}
}

func firstOf(a, b chan struct{}) chan struct{} {
	if a != nil {
		return a
	}
	return b
}

// cancelling asks for a job's end in the moment before it becomes Publishing.
type cancelling struct {
	store.Store
	once sync.Once
}

func (s *cancelling) Update(ctx context.Context, l store.Lease, u store.Update) (int64, error) {
	if u.State == store.Publishing {
		s.once.Do(func() { _, _ = s.Cancel(ctx, l.Job, nil) }) // answered: it counts
	}
	return s.Store.Update(ctx, l, u)
}

func TestPublish_NotOnceCancellingHasBeenAnswered(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	c := f.start(&builds{}, func(o *Options) { o.Store = &cancelling{Store: o.Store} })
	id := c.submit(request(t)).GetId()
	wantState(t, c.ended(id), archfarmv1.Job_STATE_CANCELLED)
	if got := tagged(t, repository(t)+":"+commit); got != "" {
		t.Errorf("the tag is %s", got)
	}
}

// mumbling is a store that does what it is told and says that it could not.
type mumbling struct {
	store.Store
	calls atomic.Int32
}

func (s *mumbling) Update(ctx context.Context, l store.Lease, u store.Update) (int64, error) {
	seq, err := s.Store.Update(ctx, l, u)
	if err == nil && s.calls.Add(1)%2 == 1 {
		return 0, errors.New("the connection was lost")
	}
	return seq, err
}

func TestRecorder_AnUpdateWhoseAnswerIsLostIsNotRepeated(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	c := f.start(&builds{}, func(o *Options) { o.Store = &mumbling{Store: o.Store} })
	id := c.submit(request(t)).GetId()
	var states []archfarmv1.Job_State
	for _, e := range c.watched(id, 0) {
		if j := e.GetJob(); j != nil {
			states = append(states, j.GetState())
		}
	}
	want := []archfarmv1.Job_State{archfarmv1.Job_STATE_QUEUED, archfarmv1.Job_STATE_RUNNING, archfarmv1.Job_STATE_PUBLISHING, archfarmv1.Job_STATE_SUCCEEDED}
	if !slices.Equal(states, want) {
		t.Errorf("states are %v", states)
	}
}

func TestRecorder_ProgressIsBounded(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{do: func(_ context.Context, _ Leg, report Report) (ocispecs.Descriptor, error) {
		for range (maxProgress >> 18) + 20 {
			p := logged("")
			p.Logs[0].Msg = make([]byte, 1<<18)
			report("", p)
		}
		return ocispecs.Descriptor{}, nil
	}}, nil)
	req := request(t)
	req.Spec.Tags, req.Spec.Platforms = nil, []string{amd64}
	id := c.submit(req).GetId()
	size, notices := 0, 0
	events := c.watched(id, 0)
	for _, e := range events {
		for _, l := range e.GetProgress().GetLogs() {
			size += len(l.GetMsg())
		}
		if e.GetNotice() != "" {
			notices++
		}
	}
	if size > maxProgress || size < maxProgress-1<<20 || notices != 1 {
		t.Errorf("%d bytes of progress are recorded, %d notices", size, notices)
	}
	wantState(t, events[len(events)-1].GetJob(), archfarmv1.Job_STATE_SUCCEEDED)
	j, err := c.farm.store.Job(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if had, err := spent(t.Context(), c.farm.store, j); err != nil || had < maxProgress-1<<20 {
		t.Errorf("after a restart %d bytes would count, %v", had, err)
	}
}

func TestKeeper_RemovesWhatEndedLongAgo(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, func(o *Options) { o.Retention = time.Nanosecond })
	id := c.submit(request(t)).GetId()
	c.ended(id)
	c.keeper.purge(t.Context())
	_, err := c.Get(t.Context(), &archfarmv1.GetRequest{Id: id})
	wantCode(t, err, codes.NotFound)
}
