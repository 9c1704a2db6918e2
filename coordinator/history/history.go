package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/identity"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
)

// Workers is the way to the BuildKit of an attached worker. The error of one that
// is not attached has the gRPC code Unavailable or NotFound.
type Workers interface {
	BuildKit(ctx context.Context, worker string) (grpc.ClientConnInterface, error)
}

// Spans keeps spans of a trace from the call of Record on, which names the trace
// by its context, until stop is called; stop is nil when there is no trace.
type Spans interface {
	Record(ctx context.Context) (stop func() []tracetest.SpanStub)
}

// Options of a history.
type Options struct {
	Store    store.History
	Dir      string // for what is on its way to the store; nobody else's, and emptied
	Limits   Limits
	Disabled bool // new builds leave no record; those there are stay until they are too old
	Workers  Workers
	Spans    Spans // nil: no traces are kept
	Log      *slog.Logger
}

// History is the build history. Its methods may be called at any time until
// Close has returned.
type History struct {
	options Options
	records *records
	ctx     context.Context // never ends; for what nobody waits for

	mu         sync.Mutex
	running    map[string]*Recorder // from Begin until the record is visible
	fresh      map[string]*Recorder // from then until it is in the store
	finalizers map[string]*finalizer
	listeners  map[*listener]struct{}
	deleted    map[string]struct{} // deleted while somebody listens to just them
	closing    bool

	ending  chan struct{} // closed when closing
	work    sync.WaitGroup
	changes changes // one change of a stored record at a time
}

// Open opens the history in a store, which is to be closed after it.
func Open(ctx context.Context, options Options) (*History, error) {
	options.Limits = options.Limits.WithDefaults()
	if options.Log == nil {
		options.Log = slog.New(slog.DiscardHandler)
	}
	s, err := openRecords(ctx, options.Store, options.Dir, options.Log)
	if err != nil {
		return nil, err
	}
	h := &History{
		options: options, records: s, ctx: context.WithoutCancel(ctx), ending: make(chan struct{}),
		running: map[string]*Recorder{}, fresh: map[string]*Recorder{}, finalizers: map[string]*finalizer{},
		listeners: map[*listener]struct{}{}, deleted: map[string]struct{}{},
	}
	h.work.Go(h.collectGarbage) // ends with closing
	return h, nil
}

// Finish lets the records of builds that have been answered become complete, and
// ends every listener. Traces are written as they are by now.
func (h *History) Finish(ctx context.Context) error {
	h.mu.Lock()
	if !h.closing {
		h.closing = true
		close(h.ending)
	}
	listeners := slices.Collect(maps.Keys(h.listeners))
	h.mu.Unlock()
	done := make(chan struct{})
	go func() { // ends with the last record, which is bounded
		h.work.Wait()
		close(done)
	}()
	var err error
	select {
	case <-done:
	case <-ctx.Done():
		err = fmt.Errorf("writing the build history: %w", context.Cause(ctx))
	}
	for _, l := range listeners {
		l.end()
	}
	return err
}

// collectGarbage removes, every now and then, what the limits do not allow.
func (h *History) collectGarbage() {
	tick := time.NewTicker(gcInterval)
	defer tick.Stop()
	for {
		if err := errors.Join(h.enforceLimits(time.Now()), h.records.db.SweepBuildBlobs(h.ctx)); err != nil {
			h.options.Log.Error("cleaning up the build history", "error", err)
		}
		select {
		case <-tick.C:
		case <-h.ending:
			return
		}
	}
}

func (h *History) enforceLimits(now time.Time) error {
	all, err := h.records.sizes(h.ctx)
	if err != nil {
		return err
	}
	for _, ref := range h.options.Limits.overdue(all, now) {
		if _, err := h.remove(h.ctx, ref); err != nil {
			return err
		}
	}
	return nil
}

