package job

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/containerd/platforms"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
	"github.com/archfarm/archfarm/manifest"
)

// publishTimeout bounds a publication. The job's own timeout does not: its tags
// would be left in between.
const publishTimeout = 30 * time.Minute

// publish assembles what the legs pushed and publishes it, unless the job is
// cancelled until then.
func (w *work) publish(ctx context.Context) error {
	err := w.mergeCaches(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return w.fail("exporting caches", err)
	}
	content, err := w.assemble(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return w.fail("assembling the image", err)
	}
	fault.Point(fault.JobAssembled)
	if err := w.state(store.Publishing, "", ""); err != nil {
		return err
	}
	// Cancel is refused from here on. Who was answered before gets what they asked for.
	_, cancelled, err := w.Store.Renew(w.held, w.recorder.lease) //nolint:contextcheck // the lease's: ctx may end by the cancelling asked about
	switch {
	case err != nil:
		return err
	case cancelled:
		return errCancelled
	}
	return w.push(ctx, content)
}

// conclude ends a job that has nothing to publish.
func (w *work) conclude(ctx context.Context, todo next) error {
	if todo.state == store.Succeeded {
		err := w.mergeCaches(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return w.fail("exporting caches", err)
		}
	}
	return w.end(todo.state, "", todo.err)
}

// resume goes on with a publication that may have begun.
func (w *work) resume(ctx context.Context) error {
	ctx, done := w.publishing(ctx)
	defer done()
	j := w.snapshot()
	if j.CancelRequested { // before it began: see publish
		return errCancelled
	}
	finished, err := w.Publisher.Resume(ctx, w.id, w.publication(), w.registry, observer{w})
	switch {
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return w.later(ctx, err)
	case finished:
		p, err := w.Store.PublicationOf(ctx, w.id)
		if err != nil {
			return stopped(ctx, err)
		}
		return w.end(store.Succeeded, p.Digest, "")
	}
	content, err := w.assemble(ctx)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return w.fail("assembling the image", err)
	}
	return w.push(ctx, content)
}

// publishing is the context of a publication: its end leaves the publication to
// whoever has the job next.
func (w *work) publishing(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, publishTimeout, fmt.Errorf("publishing took more than %s: %w", publishTimeout, errTooLong))
}

var errTooLong = errors.New("it goes on when the job's lease has ended")

// push publishes content.
func (w *work) push(ctx context.Context, content publish.Content) error {
	ctx, done := w.publishing(ctx)
	defer done()
	err := w.Publisher.Publish(ctx, publish.Request{
		ID: w.publication(), Tenant: w.job.Tenant, Job: w.id, Content: content, Names: w.job.Tags, Source: w.source(),
		OverwriteNewer: w.spec.GetOverwriteNewer(), Registry: w.registry,
	}, observer{w})
	switch {
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return w.later(ctx, err)
	}
	return w.end(store.Succeeded, content.Descriptor.Digest.String(), "")
}

// later is what becomes of a job whose publication has failed. It is tried again, as
// legs are, when the registry may be back by then; that begins with finding out what
// this one did (resume).
func (w *work) later(ctx context.Context, err error) error {
	w.published++
	if !worthAnother(status.Code(err)) || w.published >= w.maxAttempts() {
		return w.fail("publishing", err)
	}
	w.notice("publishing is tried again: " + build.Message(err))
	w.pause(ctx, backoff(w.Backoff, w.published))
	return w.mayBegin(ctx)
}

// publication is the same for each run of the job, until it is retried.
func (w *work) publication() string { return w.id + "." + strconv.Itoa(w.job.Retries) }

func (w *work) fail(doing string, err error) error {
	return w.end(store.Failed, "", doing+": "+build.Message(err))
}

func (w *work) source() store.Source {
	s := w.spec.GetContext().GetSource()
	out := store.Source{URL: s.GetUrl(), Commit: s.GetCommit(), Branch: s.GetBranch(), Tag: s.GetTag()}
	if t := s.GetCommitTime(); t != nil {
		out.CommitTime = t.AsTime()
	}
	return out
}

// assemble is the index over the legs' images, or the one leg's as it is.
func (w *work) assemble(ctx context.Context) (publish.Content, error) {
	var legs []manifest.Leg
	for _, l := range w.snapshot().Legs {
		platform, err := platforms.Parse(l.Platform)
		if err != nil {
			return publish.Content{}, err
		}
		c, err := w.patiently(ctx, l)
		if err != nil {
			return publish.Content{}, fmt.Errorf("%s: %w", l.Platform, err)
		}
		legs = append(legs, manifest.Leg{Platform: platform, Descriptor: c.Descriptor, Blob: c.Blob})
	}
	if len(legs) == 1 {
		return publish.Content{Descriptor: legs[0].Descriptor, Blob: legs[0].Blob}, nil
	}
	index, err := manifest.Assemble(legs, manifest.Annotations{Index: w.spec.GetAnnotations()})
	if err != nil {
		return publish.Content{}, err
	}
	return publish.Content{Descriptor: index.Descriptor, Blob: index.Blob}, nil
}

// patiently fetches from a registry that may be away for a while.
func (w *work) patiently(ctx context.Context, l store.Leg) (publish.Content, error) {
	for tried := 1; ; tried++ {
		c, err := w.fetch(ctx, l)
		if err == nil || !worthAnother(status.Code(err)) || tried >= w.maxAttempts() || ctx.Err() != nil {
			return c, err
		}
		w.pause(ctx, backoff(w.Backoff, tried))
	}
}

// fetch reads the root of what a leg pushed: it must be in each repository.
func (w *work) fetch(ctx context.Context, l store.Leg) (c publish.Content, err error) {
	if c, ok := w.content[l.Platform]; ok && len(w.job.Repositories) > 0 {
		if d, err := descriptor(l); err == nil && d.Digest == c.Descriptor.Digest {
			return c, nil
		}
	}
	d, err := descriptor(l)
	if err != nil {
		return c, status.Errorf(codes.DataLoss, "what the leg pushed cannot be read: %v", err)
	}
	for _, repository := range w.job.Repositories {
		if c, err = w.registry.Fetch(ctx, repository, d); err != nil {
			return c, err
		}
	}
	w.content[l.Platform] = c
	return c, nil
}

// observer shows a publication in the job's events.
type observer struct{ *work }

// Step implements publish.Observer.
func (o observer) Step(text string) func(error) {
	o.notice(text)
	return func(err error) {
		if err != nil {
			o.notice(text + ": " + build.Message(err))
		}
	}
}

// Warn implements publish.Observer.
func (o observer) Warn(text string) { o.notice(text) }
