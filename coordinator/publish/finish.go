package publish

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
)

const (
	// settleLimit bounds finding out how a publication that failed has left its tags,
	// and telling the ledger.
	settleLimit = 30 * time.Second
	// maxLooks at a tag that does not answer what was pushed; some registries' caches
	// are late. The pauses are lookPause, and twice as long each time.
	maxLooks  = 4
	lookPause = 100 * time.Millisecond
	// together is how many requests of a publication are under way at a time.
	together = 8
)

// errLost: somebody else may take the publication over.
var errLost = errors.New("the publication's lease is lost")

// finish moves the tags of a publication that is bound, and tells the ledger how
// that ended.
func (p *Publisher) finish(ctx context.Context, w *work) error {
	if !w.ledgered() {
		return w.end(p.move(ctx, w))
	}
	// The lease is kept beyond ctx: what was begun is settled under it.
	held := store.Hold(context.WithoutCancel(ctx), w.lease, p.renew, nil)
	release := held.Release
	defer func() { release() }()
	err := func() error {
		ctx, stop := context.WithCancelCause(ctx)
		defer stop(nil)
		//nolint:contextcheck // the lease's end is the other thing that ends the work
		defer context.AfterFunc(held.Context, func() { stop(fmt.Errorf("%w: %w", errLost, context.Cause(held.Context))) })()
		return p.move(ctx, w)
	}()
	if err == nil && w.door() == Endpoint {
		// The client need not wait: the tags are read back. A process that dies before
		// the ledger knows leaves pending bindings of which the registry tells that they
		// are published, to Recover or to the tags' next publication, which waits until
		// they are settled. A job waits: it must not have ended without its tags.
		release = func() {}
		p.settling.Go(func() { // ends within settleLimit; Close waits for it
			defer held.Release()
			p.settle(context.WithoutCancel(ctx), w)
			p.point(fault.PublishSettled)
		})
		return w.end(nil)
	}
	p.settle(context.WithoutCancel(ctx), w)
	if err == nil {
		p.point(fault.PublishSettled)
	}
	return w.end(err)
}

// renew extends a lease.
func (p *Publisher) renew(ctx context.Context, l store.Lease) (store.Lease, bool, error) {
	l, err := p.Ledger.RenewPublication(ctx, l)
	return l, false, err
}

// move makes the tags point at the content.
func (p *Publisher) move(ctx context.Context, w *work) error {
	if w.Pushed {
		for _, t := range w.tags {
			t.state = store.Published
		}
		return nil
	}
	for i, t := range w.tags {
		if i == 0 {
			w.begin(t)
			if err := w.prepare(ctx); err != nil {
				return err
			}
			if w.ledgered() {
				p.point(fault.PublishIndex)
			}
		}
		w.begin(t)
		err := w.send(ctx, t)
		if err != nil {
			return err
		}
		t.done(nil)
		if t.mode != Off {
			p.point(fault.PublishTagged)
		}
	}
	if err := w.check(ctx); err != nil {
		return err
	}
	if w.ledgered() {
		p.point(fault.PublishChecked)
	}
	return nil
}

// begin shows that a name is being pushed.
func (w *work) begin(t *tag) {
	if t.end == nil {
		t.end = w.observe.Step("pushing manifest for " + t.name)
	}
}

func (t *tag) done(err error) {
	if t.end != nil {
		t.end(err)
		t.end = func(error) {}
	}
}

// end closes the steps, and adds to the error what has been published in spite of it,
// or may have been, where the registry could not be asked any more.
func (w *work) end(err error) error {
	var done, taken, sent []string
	for _, t := range w.tags {
		t.done(err)
		switch {
		case t.state == store.Published:
			done = append(done, t.name)
		case t.state != store.Pending:
		case t.taken:
			taken = append(taken, t.name)
		case t.sent && !t.refused:
			sent = append(sent, t.name)
		}
	}
	if err == nil {
		return nil
	}
	err = Partly(err, done)
	err = adding(err, "taken by the registry before that, which could not be asked since", taken)
	return adding(err, "not known whether published", sent)
}

