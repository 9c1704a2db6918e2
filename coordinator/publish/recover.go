package publish

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
)

// Resume finishes what a job's publication of an ID (Request.ID) has left pending,
// with the same bytes. Done tells that all its tags are published; when they are not,
// and there is no error, nothing is pending any more, or nothing was ever bound, and
// the job publishes as if for the first time, under the same ID. Errors as Publish.
func (p *Publisher) Resume(ctx context.Context, job, id string, registry Registry, observe Observer) (done bool, err error) {
	for {
		settled := p.next()
		left, err := p.Ledger.PublicationOf(ctx, job)
		switch {
		case errors.Is(err, store.ErrNotFound):
			return false, nil
		case err != nil:
			return false, why("looking for the publication of job "+job, err)
		}
		ours := id == "" || strings.TrimRight(left.ID, "+") == id
		if pending, undone := count(left.Bindings); pending == 0 {
			return ours && undone == 0, nil
		}
		left, lease, err := p.Ledger.Takeover(ctx, left.ID, p.Owner, p.Lease)
		switch {
		case errors.Is(err, store.ErrNotFound): // settled in between
			continue
		case errors.Is(err, store.ErrLeaseLost):
			if err := p.wait(ctx, settled); err != nil {
				return false, why("waiting for the lease of publication "+left.ID, err)
			}
			continue
		case err != nil:
			return false, why("taking over publication "+left.ID, err)
		}
		if !ours { // of an earlier run of the job: what it did is found out, no more
			p.metrics.found(p.investigate(ctx, left, lease, registry))
			return false, nil
		}
		return p.resume(ctx, left, lease, registry, observe)
	}
}

func count(bindings []store.Binding) (pending, undone int) {
	for _, b := range bindings {
		switch b.State {
		case store.Pending:
			pending++
		case store.Undone:
			undone++
		}
	}
	return pending, undone
}

func (p *Publisher) resume(ctx context.Context, left store.Publication, lease store.Lease, registry Registry, observe Observer) (done bool, err error) {
	counted := p.metrics.began(Jobs)
	defer func() { counted(err) }()
	registry.Insecure = left.Insecure
	r := Request{
		ID: left.ID, Tenant: left.Tenant, Job: left.Job, Build: left.Build, Source: left.Source, Registry: registry,
		Content: Content{Blob: left.Blob, Descriptor: ocispecs.Descriptor{MediaType: left.MediaType, Digest: digest.Digest(left.Digest), Size: int64(len(left.Blob))}},
	}
	for _, b := range left.Bindings {
		r.Names = append(r.Names, b.Repository+":"+b.Tag)
	}
	w, err := p.plan(r, observe)
	if err != nil {
		return false, why("finishing publication "+left.ID, err)
	}
	w.lease = lease
	undone := 0
	var tags []*tag
	for i, b := range left.Bindings {
		t := w.tags[i]
		t.binding, t.state, t.immutable = b.ID, b.State, b.Immutable
		if t.mode == Off { // by now: it was not when the tag was bound
			t.mode = Warn
		}
		if b.State == store.Pending {
			tags = append(tags, t)
		}
		if b.State == store.Undone {
			undone++
		}
	}
	w.tags = tags
	p.point(fault.PublishBound)
	err = p.finish(ctx, w)
	return err == nil && undone == 0, err
}

// Recover finds out, as anybody may, what has become of the publications of builds
// whose processes are gone: whether their tags are what they were to be. Where the
// registry does not tell anybody, they stay, until the tag's next publication asks
// with its own credentials. To be called at the start and now and then.
func (p *Publisher) Recover(ctx context.Context) error {
	seen := map[string]bool{}
	for {
		left, lease, err := p.Ledger.Abandoned(ctx, p.Owner, p.Lease, false)
		switch {
		case errors.Is(err, store.ErrNotFound):
			return nil
		case err != nil:
			return fmt.Errorf("recovering publications: %w", err)
		case seen[left.ID]: // its lease has ended again: all have been looked at
			return nil
		}
		seen[left.ID] = true
		result := p.investigate(ctx, left, lease, WithCredentials(nil, left.Insecure))
		p.metrics.found(result)
		p.Log.Info("recovered a publication", "publication", left.ID, "build", left.Build, "published", result.published, "undone", result.undone, "unknown", result.unknown)
	}
}

// result counts bindings.
type result struct {
	published, undone, unknown int
	err                        error // why one is unknown
}

// investigate settles what is pending of a publication by looking at the registry.
func (p *Publisher) investigate(ctx context.Context, left store.Publication, lease store.Lease, registry Registry) (out result) {
	held := store.Hold(context.WithoutCancel(ctx), lease, p.renew, nil)
	defer held.Release()
	looking, done := context.WithTimeout(ctx, settleLimit)
	defer done()
	states := map[int64]store.BindingState{}
	for _, b := range left.Bindings {
		if b.State != store.Pending {
			continue
		}
		found, err := registry.tagged(looking, b)
		switch {
		case err == nil && found.String() == b.Digest:
			states[b.ID] = store.Published
			out.published++
		case err == nil, status.Code(err) == codes.NotFound:
			states[b.ID] = store.Undone
			out.undone++
		default:
			out.unknown++
			out.err = err
		}
	}
	telling, stop := context.WithTimeout(context.WithoutCancel(ctx), settleLimit)
	defer stop()
	p.tellLedger(telling, lease, states)
	return out
}

// tagged looks at a tag; a lookup asks for no more than it needs, since it may be
// anybody's.
func (r Registry) tagged(ctx context.Context, b store.Binding) (digest.Digest, error) {
	named, err := reference.ParseNormalizedNamed(b.Repository + ":" + b.Tag)
	if err != nil {
		return "", status.Errorf(codes.InvalidArgument, "looking up %s:%s: %v", b.Repository, b.Tag, err)
	}
	found, err := r.Resolve(ctx, named.String())
	return found.Digest, err
}

// takeOver settles the publication that has a tag, if its process is gone, with the
// credentials of the one that waits. It tells whether the tag may be free now.
func (p *Publisher) takeOver(ctx context.Context, w *work, holder store.Binding) (free bool, err error) {
	left, lease, err := p.Ledger.Takeover(ctx, holder.Publication, p.Owner, p.Lease)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return true, nil
	case errors.Is(err, store.ErrLeaseLost):
		return false, nil
	case err != nil:
		return false, why("taking over what another build has left", err)
	}
	result := p.investigate(ctx, left, lease, w.Registry)
	p.metrics.found(result)
	if result.unknown > 0 {
		return false, why(fmt.Sprintf("%s:%s was being published by %s, which is gone, and the registry does not tell how far that came",
			holder.Repository, holder.Tag, origin(store.Binding{Tenant: w.Tenant}, holder)), result.err)
	}
	return true, nil
}

// Run recovers, at once and every so often, until ctx ends.
func (p *Publisher) Run(ctx context.Context, every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		if err := p.Recover(ctx); err != nil && ctx.Err() == nil {
			p.Log.Warn("recovering publications: trying again later", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
