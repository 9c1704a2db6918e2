package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/google/uuid"
	controlapi "github.com/moby/buildkit/api/services/control"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/coordinator/legbuild"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/identity"
)

const (
	// recovery is how often publications that a crash has left are looked for.
	recovery = time.Minute
	// sweeping is how often contexts that no job needs are removed.
	sweeping = time.Hour
)

// openJobs makes what works on the state.
func (c *coordinator) openJobs() {
	c.inside = access.NewInside()
	c.publisher = publish.NewPublisher(publish.Config{
		Ledger: c.state.store, Policy: c.cfg.Policy, Owner: process(c.cfg.Name), Lease: c.cfg.JobLease, Log: c.log, Metrics: c.metrics,
	})
	c.jobs = job.New(job.Options{
		Store: c.state.store, Publisher: c.publisher, Contexts: c.state.contexts, Key: c.state.key, Resolve: c.state.resolve, Owner: c.cfg.Name,
		Builder: legbuild.New(legbuild.Options{Dial: c.inside.Dial, DialOptions: access.DialOptions(), Workers: c.workerOf, Log: c.log}),
		Runs:    c.runs, WorkerWait: c.cfg.JobWorkerWait,
		MaxJobs: c.cfg.MaxJobs, Lease: c.cfg.JobLease, Timeout: c.cfg.JobTimeout, MaxAttempts: c.cfg.JobAttempts, Retention: c.cfg.JobRetention,
		Log: c.log, Metrics: c.metrics,
	})
}

// process names this process in leases, which no two may have together, even if two
// coordinators of one store have one name.
func process(name string) string { return name + "/" + uuid.NewString() }

// workerOf names the worker that runs the one leg of a build; empty: none yet.
func (c *coordinator) workerOf(ref string) string {
	b, err := c.builds.Find(identity.NewContext(context.Background(), identity.Identity{}), ref, 0)
	if err != nil {
		return ""
	}
	for _, leg := range b.Legs() {
		return leg.Worker
	}
	return ""
}

// runs tells whether a worker that builds a platform is attached.
func (c *coordinator) runs(platform string, pools []string) bool {
	p, err := platforms.Parse(platform)
	if err != nil {
		return true // which the build will say
	}
	p = platforms.Normalize(p)
	return c.farm.Scheduler.Native(p, pools...) || c.farm.Scheduler.Emulates(schedule.Demand{Platform: p, Pools: pools})
}

// work runs jobs, finishes what crashes have left, and tidies up, until ctx ends.
func (c *coordinator) work(ctx context.Context) {
	var parts errgroup.Group // none fails
	parts.Go(func() error { c.jobs.Run(ctx); return nil })
	parts.Go(func() error { c.publisher.Run(ctx, recovery); return nil })
	parts.Go(func() error { c.sweep(ctx); return nil })
	parts.Go(func() error { c.state.watch(ctx); return nil })
	parts.Go(func() error { c.attend(ctx); return nil })
	parts.Go(func() error { c.keepRoll(ctx); return nil })
	_ = parts.Wait()
}

func (c *coordinator) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweeping)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		freed, err := c.state.contexts.Sweep(ctx, c.state.store.ContextInUse)
		if err != nil && ctx.Err() == nil {
			c.log.Warn("removing contexts that no job needs", "error", err)
		} else if freed > 0 {
			c.log.Info("removed contexts that no job needs", "bytes", freed)
		}
	}
}

// closeJobs ends what openJobs began, and closes the state; the jobs have stopped, and
// the history is complete.
func (c *coordinator) closeJobs() error {
	c.publisher.Close()
	return errors.Join(c.inside.Close(), c.state.close())
}

// publication is what the build's image becomes in registries.
func (c *coordinator) publication(ctx context.Context, req *controlapi.SolveRequest, i image) publish.Request {
	who := identity.FromContext(ctx)
	return publish.Request{
		Tenant: cmp.Or(who.Tenant, identity.DefaultTenant), Build: req.GetRef(),
		Content: i.Content, Names: i.publication.Names, ByDigest: i.publication.ByDigest, Source: sourceOf(req),
		Registry: publish.Registry{Sessions: c.farm.Sessions.Manager(), Session: req.GetSession(), Insecure: i.publication.Insecure},
	}
}

// maxSource bounds what a client says of its commit.
const maxSource = 1 << 10

// sourceOf is the commit that buildx says it builds.
func sourceOf(req *controlapi.SolveRequest) store.Source {
	attrs := req.GetFrontendAttrs()
	return store.Source{URL: bounded(attrs["vcs:source"]), Commit: bounded(strings.TrimSuffix(attrs["vcs:revision"], "-dirty"))}
}

func bounded(s string) string {
	if len(s) > maxSource {
		return ""
	}
	return s
}

// observer shows a publication in a build's progress.
type observer struct{ *dispatch.Build }

// Step implements publish.Observer.
func (o observer) Step(text string) func(error) {
	step := o.Progress.Step(text)
	step.Start()
	return step.Done
}

// Warn implements publish.Observer.
func (o observer) Warn(text string) {
	step := o.Progress.Step("checking tags")
	step.Log("WARNING: " + text)
	step.Warn(&controlapi.VertexWarning{Level: 1, Short: []byte(text)})
	step.Done(nil)
}

// asides are the warnings of a publication alone: its steps were the worker's.
type asides struct{ *dispatch.Build }

// Step implements publish.Observer.
func (asides) Step(string) func(error) { return func(error) {} }

// Warn implements publish.Observer.
func (a asides) Warn(text string) { observer(a).Warn(text) }

// publishing is who gives tags to an image of one platform. Where the policy enforces,
// the worker must not; where it warns, its tags are in the attestations' subjects, as
// of any buildkitd.
func publishing(policy publish.Policy) func(repository string) split.Publishing {
	return func(repository string) split.Publishing {
		mode := policy.Strictest(publish.Endpoint)
		if repository != "" {
			mode, _ = policy.For(publish.Endpoint, repository)
		}
		return map[publish.Mode]split.Publishing{publish.Warn: split.ByWorkerTold, publish.Enforce: split.ByFarm}[mode]
	}
}

// drainAll lets jobs' legs and builds end.
func (c *coordinator) drainAll(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := c.jobs.Drain(ctx); err != nil {
			return fmt.Errorf("stopped while jobs were running, which go on at the next start: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		if err := c.builds.Drain(ctx); err != nil {
			return fmt.Errorf("stopped while builds were running: %w", err)
		}
		return nil
	})
	return group.Wait()
}
