package job

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// build builds legs at the same time. One that fails lets the others end; a job that
// is cancelled, or whose time is over, does not.
func (w *work) build(ctx context.Context, legs []int) error {
	ctx, done := context.WithDeadlineCause(ctx, w.until, errTimedOut)
	defer done()
	if ctx.Err() != nil { // not even begun
		return context.Cause(ctx)
	}
	dir, release, err := w.folder(ctx)
	if err != nil {
		return w.without(ctx, err)
	}
	defer release()
	var g errgroup.Group
	for _, i := range legs {
		g.Go(func() error { return w.attempts(ctx, w.snapshot().Legs[i], dir) })
	}
	return g.Wait()
}

// folder is the uploaded context; empty for a git context.
func (w *work) folder(ctx context.Context) (dir string, release func(), err error) {
	if w.job.Context == "" {
		return "", func() {}, nil
	}
	return w.Contexts.Open(ctx, w.job.Tenant, w.job.Context)
}

// without ends a job whose context is not there.
func (w *work) without(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if !errors.Is(err, store.ErrNotFound) && worthAnother(status.Code(err)) {
		return err // the lease's end is the pause before the next try
	}
	return w.end(store.Failed, "", fmt.Sprintf("the context %s: %v", w.job.Context, err))
}

// check looks whether the registry still has what legs pushed before this run. Those
// of which it has not are built again.
func (w *work) check(ctx context.Context) error {
	if len(w.job.Repositories) == 0 {
		return nil
	}
	for _, l := range w.job.Legs {
		if l.State != store.Succeeded {
			continue
		}
		_, err := w.fetch(ctx, l)
		switch {
		case ctx.Err() != nil: // seen by whoever is next
			return nil
		case status.Code(err) != codes.NotFound: // another error shows again when publishing
			continue
		}
		w.notice(l.Platform + " is built again: " + build.Message(err))
		if err := w.recorder.leg(lost(l)); err != nil {
			return err
		}
	}
	return nil
}

// attempts builds one leg, until it has succeeded or failed. An error says why that
// had to wait.
func (w *work) attempts(ctx context.Context, l store.Leg, dir string) error {
	for {
		w.awaitWorker(ctx, l.Platform)
		if err := w.mayBegin(ctx); err != nil {
			return err
		}
		if tooOften(l) {
			return w.recorder.leg(givenUp(l, fmt.Sprintf("interrupted %d times: its build may be what stops coordinators", maxInterruptions), time.Now()))
		}
		var number int
		l, number = begun(l, w.Owner, time.Now())
		if err := w.recorder.leg(l); err != nil {
			return err
		}
		fault.Point(fault.LegStarted)
		pushed, err := w.Builder.Build(ctx, w.leg(l.Platform, number, dir), w.report(l.Platform, number))
		l = w.current(l.Platform) // with its worker
		if err != nil && ctx.Err() != nil {
			return context.Cause(ctx)
		}
		fault.Point(fault.LegBuilt)
		if l, err = w.outcome(l, pushed, err); err != nil {
			return err
		}
		fault.Point(fault.LegRecorded)
		if l.State.Ended() {
			return nil
		}
		w.pause(ctx, backoff(w.Backoff, failures(l)))
	}
}

// mayBegin is an error when no attempt may.
func (w *work) mayBegin(ctx context.Context) error {
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case w.drains():
		return errDraining
	}
	return nil
}

const (
	// workerPoll is how often a leg looks for a worker that is not there.
	workerPoll = 250 * time.Millisecond
	// unnoticed is for how long nobody is told that it does.
	unnoticed = 2 * time.Second
)

// awaitWorker returns when somebody may be able to build the leg, when it has waited
// long enough, or when it need not any more.
func (w *work) awaitWorker(ctx context.Context, platform string) {
	pools := w.job.Pools
	if asked, ok := w.spec.GetBuildArgs()[split.PoolArg]; ok {
		pools, _ = split.Pools(map[string]string{"build-arg:" + split.PoolArg: asked}) // what is wrong with it, the build will say
	}
	told := false
	for began := time.Now(); w.Runs != nil && !w.Runs(platform, pools) && w.mayBegin(ctx) == nil; w.pause(ctx, workerPoll) {
		waited := time.Since(began)
		if waited > w.WorkerWait {
			return
		}
		if waited > unnoticed && !told {
			told = true
			w.notice(fmt.Sprintf("no native worker for %s is attached: waiting for one, for at most %s", platform, w.WorkerWait))
		}
	}
}

func (w *work) pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	case <-w.draining:
	}
}

// outcome records how an attempt ended.
func (w *work) outcome(l store.Leg, pushed ocispecs.Descriptor, err error) (store.Leg, error) {
	number := l.Attempts[len(l.Attempts)-1].Number
	log := w.log.With("leg", l.Platform, "attempt", number, "worker", l.Worker)
	code := status.Code(err)
	w.metrics.attempts.WithLabelValues(l.Platform, code.String()).Inc()
	if err == nil && pushed.Digest == "" && len(w.job.Repositories) > 0 {
		err = status.Error(codes.Internal, "the build pushed nothing")
	}
	if err != nil {
		l = failed(l, code, readable(build.Message(err)), w.maxAttempts(), time.Now())
		log.Warn("attempt failed", "error", l.Error, "code", code.String(), "again", !l.State.Ended())
		return l, w.recorder.leg(l)
	}
	if l, err = succeeded(l, pushed, time.Now()); err != nil {
		return l, err
	}
	log.Info("leg built", "digest", pushed.Digest.String())
	return l, w.recorder.leg(l)
}

func (w *work) maxAttempts() int {
	if n := w.spec.GetMaxAttempts(); n > 0 {
		return int(n)
	}
	return w.MaxAttempts
}

// current is a leg as it is recorded.
func (w *work) current(platform string) store.Leg {
	for _, l := range w.snapshot().Legs {
		if l.Platform == platform {
			return l
		}
	}
	return store.Leg{}
}

// leg is what the Builder needs to know of an attempt.
func (w *work) leg(platform string, number int, dir string) Leg {
	return Leg{
		Job: w.id, Attempt: number, Ref: ref(w.id, w.job.Retries, platform, number), Who: w.submitter(), Spec: w.spec,
		Platform: platform, Repositories: w.job.Repositories, Dir: dir, Secrets: w.with.secrets, Credentials: w.with.credentials,
	}
}

// ref is unique: no two attempts of one run of a job have one number.
func ref(job string, retries int, platform string, number int) string {
	return fmt.Sprintf("%s-%d-%s-%d", job, retries, strings.NewReplacer("/", "-", ".", "-").Replace(platform), number)
}

// submitter is on whose behalf the job's builds are: of its tenant, in its pools,
// and no more than a client, whoever submitted it.
func (w *work) submitter() identity.Identity {
	name := w.job.SubmittedBy
	if name == "" {
		name = "job"
	}
	return identity.Identity{Kind: identity.Client, Name: name, Tenant: w.job.Tenant, Pools: w.job.Pools}
}

// report takes what an attempt's build tells.
func (w *work) report(platform string, number int) Report {
	return func(worker string, p *archfarmv1.Progress) {
		if worker != "" {
			w.worker(platform, worker)
		}
		if p == nil {
			return
		}
		p.Platform, p.Attempt = platform, int32(number) //nolint:gosec // bounded by the attempts
		w.progress(p)
	}
}