// Listen sends what there is of builds, and unless EarlyExit is set what happens
// from then on, until ctx ends or the history is closed.
func (h *History) Listen(ctx context.Context, req *controlapi.BuildHistoryRequest, send func(*controlapi.BuildHistoryEvent) error) error {
	if err := h.visible(ctx, req.GetRef()); err != nil {
		return err
	}
	l, active, fresh, err := h.listen(identity.FromContext(ctx), req.GetRef())
	if err != nil {
		return err
	}
	defer h.leave(l)
	for _, r := range active {
		if err := send(&controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_STARTED, Record: r}); err != nil {
			return err
		}
	}
	if !req.GetActiveOnly() {
		records, err := h.completed(ctx, req.GetRef(), fresh)
		if err != nil {
			return err
		}
		chosen, err := choose(records, req.GetFilter(), req.GetLimit())
		if err != nil {
			return err
		}
		for _, r := range chosen {
			if err := send(&controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: r}); err != nil {
				return err
			}
		}
	}
	if req.GetEarlyExit() {
		return nil
	}
	return l.follow(ctx, send)
}

// maySee tells whether the caller may see a build that runs or has a record: those of
// its own tenant, or all if it operates the farm.
func (h *History) maySee(ctx context.Context, ref string) (bool, error) {
	h.mu.Lock()
	r := cmp.Or(h.running[ref], h.fresh[ref])
	h.mu.Unlock()
	if r != nil {
		return identity.FromContext(ctx).MaySee(r.tenant), nil
	}
	_, e, err := h.records.get(ctx, ref)
	return identity.FromContext(ctx).MaySee(e.Tenant), err
}

// visible waits for the records of builds whose clients have their answer: a
// buildkitd would have written them before.
func (h *History) visible(ctx context.Context, ref string) error {
	h.mu.Lock()
	var awaited []*Recorder
	for _, r := range h.running {
		if (ref == "" || ref == r.ref) && r.wasAnswered() {
			awaited = append(awaited, r)
		}
	}
	h.mu.Unlock()
	for _, r := range awaited {
		if err := wait(ctx, r.visible); err != nil {
			return err
		}
	}
	return nil
}

// stored waits until such records are in the store, too.
func (h *History) stored(ctx context.Context, ref string) error {
	if err := h.visible(ctx, ref); err != nil {
		return err
	}
	h.mu.Lock()
	r := h.fresh[ref]
	h.mu.Unlock()
	if r == nil {
		return nil
	}
	return wait(ctx, r.stored)
}

func wait(ctx context.Context, done <-chan struct{}) error {
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// completed lists the records of ended builds that the caller may see, in the order of
// their references. What is not in the store yet is given.
func (h *History) completed(ctx context.Context, ref string, fresh map[string]*Recorder) ([]*controlapi.BuildHistoryRecord, error) {
	viewer := identity.FromContext(ctx)
	var records []*controlapi.BuildHistoryRecord
	if err := h.records.each(ctx, ref, func(r *controlapi.BuildHistoryRecord, tenant string) {
		if _, newer := fresh[r.GetRef()]; !newer && viewer.MaySee(tenant) {
			records = append(records, r)
		}
	}); err != nil {
		return nil, err
	}
	for _, r := range fresh {
		if viewer.MaySee(r.tenant) {
			records = append(records, r.record)
		}
	}
	slices.SortFunc(records, func(a, b *controlapi.BuildHistoryRecord) int { return strings.Compare(a.GetRef(), b.GetRef()) })
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.DeleteFunc(records, func(r *controlapi.BuildHistoryRecord) bool {
		_, gone := h.deleted[r.GetRef()]
		return gone
	}), nil
}

// Update pins a record, deletes it, or asks for its trace to be complete.
func (h *History) Update(ctx context.Context, req *controlapi.UpdateBuildHistoryRequest) error {
	if err := h.stored(ctx, req.GetRef()); err != nil {
		return err
	}
	if may, err := h.maySee(ctx, req.GetRef()); err != nil {
		return err
	} else if !may {
		return fmt.Errorf("updating the build record %s: %w", req.GetRef(), os.ErrNotExist)
	}
	switch {
	case req.GetDelete():
		_ = h.finalize(ctx, req.GetRef()) // its trace would bring it back
		existed, err := h.remove(ctx, req.GetRef())
		if err == nil && !existed {
			err = fmt.Errorf("removing the build record %s: %w", req.GetRef(), os.ErrNotExist)
		}
		return err
	case req.GetFinalize():
		return h.finalize(ctx, req.GetRef())
	}
	return h.change(ctx, req.GetRef(), func(r *controlapi.BuildHistoryRecord, _ *extent) { r.Pinned = req.GetPinned() })
}

// changes keeps the changes of one record apart. Those of others are not waited for, but for a few by chance: the store
// makes many durable at once.
type changes [64]sync.Mutex

func (c *changes) lock(ref string) (unlock func()) {
	l := &c[crc32.ChecksumIEEE([]byte(ref))%uint32(len(c))]
	l.Lock()
	return l.Unlock
}

// change rewrites a stored record and tells the listeners.
func (h *History) change(ctx context.Context, ref string, f func(*controlapi.BuildHistoryRecord, *extent)) error {
	defer h.changes.lock(ref)()
	record, tenant, err := h.records.change(ctx, ref, func(r *controlapi.BuildHistoryRecord, e *extent) {
		f(r, e)
		r.Generation++
	})
	if err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tell(tenant, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: record})
	return nil
}

