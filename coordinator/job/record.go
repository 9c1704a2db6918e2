package job

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// flushAfter is how long progress waits for more of it, and flushSize how much
	// waits at most.
	flushAfter = 50 * time.Millisecond
	flushSize  = 64 << 10
	// holdBack is what may wait while the store is busy, before builds do.
	holdBack = 1 << 20
	// maxProgress of a job and each of its first maxGenerous retries, in bytes.
	maxProgress = 32 << 20
	maxGenerous = 7
	// again is how long the recorder waits after an error of the store.
	again = 200 * time.Millisecond
)

// recorder is the one that changes a job in the store while its lease is held.
// Changes come in any number at a time; each waits until it is durable. Progress
// does not.
type recorder struct {
	jobs      store.Jobs
	lease     store.Lease
	committed func(job string)
	log       *slog.Logger

	soon, now  chan struct{} // something waits; it should not
	stop, done chan struct{}

	mu    sync.Mutex
	job   store.Job // as it will be once what waits is written
	wait  *batch
	spent int64 // on progress, in bytes
	err   error // why nothing can be written any more
}

// batch is what is written at once.
type batch struct {
	store.Update
	events  []*archfarmv1.JobEvent
	changed []string // platforms
	size    int
	written chan struct{} // closed when it has been, or cannot be: then err
	err     error
}

func newBatch() *batch { return &batch{written: make(chan struct{})} }

// newRecorder begins to record. Ctx is the lease's; spent is how much progress the
// job has already.
func newRecorder(ctx context.Context, jobs store.Jobs, c store.Claimed, spent int64, committed func(string), log *slog.Logger) *recorder {
	r := &recorder{
		jobs: jobs, lease: c.Lease, committed: committed, log: log, job: c.Job, wait: newBatch(), spent: spent,
		soon: make(chan struct{}, 1), now: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	r.job.Legs = slices.Clone(r.job.Legs)
	go r.run(ctx) // ends with close
	return r
}

// close writes what waits, and ends.
func (r *recorder) close() {
	close(r.stop)
	<-r.done
}

func (r *recorder) run(ctx context.Context) {
	defer close(r.done)
	for {
		stopping := false
		select {
		case <-r.now:
		case <-r.soon:
			stopping = r.linger()
		case <-r.stop:
			stopping = true
		}
		r.flush(ctx)
		if stopping {
			return
		}
	}
}

// linger waits for more to write; it returns whether the recorder ends.
func (r *recorder) linger() bool {
	timer := time.NewTimer(flushAfter)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.now:
	case <-r.stop:
		return true
	}
	return false
}

func (r *recorder) flush(ctx context.Context) {
	r.mu.Lock()
	b, legs, last, failed := r.wait, slices.Clone(r.job.Legs), r.job.LastSeq, r.err
	if len(b.events) == 0 {
		r.mu.Unlock()
		return
	}
	r.wait = newBatch()
	r.mu.Unlock()

	defer close(b.written)
	if b.err = failed; b.err != nil {
		return
	}
	for _, l := range legs {
		if slices.Contains(b.changed, l.Platform) {
			b.Legs = append(b.Legs, l)
		}
	}
	seq, err := r.write(ctx, b, last)
	r.mu.Lock()
	r.job.LastSeq, r.err, b.err = seq, err, err
	r.mu.Unlock()
	if err == nil {
		r.committed(r.lease.Job)
	}
}

// write makes a batch durable, and tries until the lease ends. Nobody else adds
// events to a job under lease, so that the last one's number tells whether an
// update has happened that returned an error.
func (r *recorder) write(ctx context.Context, b *batch, last int64) (int64, error) {
	var err error
	if b.Events, err = stored(b.events...); err != nil {
		return last, fmt.Errorf("job %s: %w", r.lease.Job, err)
	}
	for {
		seq, err := r.jobs.Update(ctx, r.lease, b.Update)
		if err == nil || errors.Is(err, store.ErrLeaseLost) {
			return seq, err
		}
		r.log.Warn("recording the job", "error", err)
		select {
		case <-ctx.Done():
			return last, context.Cause(ctx)
		case <-time.After(again):
		}
		wanted := last + int64(len(b.Events))
		if j, err := r.jobs.Job(ctx, r.lease.Job); err == nil && j.LastSeq == wanted {
			return wanted, nil
		}
	}
}

// snapshot is the job as it is recorded, or about to be.
func (r *recorder) snapshot() store.Job {
	r.mu.Lock()
	defer r.mu.Unlock()
	j := r.job
	j.Legs = slices.Clone(j.Legs)
	return j
}

