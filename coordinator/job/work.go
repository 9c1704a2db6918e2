package job

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// giveBack is how long a job is waited for when it is given back.
const giveBack = 3 * time.Second

// work is a job being run, under a lease.
type work struct {
	*runner
	*recorder
	id       string
	job      store.Job // as it was claimed
	spec     *archfarmv1.JobSpec
	with     confidential
	registry publish.Registry
	content  map[string]publish.Content // of legs that have been looked at, by platform
	log      *slog.Logger
	// published counts publications that failed in this run.
	published int
	until     time.Time       // the job's time is over
	held      context.Context // ends before the lease: for what records and publishes
}

// work runs a job as far as it can. Ctx ends what is under way, with its cause; stop
// is for those who find a cause.
func (r *runner) work(ctx context.Context, stop context.CancelCauseFunc, c store.Claimed) {
	log := r.Log.With("job", c.ID, "tenant", c.Tenant)
	fault.Point(fault.JobClaimed)
	held := store.Hold(context.WithoutCancel(ctx), c.Lease, r.Store.Renew, func() { stop(errCancelled) })
	defer held.Release()
	defer context.AfterFunc(held.Context, func() { stop(context.Cause(held.Context)) })() //nolint:contextcheck // the lease's: it outlives ctx until it is given back

	w := &work{runner: r, id: c.ID, job: c.Job, content: map[string]publish.Content{}, log: log, held: held.Context}
	err := w.run(ctx, c)
	switch {
	case err == nil:
	case held.Context.Err() != nil, errors.Is(err, store.ErrLeaseLost):
		log.Warn("the job goes on elsewhere", "reason", err)
	case errors.Is(err, errDraining), ctx.Err() != nil:
		held.Release()
		r.release(ctx, c.Lease, log)
	default: // once its lease has ended, it is tried again
		log.Error("the job stands still until its lease ends", "error", err)
	}
}

// release lets the job be claimed at once.
func (r *runner) release(ctx context.Context, l store.Lease, log *slog.Logger) {
	ctx, done := context.WithTimeout(context.WithoutCancel(ctx), giveBack) // the coordinator stops
	defer done()
	if err := r.Store.Release(ctx, l); err != nil {
		log.Warn("the job could not be given back: it stands still until its lease ends", "error", err)
		return
	}
	log.Info("the job was given back")
}

// run is the way of a job, from wherever it is, to its end: nil.
func (w *work) run(ctx context.Context, c store.Claimed) error {
	var had int64
	if c.LastSeq > 2 { // it has run before
		var err error
		if had, err = spent(ctx, w.Store, c.Job); err != nil {
			return err
		}
	}
	w.recorder = newRecorder(w.held, w.Store, c, had, w.runner.committed, w.log) //nolint:contextcheck // the lease's: what has happened is recorded when ctx has ended
	defer w.recorder.close()

	if err := w.open(ctx); err != nil {
		return err
	}
	if do := plan(w.snapshot()).do; do == doBuild || do == doPublish {
		if err := w.begin(ctx); err != nil {
			return err
		}
	}
	for {
		todo := plan(w.snapshot())
		var err error
		switch todo.do {
		case doRest:
			return nil
		case doEnd:
			err = w.conclude(ctx, todo)
		case doBuild:
			err = w.build(ctx, todo.legs)
		case doPublish:
			err = w.publish(ctx)
		case doResume:
			err = w.resume(ctx)
		}
		switch {
		case errors.Is(err, errCancelled):
			return w.end(store.Cancelled, "", "")
		case errors.Is(err, errTimedOut):
			return w.end(store.Failed, "", fmt.Sprintf("%v: it had %s from its start (the specification's timeout, or the coordinator's)", errTimedOut, w.timeout()))
		case err != nil:
			return err
		}
	}
}

// open reads what the job consists of. What cannot be read ends it.
func (w *work) open(ctx context.Context) (err error) {
	w.spec = &archfarmv1.JobSpec{}
	if err := proto.Unmarshal(w.job.Spec, w.spec); err != nil {
		return w.end(store.Failed, "", fmt.Sprintf("its specification cannot be read: %v", err))
	}
	w.with, err = unsealed(ctx, w.Key, w.Store, w.job, w.spec)
	var none *noSecretError
	switch {
	case err == nil:
	case ctx.Err() != nil && !errors.Is(context.Cause(ctx), errCancelled):
		return context.Cause(ctx)
	case errors.As(err, &none), isSealed(err):
		return w.end(store.Failed, "", err.Error())
	default:
		return err
	}
	w.registry = publish.WithCredentials(w.with.credentials, w.spec.GetInsecureRegistry())
	return nil
}

// begin makes the job Running, finds out how much of its time is left, and what of it
// has to be done again.
func (w *work) begin(ctx context.Context) error {
	if w.snapshot().State == store.Queued {
		if err := w.state(store.Running, "", ""); err != nil {
			return err
		}
		fault.Point(fault.JobRunning)
		w.log.Info("job started")
	}
	j, err := w.Store.Job(ctx, w.id) // by the store's clock
	if err != nil {
		return stopped(ctx, err)
	}
	now, err := w.Store.Now(ctx)
	if err != nil {
		return stopped(ctx, err)
	}
	if w.job.State == store.Queued {
		w.metrics.started(j, j.Retries > 0)
	}
	w.refresh(j)
	w.until = time.Now().Add(remaining(j.Started, now, w.timeout()))
	return w.check(ctx)
}

// stopped is why ctx has ended, if it has.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (w *work) timeout() time.Duration {
	if t := w.spec.GetTimeout(); t != nil && t.AsDuration() > 0 {
		return t.AsDuration()
	}
	return w.Timeout
}

// end records how the job ended, and its legs that had not.
func (w *work) end(s store.State, digest, text string) error {
	now := time.Now()
	j := w.snapshot()
	why := "the job was cancelled"
	if s == store.Failed {
		why = "the job failed"
	}
	legs := abandoned(j.Legs, why, now)
	if err := w.state(s, digest, text, legs...); err != nil {
		return err
	}
	if s == store.Succeeded {
		fault.Point(fault.JobEnded)
	}
	w.metrics.ended(s, j.Started, now)
	w.log.Info("job ended", "state", s, "digest", digest, "error", readable(text))
	return nil
}
