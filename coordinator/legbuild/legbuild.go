// Package legbuild builds the legs of jobs. Each is a build of one platform at the
// coordinator's own endpoint, by BuildKit's client and on behalf of who submitted
// the job: it is queued, placed, relayed and recorded as anybody's build is.
package legbuild

import (
	"context"
	"log/slog"
	"net"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/grpcerrors"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/jobprogress"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Dialer connects to the endpoint.
type Dialer func(ctx context.Context) (net.Conn, error)

// Options are what a Builder needs. Dial is required.
type Options struct {
	Dial Dialer
	// DialOptions are added to each connection's. Their interceptors find the identity
	// of who submitted the job in the context of every call (identity.NewContext).
	DialOptions []grpc.DialOption
	// Workers names the worker that runs the build with a reference, empty while there is
	// none. It is asked with every piece of progress. Nil: workers are not told.
	Workers func(ref string) string
	// Log may be nil.
	Log *slog.Logger
}

// Builder implements job.Builder. It is safe for concurrent use.
type Builder struct{ options Options }

var _ job.Builder = (*Builder)(nil)

// New returns a Builder.
func New(o Options) *Builder {
	if o.Workers == nil {
		o.Workers = func(string) string { return "" }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Builder{options: o}
}

// Build implements job.Builder. Every call of report comes from one goroutine, and
// none after Build has returned. What it reports, and errors, do not hold the leg's
// secrets and passwords, as far as they appear literally.
//
// Errors have the code of the build's own error, with these exceptions: Canceled
// and DeadlineExceeded only when ctx has ended, Unavailable also for registries that
// do not answer or answer 429 or 5xx, Aborted when the build was ended by something
// else than ctx.
func (b *Builder) Build(ctx context.Context, leg job.Leg, report job.Report) (ocispecs.Descriptor, error) {
	hide := newRedactor(leg)
	pushed, err := b.build(ctx, leg, newReporter(leg, hide, b.options.Workers, report))
	if err != nil {
		err = failure(ctx, err, hide)
		b.options.Log.Debug("a leg's build failed", "job", leg.Job, "platform", leg.Platform, "attempt", leg.Attempt, "ref", leg.Ref, "error", err)
	}
	return pushed, err
}

func (b *Builder) build(ctx context.Context, leg job.Leg, progress *reporter) (ocispecs.Descriptor, error) {
	opt, err := solveOpt(leg)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	c, err := b.connect(ctx, leg.Who)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	defer c.Close()

	statuses, told := make(chan *client.SolveStatus), make(chan struct{})
	go func() { // ends when Solve, which closes statuses, has returned
		defer close(told)
		for s := range statuses {
			for _, r := range s.Marshal() {
				progress.report(jobprogress.FromStatus(r))
			}
		}
	}()
	resp, err := c.Solve(ctx, nil, opt, statuses)
	<-told
	progress.end(err)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	return pushed(leg, resp.ExporterResponse)
}

// connect returns a connection all of whose calls are who's. BuildKit's client makes
// some with a context of its own, so that the identity is the connection's.
func (b *Builder) connect(ctx context.Context, who identity.Identity) (*client.Client, error) {
	opts := []client.ClientOpt{
		client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return b.options.Dial(ctx) }),
		client.WithTracerProvider(nil), // not the one of the job's own span, if it has one
		client.WithGRPCDialOption(grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(identity.NewContext(ctx, who), method, req, reply, conn, opts...)
		})),
		client.WithGRPCDialOption(grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return open(identity.NewContext(ctx, who), desc, conn, method, opts...)
		})),
	}
	for _, o := range b.options.DialOptions {
		opts = append(opts, client.WithGRPCDialOption(o))
	}
	return client.New(ctx, "tcp://archfarm", opts...) // a name for the sake of :authority
}

// reporter makes of a build's progress that of a job's leg.
type reporter struct {
	leg     job.Leg
	hide    *redactor
	own     *ownership
	workers func(ref string) string
	worker  string
	tell    job.Report
}

func newReporter(leg job.Leg, hide *redactor, workers func(string) string, tell job.Report) *reporter {
	return &reporter{leg: leg, hide: hide, own: newOwnership(leg), workers: workers, tell: tell}
}

// report takes ownership of p.
func (r *reporter) report(p *archfarmv1.Progress) {
	r.hide.progress(p)
	r.own.take(p)
	worker := r.workers(r.leg.Ref)
	if worker == r.worker {
		worker = "" // is known
	} else if worker != "" {
		r.worker = worker
	}
	r.send(worker, p)
}

func (r *reporter) send(worker string, p *archfarmv1.Progress) {
	if len(p.GetVertexes())+len(p.GetStatuses())+len(p.GetLogs())+len(p.GetWarnings()) == 0 {
		if p = nil; worker == "" {
			return
		}
	}
	if p != nil {
		p.Platform, p.Attempt = r.leg.Platform, int32(r.leg.Attempt) //nolint:gosec // attempts are few
	}
	r.tell(worker, p)
}

// end reports what has been held back, and completes with an error the steps that the
// build left open.
func (r *reporter) end(err error) {
	rest := r.hide.rest()
	r.own.take(rest)
	if err != nil {
		rest.Vertexes = r.own.abandon(reason(err))
	}
	r.send("", rest)
}

// reason is what is said of steps that were not finished.
func reason(err error) string {
	if grpcerrors.Code(err) == codes.Canceled {
		return "cancelled"
	}
	return "not finished: the build failed"
}
