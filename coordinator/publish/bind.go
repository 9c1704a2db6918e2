package publish

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
)

// grace is how long what may have an effect goes on once its client is gone, so that
// it is known whether it had one.
const grace = 3 * time.Second

// bind enters the publication in the ledger, under a lease. Tags that another
// publication has are waited for; when that one's process is gone, what became of
// it is found out first.
func (p *Publisher) bind(ctx context.Context, w *work) (err error) {
	end := func(error) {}
	defer func() { end(err) }()
	for waiting := ""; ; {
		settled := p.next()
		again, err := p.tryBind(ctx, w)
		var busy *store.BusyError
		switch {
		case err == nil && !again:
			w.warn()
			return nil
		case err == nil:
			continue
		case !errors.As(err, &busy):
			return bindingError(err)
		}
		if free, err := p.takeOver(ctx, w, busy.Holder); err != nil {
			return err
		} else if free {
			continue
		}
		reference := busy.Holder.Repository + ":" + busy.Holder.Tag
		by := origin(store.Binding{Tenant: w.Tenant}, busy.Holder)
		if text := fmt.Sprintf("waiting for %s, which %s is publishing", reference, by); text != waiting {
			end(nil)
			waiting, end = text, w.observe.Step(text)
		}
		if err := p.wait(ctx, settled); err != nil {
			return why(waiting, err)
		}
	}
}

// bindingError leaves the policy's refusal as it is.
func bindingError(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return why("binding the tags", err)
}

// tryBind also tells whether to try again, under another ID.
func (p *Publisher) tryBind(ctx context.Context, w *work) (again bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	// A transaction that is broken off may have been committed, and would block the
	// tags until its lease ends.
	patient, done := outlive(ctx, w.grace)
	defer done()
	bound, lease, err := p.Ledger.Bind(patient, w.publication(), p.Owner, p.Lease, w.decide)
	if err != nil {
		return false, err
	}
	pending, undone := count(bound.Bindings)
	switch {
	case undone > 0 && pending == 0: // an earlier try of the same ID, which stays what it was
		w.ID += "+"
		return true, nil
	case bound.Digest != w.Content.Descriptor.Digest.String():
		return false, status.Errorf(codes.FailedPrecondition, "publication %s was begun as %s, and is now to be %s", w.ID, bound.Digest, w.Content.Descriptor.Digest)
	}
	w.lease = lease
	for _, b := range bound.Bindings {
		for _, t := range w.bound() {
			if t.repository() == b.Repository && t.tag == b.Tag {
				t.binding, t.state = b.ID, b.State
			}
		}
	}
	return false, nil
}

// publication is the work as the ledger has it.
func (w *work) publication() store.Publication {
	out := store.Publication{
		ID: w.ID, Tenant: w.Tenant, Job: w.Job, Build: w.Build, Source: w.Source, Insecure: w.Registry.Insecure,
		Digest: w.Content.Descriptor.Digest.String(), MediaType: w.Content.Descriptor.MediaType, Blob: w.Content.Blob,
	}
	seen := map[string]bool{}
	for _, t := range w.bound() {
		if !seen[t.reference()] {
			out.Bindings = append(out.Bindings, store.Binding{Repository: t.repository(), Tag: t.tag, Digest: out.Digest, Immutable: t.immutable})
		}
		seen[t.reference()] = true
	}
	return out
}

// decide is the policy, within the ledger's transaction.
func (w *work) decide(wanted store.Binding, current *store.Binding) error {
	refusal := judge(wanted, current, w.OverwriteNewer)
	if refusal == nil || w.enforced(wanted.Repository, wanted.Tag) {
		return refusal
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.warnings[wanted.Repository+":"+wanted.Tag] = aside(refusal)
	return nil
}

func (w *work) enforced(repository, name string) bool {
	for _, t := range w.bound() {
		if t.repository() == repository && t.tag == name {
			return t.mode == Enforce
		}
	}
	return true
}

// warn passes on what the policy found in the ledger.
func (w *work) warn() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, t := range w.bound() {
		if text := w.warnings[t.reference()]; text != "" {
			w.observe.Warn(text)
		}
	}
}

// next is closed when this process has settled another publication.
func (p *Publisher) next() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.settled
}

// tell wakes those who wait.
func (p *Publisher) tell() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.settled)
	p.settled = make(chan struct{})
}

func (p *Publisher) wait(ctx context.Context, settled <-chan struct{}) error {
	timer := time.NewTimer(p.Poll)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ended(ctx)
	case <-settled:
	case <-timer.C:
	}
	return nil
}

// outlive is ctx, but ends a while later when it is cancelled.
func outlive(ctx context.Context, by time.Duration) (context.Context, context.CancelFunc) {
	longer, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { // ends by the timer, or when nobody needs it
		timer := time.NewTimer(by)
		defer timer.Stop()
		select {
		case <-timer.C:
			cancel(context.Cause(ctx))
		case <-longer.Done():
		}
	})
	return longer, func() { stop(); cancel(context.Canceled) }
}
