package job

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// window is how many events, and windowBytes about how much of them, a tail keeps
	// for those who watch: who is further behind reads the store.
	window      = 256
	windowBytes = 512 << 10
	// readPage is how many events are read at a time, and readers how many watchers
	// read the store at a time.
	readPage = 64
	readers  = 16
)

// feed is the events of the jobs that are being watched: one reader of the store for
// each, however many watch it. Only what is durable is in it.
type feed struct {
	jobs    store.Store
	poll    time.Duration
	most    int
	log     *slog.Logger
	reading chan struct{}   // taken by watchers that read the store
	ctx     context.Context // of all tails
	end     context.CancelFunc

	mu       sync.Mutex
	tails    map[string]*tail
	watchers int
}

func newFeed(o Options) *feed {
	ctx, end := context.WithCancel(context.Background()) // ended by run
	return &feed{
		jobs: o.Store, poll: o.Poll, most: o.MaxWatchers, log: o.Log, reading: make(chan struct{}, readers),
		ctx: ctx, end: end, tails: map[string]*tail{},
	}
}

// run passes the store's hints on until ctx ends, which ends the feed.
func (f *feed) run(ctx context.Context) {
	defer f.end()
	wakes := f.jobs.Wakes(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case w, ok := <-wakes:
			if !ok {
				<-ctx.Done()
				return
			}
			f.wake(w.Job)
		}
	}
}

// wake tells that a job may have new events.
func (f *feed) wake(job string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.tails[job]; t != nil {
		hint(t.news)
	}
}

// tail is the latest events of one job.
type tail struct {
	job  string
	news chan struct{}
	stop context.CancelFunc
	done chan struct{} // closed when nothing reads any more
	subs int           // the feed's lock is its

	mu      sync.Mutex
	events  []*archfarmv1.JobEvent // without gaps; nobody changes them
	sizes   []int
	bytes   int
	last    int64 // sequence number of the last one there is, in events or before them
	known   int64 // there are events up to here
	final   bool  // the last one ended the job
	changed chan struct{}
}

// join makes the caller one of those who watch a job, which it has just read.
func (f *feed) join(j store.Job) (*tail, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.watchers >= f.most {
		return nil, status.Errorf(codes.ResourceExhausted, "watching job %s: %d calls of Watch are served at a time, and there are as many: try again later", j.ID, f.most)
	}
	if f.ctx.Err() != nil {
		return nil, errStopping
	}
	t := f.tails[j.ID]
	if t == nil {
		ctx, stop := context.WithCancel(f.ctx)
		t = &tail{
			job: j.ID, news: make(chan struct{}, 1), stop: stop, done: make(chan struct{}), changed: make(chan struct{}),
			last: j.LastSeq, known: j.LastSeq, final: j.State.Ended(),
		}
		f.tails[j.ID] = t
		go f.follow(ctx, t) // ends with ctx: when the last one leaves, or the feed ends
	}
	t.subs++
	f.watchers++
	t.expect(j.LastSeq)
	return t, nil
}

var errStopping = status.Error(codes.Unavailable, "the coordinator stops: go on with after_seq when it is there again, or at another one")

func (f *feed) leave(t *tail) {
	f.mu.Lock()
	t.subs--
	f.watchers--
	last := t.subs == 0
	if last {
		delete(f.tails, t.job)
	}
	f.mu.Unlock()
	if last {
		t.stop()
		<-t.done
	}
}

// expect tells that there are events up to a sequence number.
func (t *tail) expect(seq int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if seq > t.known {
		t.known, t.final = seq, false
	}
	if t.known > t.last {
		hint(t.news)
	}
}