// refresh takes over what the store's clock says of the job.
func (r *recorder) refresh(j store.Job) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.job.Started = j.Started
}

// leg records a leg as it is now, and waits.
func (r *recorder) leg(l store.Leg) error {
	return r.commit(func(b *batch) { r.setLeg(b, l) })
}

// state records the job's state, with the legs that change with it, and waits.
func (r *recorder) state(s store.State, digest, text string, legs ...store.Leg) error {
	return r.commit(func(b *batch) {
		for _, l := range legs {
			r.setLeg(b, l)
		}
		b.State, b.Digest, b.Error = s, digest, readable(text)
		r.job.State, r.job.Digest, r.job.Error = s, digest, b.Error
		b.add(jobEvent(r.job))
	})
}

// commit makes a change and waits until it is durable.
func (r *recorder) commit(change func(*batch)) error {
	r.mu.Lock()
	b := r.wait
	change(b)
	r.mu.Unlock()
	hint(r.now)
	select {
	case <-b.written:
		return b.err
	case <-r.done:
		return errors.New("job " + r.lease.Job + ": recorded after the end")
	}
}

func (r *recorder) setLeg(b *batch, l store.Leg) {
	i := slices.IndexFunc(r.job.Legs, func(old store.Leg) bool { return old.Platform == l.Platform })
	l.Error = readable(l.Error)
	r.job.Legs[i] = l
	b.changed = append(b.changed, l.Platform)
	b.add(legEvent(l))
}

// worker records where a leg's attempt runs.
func (r *recorder) worker(platform, worker string) {
	r.mu.Lock()
	i := slices.IndexFunc(r.job.Legs, func(l store.Leg) bool { return l.Platform == platform })
	if r.job.Legs[i].Worker != worker {
		r.setLeg(r.wait, on(r.job.Legs[i], worker))
		hint(r.soon)
	}
	r.mu.Unlock()
}

// notice records something that the user should know.
func (r *recorder) notice(text string) {
	r.mu.Lock()
	r.wait.add(noticeEvent(text))
	r.mu.Unlock()
	hint(r.soon)
}

// budget is how much progress a job may have, all its runs together.
func budget(retries int) int64 { return maxProgress * int64(1+min(retries, maxGenerous)) }

// progress records a piece of progress, whose ownership it takes. It waits when too
// much does.
func (r *recorder) progress(p *archfarmv1.Progress) {
	size := proto.Size(p)
	r.mu.Lock()
	limit := budget(r.job.Retries)
	was := r.spent
	r.spent += int64(size)
	switch {
	case was > limit:
		r.mu.Unlock()
		return
	case r.spent > limit:
		r.wait.add(noticeEvent(fmt.Sprintf("the progress of this job has more than %d MiB: no more of it is recorded", limit>>20)))
	default:
		r.wait.addProgress(p, size)
	}
	b := r.wait
	full, much := b.size >= flushSize, b.size >= holdBack
	r.mu.Unlock()
	if !full {
		hint(r.soon)
		return
	}
	hint(r.now)
	if much {
		select {
		case <-b.written:
		case <-r.done:
		}
	}
}

func (b *batch) add(e *archfarmv1.JobEvent) { b.events = append(b.events, e) }

// addProgress joins it with the piece before, if that is of the same attempt.
func (b *batch) addProgress(p *archfarmv1.Progress, size int) {
	b.size += size
	if n := len(b.events); n > 0 {
		last := b.events[n-1].GetProgress()
		if last != nil && last.Platform == p.Platform && last.Attempt == p.Attempt && proto.Size(last)+size <= flushSize {
			last.Vertexes = append(last.Vertexes, p.Vertexes...)
			last.Statuses = append(last.Statuses, p.Statuses...)
			last.Logs = append(last.Logs, p.Logs...)
			last.Warnings = append(last.Warnings, p.Warnings...)
			return
		}
	}
	b.add(&archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Progress{Progress: p}})
}

// hint leaves a token that somebody waits for.
func hint(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// spent sums up the progress that a job has.
func spent(ctx context.Context, jobs store.Jobs, j store.Job) (int64, error) {
	var sum int64
	for after := int64(0); after < j.LastSeq && sum <= budget(j.Retries); {
		events, err := jobs.Events(ctx, j.ID, after, 64)
		if err != nil || len(events) == 0 {
			return sum, err
		}
		for _, e := range events {
			sum += int64(len(e.Data))
		}
		after = events[len(events)-1].Seq
	}
	return sum, nil
}
