package job

import (
	"cmp"
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Publisher publishes what jobs built: a *publish.Publisher.
type Publisher interface {
	Publish(ctx context.Context, r publish.Request, observe publish.Observer) error
	Resume(ctx context.Context, job, id string, registry publish.Registry, observe publish.Observer) (done bool, err error)
}

// Contexts are those that clients upload: a *contexts.Contexts.
type Contexts interface {
	// Open returns a folder with a context's files, to be read until release.
	Open(ctx context.Context, tenant, digest string) (dir string, release func(), err error)
	// Exists returns store.ErrNotFound for one that is not there, and keeps one that is.
	Exists(ctx context.Context, tenant, digest string) error
	FindMissing(ctx context.Context, req *archfarmv1.FindMissingRequest) (*archfarmv1.FindMissingResponse, error)
	UploadContext(stream grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) error
}

// Key encrypts what is secret at rest: a *seal.Key.
type Key interface {
	Seal(plain, context []byte) ([]byte, error)
	Unseal(sealed, context []byte) ([]byte, error)
}

// Options of the Service. Fields without a default are required.
type Options struct {
	Store     store.Store
	Builder   Builder
	Publisher Publisher
	Contexts  Contexts
	Key       Key
	// Resolve finds the commit of a git context.
	Resolve Resolve
	// Runs tells whether a worker is attached that builds a platform, in one of the pools
	// (none: any). Nil: one always is.
	Runs func(platform string, pools []string) bool
	// WorkerWait is how long a leg waits for such a worker before it is tried all the
	// same; 5 minutes when zero. Workers come back some time after their coordinator,
	// and autoscalers start them when something waits.
	WorkerWait time.Duration
	// Owner names this coordinator in leases and to users; unique among those that
	// share the Store.
	Owner string

	// MaxJobs run here at a time; 100 when zero. Their legs queue for workers.
	MaxJobs int
	// Lease of a job, 15 s when zero: how long it stands still when its coordinator dies.
	Lease time.Duration
	// Poll is how often jobs to run and events are looked for; 2 s when zero. Hints
	// of the Store come first.
	Poll time.Duration
	// Timeout of jobs that name none; 2 hours when zero.
	Timeout time.Duration
	// MaxAttempts of legs of jobs that name none; 3 when zero.
	MaxAttempts int
	// Backoff before a leg's second attempt, doubled before each further one; 1 s
	// when zero.
	Backoff time.Duration
	// Retention is how long ended jobs are kept; 30 days when zero.
	Retention time.Duration
	// MaxWatchers are served at a time; 10,000 when zero.
	MaxWatchers int

	Log     *slog.Logger          // nil: none
	Metrics prometheus.Registerer // nil: none
}

func (o Options) withDefaults() Options {
	o.MaxJobs = cmp.Or(o.MaxJobs, 100)
	o.Lease = cmp.Or(o.Lease, 15*time.Second)
	o.Poll = cmp.Or(o.Poll, 2*time.Second)
	o.Timeout = cmp.Or(o.Timeout, 2*time.Hour)
	o.MaxAttempts = cmp.Or(o.MaxAttempts, 3)
	o.WorkerWait = cmp.Or(o.WorkerWait, 5*time.Minute)
	o.Backoff = cmp.Or(o.Backoff, time.Second)
	o.Retention = cmp.Or(o.Retention, 30*24*time.Hour)
	o.MaxWatchers = cmp.Or(o.MaxWatchers, 10_000)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Metrics == nil {
		o.Metrics = prometheus.NewRegistry()
	}
	return o
}

// Service is the second door: what clients call, and what runs their jobs.
type Service struct {
	server *server
	runner *runner
	feed   *feed
	keeper *keeper
}

// New makes a Service. It serves calls at once, and runs jobs while Run does.
func New(o Options) *Service {
	o = o.withDefaults()
	m := newMetrics(o.Metrics)
	f := newFeed(o)
	r := newRunner(o, f.wake, m)
	return &Service{
		server: newServer(o, f, r.cancelled, m),
		runner: r, feed: f, keeper: &keeper{o, m},
	}
}

// Register makes a server answer for jobs, tags and secrets.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	archfarmv1.RegisterJobServiceServer(r, s.server)
	archfarmv1.RegisterTagServiceServer(r, tags{server: s.server})
	archfarmv1.RegisterSecretServiceServer(r, secrets{server: s.server})
}

// Run runs jobs until ctx ends. Then it stops the attempts under way, gives the
// leases back, ends all Watch calls with Unavailable, and returns.
func (s *Service) Run(ctx context.Context) {
	var g errgroup.Group
	g.Go(func() error { s.runner.run(ctx); return nil })
	g.Go(func() error { s.feed.run(ctx); return nil })
	g.Go(func() error { s.keeper.run(ctx); return nil })
	_ = g.Wait() // none fails
}

// Drain lets attempts and publications under way end, begins no others, and gives
// the jobs that need more back; it returns once none runs here, or ctx ends. Run goes
// on, for those who watch.
func (s *Service) Drain(ctx context.Context) error { return s.runner.drain(ctx) }
