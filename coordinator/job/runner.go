package job

import (
	"context"
	"errors"
	"sync"
	"time"
)

// Why the work on a job stops before its end.
var (
	errCancelled = errors.New("the job was cancelled")
	errTimedOut  = errors.New("the job's time is over")
	errDraining  = errors.New("the coordinator begins nothing any more")
)

// runner runs the jobs that this coordinator has leases of.
type runner struct {
	Options
	committed func(job string) // something of it is durable
	metrics   *metrics

	drainOnce sync.Once
	draining  chan struct{} // closed by drain
	free      chan struct{} // a job has ended, or been asked for

	mu      sync.Mutex
	running map[string]context.CancelCauseFunc
	taking  bool          // more of them
	idle    chan struct{} // closed when nothing runs any more; nil: nobody waits
}

func newRunner(o Options, committed func(string), m *metrics) *runner {
	return &runner{
		Options: o, committed: committed, metrics: m,
		draining: make(chan struct{}), free: make(chan struct{}, 1), running: map[string]context.CancelCauseFunc{},
	}
}

// run owns the goroutines of all jobs: they have ended when it returns.
func (r *runner) run(ctx context.Context) {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	poll := time.NewTicker(r.Poll)
	defer poll.Stop()
	wakes, looking := r.Store.Wakes(ctx), newLook(r)
	for due := true; ; {
		if due {
			r.claim(ctx, &jobs)
		}
		due = true
		select {
		case <-ctx.Done():
			return
		case <-r.free:
		case <-poll.C:
		case w, ok := <-wakes:
			if !ok { // the store closes
				wakes = nil
			}
			if due = w.Job == ""; !due {
				looking.at(ctx, w.Job)
			}
		}
	}
}

// claim takes as many jobs as there is room for.
func (r *runner) claim(ctx context.Context, jobs *sync.WaitGroup) {
	defer r.claimed()
	for ctx.Err() == nil && r.take() {
		room := r.MaxJobs - r.count()
		if room <= 0 {
			return
		}
		claimed, err := r.Store.Claim(ctx, r.Owner, r.Lease, room)
		if err != nil {
			if ctx.Err() == nil {
				r.Log.Warn("looking for jobs to run", "error", err)
			}
			return
		}
		for _, c := range claimed {
			working, stop := context.WithCancelCause(ctx)
			r.add(c.ID, stop)
			jobs.Go(func() { // ends with the job, or ctx
				r.work(working, stop, c)
				stop(nil)
				r.remove(c.ID)
			})
		}
		if len(claimed) < room {
			return
		}
	}
}

func (r *runner) add(job string, stop context.CancelCauseFunc) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running[job] = stop
	r.metrics.running.Set(float64(len(r.running)))
}

func (r *runner) remove(job string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, job)
	r.metrics.running.Set(float64(len(r.running)))
	r.rest()
	hint(r.free)
}

// take tells whether jobs may be claimed; claimed, that it is over.
func (r *runner) take() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.taking = !r.drains()
	return r.taking
}

func (r *runner) claimed() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.taking = false
	r.rest()
}

// rest tells those who wait that nothing runs any more.
func (r *runner) rest() {
	if len(r.running) == 0 && !r.taking && r.idle != nil {
		close(r.idle)
		r.idle = nil
	}
}

func (r *runner) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.running)
}

func (r *runner) runs(job string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.running[job] != nil
}

// cancelled tells that cancelling a job has been asked for. The renewals of its
// lease would tell, too, later.
func (r *runner) cancelled(job string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if stop := r.running[job]; stop != nil {
		stop(errCancelled)
	}
}

func (r *runner) drains() bool {
	select {
	case <-r.draining:
		return true
	default:
		return false
	}
}

func (r *runner) drain(ctx context.Context) error {
	r.drainOnce.Do(func() { close(r.draining) })
	r.mu.Lock()
	if len(r.running) == 0 && !r.taking {
		r.mu.Unlock()
		return nil
	}
	if r.idle == nil {
		r.idle = make(chan struct{})
	}
	idle := r.idle
	r.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// look finds out which jobs that run here have been cancelled by way of another
// coordinator. The store's hints name a job at each of its events, so that it looks
// at one only now and then.
type look struct {
	*runner
	last map[string]time.Time
}

const lookEvery = 500 * time.Millisecond

func newLook(r *runner) *look { return &look{r, map[string]time.Time{}} }

func (l *look) at(ctx context.Context, job string) {
	now := time.Now()
	if !l.Store.Shared() || !l.runs(job) || now.Sub(l.last[job]) < lookEvery {
		return
	}
	l.last[job] = now
	if len(l.last) > 4*l.MaxJobs {
		clear(l.last)
	}
	if j, err := l.Store.Job(ctx, job); err == nil && j.CancelRequested {
		l.cancelled(job)
	}
}