// follow reads what is new.
func (f *feed) follow(ctx context.Context, t *tail) {
	defer close(t.done)
	poll := time.NewTicker(f.poll)
	defer poll.Stop()
	for {
		if err := f.readNew(ctx, t); err != nil && ctx.Err() == nil {
			f.log.Warn("reading a job's events", "job", t.job, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-t.news:
		case <-poll.C:
		}
	}
}

func (f *feed) readNew(ctx context.Context, t *tail) error {
	for {
		t.mu.Lock()
		last := t.last
		t.mu.Unlock()
		events, err := f.jobs.Events(ctx, t.job, last, readPage)
		if err != nil {
			return err
		}
		if err := t.append(events); err != nil || len(events) < readPage {
			return err
		}
	}
}

// append adds events, drops the oldest, and wakes those who wait.
func (t *tail) append(events []store.Event) error {
	if len(events) == 0 {
		return nil
	}
	read, err := readAll(events, t.job)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if events[0].Seq != t.last+1 {
		return fmt.Errorf("event %d follows %d", events[0].Seq, t.last)
	}
	for i, e := range events {
		t.events, t.sizes, t.bytes = append(t.events, read[i]), append(t.sizes, len(e.Data)), t.bytes+len(e.Data)
	}
	drop := 0
	for len(t.events)-drop > window || t.bytes > windowBytes && len(t.events)-drop > 1 {
		t.bytes -= t.sizes[drop]
		drop++
	}
	if drop > 0 { // into new slices: watchers have the old ones
		t.events, t.sizes = append([]*archfarmv1.JobEvent(nil), t.events[drop:]...), append([]int(nil), t.sizes[drop:]...)
	}
	t.last = events[len(events)-1].Seq
	t.known = max(t.known, t.last)
	t.final = t.known == t.last && ends(read[len(read)-1])
	close(t.changed)
	t.changed = make(chan struct{})
	return nil
}

func readAll(events []store.Event, job string) ([]*archfarmv1.JobEvent, error) {
	out := make([]*archfarmv1.JobEvent, len(events))
	for i, e := range events {
		var err error
		if out[i], err = read(e); err != nil {
			return nil, fmt.Errorf("job %s: %w", job, err)
		}
	}
	return out, nil
}

// ends tells whether an event is a job's last, unless it is retried.
func ends(e *archfarmv1.JobEvent) bool { return e.GetJob() != nil && ended(e.GetJob().GetState()) }

// after returns what comes after a sequence number, if the tail has it; else whether
// it is behind the tail, whether that was all, and what to wait for.
func (t *tail) after(seq int64) (events []*archfarmv1.JobEvent, behind, final bool, changed <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	first := t.last - int64(len(t.events)) + 1
	switch {
	case seq >= t.last:
		return nil, false, t.final, t.changed
	case seq+1 < first:
		return nil, true, false, nil
	}
	return t.events[seq+1-first:], false, false, nil
}

// Watch implements archfarmv1.JobServiceServer.
func (s *server) Watch(req *archfarmv1.WatchRequest, stream grpc.ServerStreamingServer[archfarmv1.WatchResponse]) error {
	j, err := s.find(stream.Context(), req.GetId())
	if err != nil {
		return err
	}
	if after := req.GetAfterSeq(); after < 0 || after > j.LastSeq {
		return status.Errorf(codes.OutOfRange, "watching job %s: after_seq is %d, its events are 1 to %d", j.ID, after, j.LastSeq)
	}
	t, err := s.feed.join(j)
	if err != nil {
		return err
	}
	s.metrics.watchers.Inc()
	defer s.metrics.watchers.Dec()
	defer s.feed.leave(t)
	return s.feed.watch(stream.Context(), t, req.GetAfterSeq(), func(e *archfarmv1.JobEvent) error {
		return stream.Send(&archfarmv1.WatchResponse{Event: e})
	})
}

// watch sends a job's events, at the pace of send, until its end.
func (f *feed) watch(ctx context.Context, t *tail, seq int64, send func(*archfarmv1.JobEvent) error) error {
	for {
		events, behind, final, changed := t.after(seq)
		var err error
		switch {
		case behind:
			events, err = f.readOld(ctx, t.job, seq)
		case final:
			return nil
		case events == nil:
			select {
			case <-changed:
			case <-ctx.Done():
				return status.FromContextError(ctx.Err()).Err()
			case <-f.ctx.Done():
				return errStopping
			}
		}
		if err != nil {
			return err
		}
		for _, e := range events {
			if err := send(e); err != nil {
				return err
			}
			seq = e.GetSeq()
		}
		if f.ctx.Err() != nil {
			return errStopping
		}
	}
}

// readOld reads events that the tail has no more.
func (f *feed) readOld(ctx context.Context, job string, seq int64) ([]*archfarmv1.JobEvent, error) {
	select {
	case f.reading <- struct{}{}:
		defer func() { <-f.reading }()
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-f.ctx.Done():
		return nil, errStopping
	}
	events, err := f.jobs.Events(ctx, job, seq, readPage)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return nil, unavailable("reading the job's events", err)
	}
	if len(events) == 0 || events[0].Seq != seq+1 {
		return nil, status.Errorf(codes.NotFound, "job %s has been removed: it ended long ago", job)
	}
	out, err := readAll(events, job)
	if err != nil {
		return nil, status.Errorf(codes.DataLoss, "reading the job's events: %v", err)
	}
	return out, nil
}
