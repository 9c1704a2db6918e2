// Package publish makes references point at what was built: once, last, when
// every leg of a build has succeeded. Both doors end here: builds of the endpoint,
// which push with their client's credentials, and submitted jobs.
//
// A tag is bound to a digest in the ledger before it moves, by which only one
// publication at a time works on it; it is read back and the ledger told how it
// ended. What a crash leaves between the two is finished (jobs), or found out by
// asking the registry (builds).
package publish

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
	"github.com/archfarm/archfarm/manifest"
)

// Content is a manifest or an index whose parts the registry holds already.
type Content struct {
	Descriptor ocispecs.Descriptor
	Blob       []byte
}

// Request is a publication.
type Request struct {
	// ID of the publication, unique; empty: a new one. A job that publishes again
	// after it crashed uses the same one.
	ID string
	// Tenant whose build it is; Job or Build, which one.
	Tenant, Job, Build string
	Content            Content
	// Names to publish, in this order: references with a tag ("latest" when there is
	// none), or with the content's digest. ByDigest: they are repositories.
	Names    []string
	ByDigest bool
	Source   store.Source
	// Pushed: somebody else has moved the tags already, and the ledger is only told.
	Pushed bool
	// OverwriteNewer lets an older commit replace a newer one behind a mutable tag.
	OverwriteNewer bool
	Registry       Registry
}

func (r Request) door() Door {
	if r.Job != "" {
		return Jobs
	}
	return Endpoint
}

// Candidate is what a Gate decides on: nothing of it has a name yet, but all of it
// is in the registry or in Content.
type Candidate struct {
	Content            Content
	Repositories       []string // normalized, without tags
	Names              []string // as the client spelled them
	Source             store.Source
	Tenant, Job, Build string
	Registry           Registry // to read the content's parts
}

// Gate may forbid a publication. Its error is the client's, and should carry a gRPC
// code; any other becomes FailedPrecondition.
type Gate interface {
	Check(ctx context.Context, c Candidate) error
}

// Observer is told how a publication goes on, by one call after the other, and by
// none once it is over.
type Observer interface {
	// Step begins something that takes its time, as "pushing manifest for NAME"; end,
	// which is called once, tells how it went.
	Step(text string) (end func(error))
	// Warn tells what the policy would rather have forbidden.
	Warn(text string)
}

// Config of a Publisher.
type Config struct {
	Ledger store.Ledger
	Policy Policy
	Gates  []Gate
	// Owner names this process in leases; unique among those that share the Ledger.
	Owner string
	// Lease of a publication, 15 s when zero: how long a tag stays blocked when the
	// process dies on the way.
	Lease time.Duration
	// Poll is how often a publication that waits for another asks for it; 250 ms when
	// zero. Those of the same process wake it.
	Poll    time.Duration
	Log     *slog.Logger          // nil: none
	Metrics prometheus.Registerer // nil: none
}

// Publisher publishes. Close it.
type Publisher struct {
	Config
	metrics  *metrics
	settling sync.WaitGroup
	point    func(string) // passes a fault point

	mu      sync.Mutex
	settled chan struct{} // closed, and replaced, whenever a publication has been settled
}

// NewPublisher returns a Publisher.
func NewPublisher(c Config) *Publisher {
	c.Lease, c.Poll = cmp.Or(c.Lease, 15*time.Second), cmp.Or(c.Poll, 250*time.Millisecond)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Publisher{Config: c, metrics: newMetrics(c.Metrics), point: fault.Point, settled: make(chan struct{})}
}

// Close waits until the ledger has been told of every publication that has returned;
// that takes at most settleLimit. No other method may be called any more.
func (p *Publisher) Close() { p.settling.Wait() }

// Publish makes the names point at the content, or fails; then the error tells which
// of them do. FailedPrecondition when the tag policy or a gate is against it: the
// error names both digests, and when and by what the present one was bound. DataLoss
// when the registry says it has something else than it was given; Aborted when the
// ledger could not be told in time that the publication goes on; otherwise codes as
// Registry.Push has them. It waits, as long as ctx lasts, for other publications of
// the same tags.
func (p *Publisher) Publish(ctx context.Context, r Request, observe Observer) (err error) {
	counted := p.metrics.began(r.door())
	defer func() { counted(err) }()
	w, err := p.plan(r, observe)
	if err != nil {
		return err
	}
	if err := p.gated(ctx, w); err != nil {
		return err
	}
	p.point(fault.PublishGated)
	if w.ledgered() {
		if err := p.bind(ctx, w); err != nil {
			return err
		}
		p.point(fault.PublishBound)
	}
	return p.finish(ctx, w)
}