// prepare brings the content to its repositories, by digest, and looks what the tags
// are: at the same time, since neither moves a tag.
func (w *work) prepare(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(together)
	var repositories []string
	for _, t := range w.bound() {
		group.Go(func() error {
			found, err := w.Registry.resolve(ctx, t.target, w.Content, true)
			if status.Code(err) == codes.NotFound {
				return nil
			}
			t.before = found.Digest
			return err
		})
		if slices.Contains(repositories, t.repository()) {
			continue
		}
		repositories = append(repositories, t.repository())
		group.Go(func() error {
			whole := t.target
			whole.tag = ""
			return w.Registry.put(ctx, whole, w.Content)
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return w.strangers()
}

// strangers refuses, or warns, when the registry has something behind an immutable
// tag that the ledger does not know.
func (w *work) strangers() error {
	for _, t := range w.bound() {
		if !t.immutable || t.state == store.Published || t.before == "" || t.before == w.Content.Descriptor.Digest || w.warnings[t.reference()] != "" {
			continue
		}
		refusal := foreign(store.Binding{Repository: t.repository(), Tag: t.tag, Digest: w.Content.Descriptor.Digest.String()}, t.before.String())
		if t.mode == Enforce {
			return refusal
		}
		w.observe.Warn(aside(refusal))
	}
	return nil
}

// send moves one tag. Once it has begun, it goes on for a while when the client goes
// away: a request that is broken off may yet arrive.
func (w *work) send(ctx context.Context, t *tag) error {
	switch {
	case t.state == store.Published: // by an earlier try; it may have moved on since
		return nil
	case ctx.Err() != nil:
		return why("pushing "+t.name, ended(ctx))
	case t.mode == Off:
		if err := w.Registry.Push(ctx, t.name, t.byDigest, w.Content); err != nil {
			return err
		}
		t.state = store.Published
		return nil
	case t.before == w.Content.Descriptor.Digest:
		t.state = store.Published
		return nil
	}
	t.sent = true
	patient, done := outlive(ctx, w.grace)
	defer done()
	err := w.Registry.put(patient, t.target, w.Content)
	t.refused, t.taken = status.Code(err) == codes.PermissionDenied, err == nil
	return err
}

// put writes the content under a tag, or its digest.
func (r Registry) put(ctx context.Context, t target, c Content) error {
	e, err := r.endpoint(t.named, true)
	if err == nil {
		err = e.put(ctx, t.object(c), c)
	}
	return r.refused("failed to push", t.name, err)
}

// check reads the tags back.
func (w *work) check(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(together)
	for _, t := range w.bound() {
		if t.state == store.Published {
			continue
		}
		group.Go(func() error { return w.readBack(ctx, t) })
	}
	return group.Wait()
}

// readBack has the registry say that a tag is ours.
func (w *work) readBack(ctx context.Context, t *tag) error {
	pause := lookPause
	for look := 1; ; look++ {
		found, err := w.Registry.resolve(ctx, t.target, w.Content, true)
		if err == nil && found.Digest == w.Content.Descriptor.Digest {
			t.state = store.Published
			return nil
		}
		if err != nil && status.Code(err) != codes.NotFound {
			return err
		}
		if look == maxLooks {
			answer := string(found.Digest)
			if err != nil {
				answer = "nothing"
			}
			return status.Errorf(codes.DataLoss,
				"reading back %s: the registry took %s and answers %s: it is broken, or somebody else pushed the tag at the same moment",
				t.name, w.Content.Descriptor.Digest, answer)
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return why("reading back "+t.name, ended(ctx))
		case <-timer.C:
		}
		pause *= 2
	}
}

// settle tells the ledger what has become of the tags: those that may have been moved
// are looked at. One of which that cannot be found out stays pending, until the tag's
// next publication or Recover asks again.
func (p *Publisher) settle(ctx context.Context, w *work) {
	ctx, done := context.WithTimeout(ctx, settleLimit)
	defer done()
	states := map[int64]store.BindingState{}
	for _, t := range w.bound() {
		if t.state == store.Pending {
			t.state = w.truth(ctx, t)
		}
		switch known := states[t.binding]; {
		case t.state == store.Pending:
			p.Log.Warn("not known whether a tag was published", "publication", w.ID, "tag", t.reference())
		case known != store.Published: // of two names of one tag, the one that moved it counts
			states[t.binding] = t.state
		}
	}
	p.tellLedger(ctx, w.lease, states)
}

// truth is what has become of a tag.
func (w *work) truth(ctx context.Context, t *tag) store.BindingState {
	if !t.sent {
		return store.Undone
	}
	found, err := w.Registry.resolve(ctx, t.target, w.Content, true)
	switch {
	case err == nil && found.Digest == w.Content.Descriptor.Digest:
		return store.Published
	case err == nil, status.Code(err) == codes.NotFound, t.refused:
		return store.Undone
	}
	return store.Pending
}

// tellLedger settles bindings. When the ledger fails, the registry tells the same
// later.
func (p *Publisher) tellLedger(ctx context.Context, l store.Lease, states map[int64]store.BindingState) {
	if len(states) == 0 {
		return
	}
	defer p.tell()
	for pause := lookPause; ; pause *= 2 {
		err := p.Ledger.Settle(ctx, l, states)
		if err == nil {
			return
		}
		timer := time.NewTimer(pause)
		if !errors.Is(err, store.ErrLeaseLost) && pause < settleLimit/2 {
			select {
			case <-timer.C:
				continue
			case <-ctx.Done():
			}
		}
		timer.Stop()
		p.Log.Warn("settling a publication", "publication", l.Job, "error", fmt.Sprint(err))
		return
	}
}