// remove deletes a record, or hides it until the last who listens to it has
// left. It tells whether there was one.
func (h *History) remove(ctx context.Context, ref string) (bool, error) {
	defer h.changes.lock(ref)()
	h.mu.Lock()
	for l := range h.listeners {
		if l.ref == ref && ref != "" {
			h.deleted[ref] = struct{}{}
			h.mu.Unlock()
			return true, nil
		}
	}
	delete(h.deleted, ref)
	h.mu.Unlock()
	e, existed, err := h.records.remove(ctx, ref)
	if err != nil || !existed {
		return false, err
	}
	h.mu.Lock()
	h.tell(e.Tenant, &controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_DELETED, Record: &controlapi.BuildHistoryRecord{Ref: ref}})
	closing := h.closing
	h.mu.Unlock()
	if !closing && len(e.Legs) > 0 {
		h.work.Go(func() { h.removeLegs(h.ctx, e.Legs) }) // bounded by fetchTimeout
	}
	return true, nil
}

// Status passes the progress of an ended build to send. It is not known, without
// an error, if the build still runs or has no record.
func (h *History) Status(ctx context.Context, ref string, send func(*controlapi.StatusResponse) error) (known bool, err error) {
	record, tenant, err := h.find(ctx, ref)
	if err != nil || record == nil || !identity.FromContext(ctx).MaySee(tenant) {
		return false, err
	}
	if record.GetLogs() == nil {
		return true, nil
	}
	ra, err := h.records.blobs.ReaderAt(ctx, Descriptor(record.GetLogs()))
	if err != nil {
		return true, fmt.Errorf("reading the logs of build %s: %w", ref, err)
	}
	defer ra.Close()
	return true, replay(content.NewReader(ra), send)
}

// find returns the record of an ended build and whose it is; nil if there is none.
func (h *History) find(ctx context.Context, ref string) (record *controlapi.BuildHistoryRecord, tenant string, err error) {
	h.mu.Lock()
	_, running := h.running[ref]
	_, gone := h.deleted[ref]
	r := h.fresh[ref]
	h.mu.Unlock()
	switch {
	case running, gone:
		return nil, "", nil
	case r != nil:
		return r.record, r.tenant, nil
	}
	record, e, err := h.records.get(ctx, ref)
	return record, e.Tenant, err
}

// tell passes an event of a tenant's build to the listeners. h.mu is held.
func (h *History) tell(tenant string, e *controlapi.BuildHistoryEvent) {
	for l := range h.listeners {
		if l.viewer.MaySee(tenant) {
			l.tell(e)
		}
	}
}

// Descriptor is a record's descriptor in OCI's form. It is not checked.
func Descriptor(d *controlapi.Descriptor) ocispecs.Descriptor {
	return ocispecs.Descriptor{MediaType: d.GetMediaType(), Digest: digest.Digest(d.GetDigest()), Size: d.GetSize(), Annotations: d.GetAnnotations()}
}

func apiDescriptor(d ocispecs.Descriptor) *controlapi.Descriptor {
	return &controlapi.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: d.Annotations}
}