// work is a publication under way.
type work struct {
	Request
	observe Observer
	tags    []*tag // one for each of Names
	lease   store.Lease
	grace   time.Duration

	mu       sync.Mutex
	warnings map[string]string // by reference; the ledger's last word counts
}

// tag is a name on its way.
type tag struct {
	target
	mode      Mode // Off: the ledger has no part in it
	immutable bool
	binding   int64              // its ID; several names may be one tag
	end       func(error)        // of its step, once that has begun
	before    digest.Digest      // what the registry had, empty for nothing
	sent      bool               // a request that may have moved it has been sent
	refused   bool               // and the registry has refused it
	taken     bool               // or taken it, by its own word
	state     store.BindingState // Published once it is known to be ours
}

func (t *tag) reference() string { return t.repository() + ":" + t.tag }

// plan reads the names, and what the policy says of them.
func (p *Publisher) plan(r Request, observe Observer) (*work, error) {
	d := r.Content.Descriptor
	if got := digest.FromBytes(r.Content.Blob); got != d.Digest || int64(len(r.Content.Blob)) != d.Size || d.Size > manifest.MaxBlob {
		return nil, status.Errorf(codes.InvalidArgument, "publishing %s: its %d bytes are %s, at most %d bytes are possible", d.Digest, len(r.Content.Blob), got, manifest.MaxBlob)
	}
	w := &work{Request: r, observe: observe, warnings: map[string]string{}, grace: min(grace, p.Lease/5)}
	if w.ID == "" {
		w.ID = uuid.NewString()
	}
	if observe == nil {
		w.observe = silent{}
	}
	for _, name := range r.Names {
		read, err := readTarget(name, r.ByDigest, d.Digest)
		if err != nil {
			return nil, err
		}
		t := &tag{target: read, mode: Off, state: store.Pending}
		if t.tag != "" {
			var mutable []string
			t.mode, mutable = p.Policy.For(r.door(), t.repository())
			t.immutable = !MayMove(mutable, t.tag)
		}
		w.tags = append(w.tags, t)
	}
	return w, nil
}

type silent struct{}

func (silent) Step(string) func(error) { return func(error) {} }
func (silent) Warn(string)             {}

// bound are the tags that the ledger has a part in.
func (w *work) bound() (tags []*tag) {
	for _, t := range w.tags {
		if t.mode != Off {
			tags = append(tags, t)
		}
	}
	return tags
}

func (w *work) ledgered() bool { return len(w.bound()) > 0 }

func (p *Publisher) gated(ctx context.Context, w *work) error {
	c := Candidate{
		Content: w.Content, Names: w.Names, Source: w.Source, Tenant: w.Tenant, Job: w.Job, Build: w.Build, Registry: w.Registry,
	}
	seen := map[string]bool{}
	for _, t := range w.tags {
		if !seen[t.repository()] {
			c.Repositories = append(c.Repositories, t.repository())
		}
		seen[t.repository()] = true
	}
	for _, g := range p.Gates {
		err := g.Check(ctx, c)
		if code := status.Code(err); err != nil && code == codes.Unknown && ctx.Err() == nil {
			return status.Errorf(codes.FailedPrecondition, "publishing %s: %v", w.Content.Descriptor.Digest, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Partly adds to the error of a push which names had been published before it.
func Partly(err error, done []string) error {
	return adding(err, "published before that", done)
}

// adding adds to the error what is to be said of those names, if there are any.
func adding(err error, what string, names []string) error {
	if len(names) == 0 {
		return err
	}
	return status.Errorf(status.Code(err), "%s; %s: %s", status.Convert(err).Message(), what, strings.Join(names, ", "))
}

// why gives an error of a context, or of the ledger, a code.
func why(doing string, err error) error {
	if s, ok := status.FromError(err); ok {
		return status.Error(s.Code(), doing+": "+s.Message())
	}
	code := codes.Unavailable // the ledger's own: it may be there again
	switch {
	case errors.Is(err, errLost):
		code = codes.Aborted
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, store.ErrCorrupt):
		code = codes.DataLoss
	}
	return status.Error(code, fmt.Sprintf("%s: %v", doing, err))
}
