// Package coordinator makes a fleet of native BuildKit workers look like one
// buildkitd. flow.go is the way of a build through it; the packages below hold
// one concept each.
package coordinator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/defaults"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	_ "github.com/moby/buildkit/util/grpcutil/encoding/proto" // the codec of buildkitd: without reflection, and sessions reuse their buffers
	"github.com/prometheus/client_golang/prometheus"
	tracev1 "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/authority"
	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/endpoint"
	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/history"
	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/session/spool"
	"github.com/archfarm/archfarm/coordinator/trace"
	"github.com/archfarm/archfarm/gossip"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

const (
	// maxStreams bounds the calls that one connection has open at a time: a build
	// needs about five.
	maxStreams = 1000
	// introduction is how long a client may take from its connection to the end of
	// the HTTP/2 handshake, which it does not have to wait for anything to do.
	introduction = 10 * time.Second
	// farewell is how long clients have for the last words of their streams once
	// every build has ended.
	farewell = 2 * time.Second
)

// coordinator is a running coordinator.
type coordinator struct {
	cfg     Config
	data    *dataDir
	log     *slog.Logger
	farm    *dispatch.Farm
	builds  *dispatch.Builds
	history *history.History
	traces  *trace.Traces
	metrics *prometheus.Registry
	health  *health.Server

	authority *authority.Authority
	door      *access.Door
	state     *state
	publisher *publish.Publisher
	jobs      *job.Service
	inside    *access.Inside
	// accompanied is 1 while a predecessor still runs.
	accompanied prometheus.Gauge
	rolling     sync.Mutex
	roll        string                // what is in rollFile
	bound       atomic.Pointer[Bound] // nil until all addresses are
}

// Run serves until ctx ends and the builds that run by then have ended too, or
// until Config.Stop is closed.
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.validate(); err != nil {
		return fmt.Errorf("starting the coordinator: %w", err)
	}
	data, err := openDataDir(cfg.DataDir, cfg.succeeds())
	if err != nil {
		return fmt.Errorf("starting the coordinator: %w", err)
	}
	c, err := assembleCoordinator(ctx, cfg, data)
	if err != nil {
		return errors.Join(fmt.Errorf("starting the coordinator: %w", err), data.close())
	}
	return errors.Join(c.run(ctx), c.closeHistory(ctx), c.closeJobs(), c.authority.Close(), data.close())
}

func assembleCoordinator(ctx context.Context, cfg Config, data *dataDir) (*coordinator, error) {
	sessions, err := session.NewRegistry()
	if err != nil {
		return nil, err
	}
	sessions.Limit = cfg.MaxSessions
	metrics := prometheus.NewRegistry()
	relays := session.NewRelays(sessions, cfg.Logger)
	relays.Metrics = session.NewMetrics(metrics)
	scheduler := schedule.New(nil)
	scheduler.Share = true // a build of more legs than slots would wait for itself
	workers := fleet.New(cfg.Logger, func(ws []*fleet.Worker) { scheduler.Update(asSchedule(ws, cfg.AllowEmulation)) })
	workers.Reported = func(w *fleet.Worker) {
		scheduler.UpdateWorker(asSchedule([]*fleet.Worker{w}, cfg.AllowEmulation)[0])
	}
	farm := &dispatch.Farm{
		Fleet: workers, Scheduler: scheduler, Sessions: sessions, Relays: relays,
		Publishing: publishing(cfg.Policy), Cache: cfg.Cache, Attempts: cfg.LegAttempts, FailoverWait: cfg.FailoverWait, Metrics: dispatch.NewMetrics(metrics), Log: cfg.Logger,
	}
	farm.Index = indexer(sessions)
	farm.Spool, err = export.NewSpool(filepath.Join(data.own, "spool"), cfg.SpoolMaxSize)
	if err != nil {
		return nil, err
	}
	if cfg.ContextSpoolMaxSize > 0 {
		sessions.Spool, err = spool.New(filepath.Join(data.own, "context-spool"), cfg.ContextSpoolMaxSize)
		if err != nil {
			return nil, err
		}
	}
	registerMetrics(metrics, farm, cfg.Version)
	running := dispatch.NewBuilds(farm)
	running.Limit = cfg.MaxBuilds
	accompanied := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "archfarm_predecessor_running", Help: "1 while the process that this one took over from lets its builds end.",
	})
	metrics.MustRegister(accompanied)
	c := &coordinator{cfg: cfg, data: data, accompanied: accompanied, log: cfg.Logger, farm: farm, builds: running, metrics: metrics, health: health.NewServer()}
	if err := c.openAuthority(workers); err != nil {
		return nil, err
	}
	if c.state, err = openState(ctx, cfg, data, metrics); err != nil {
		return nil, errors.Join(err, c.authority.Close())
	}
	if c.history, c.traces, err = openHistory(ctx, cfg, data, c.state.store, workers); err != nil {
		return nil, errors.Join(err, c.state.close(), c.authority.Close())
	}
	c.openJobs()
	c.expectWorkers()
	return c, nil
}

// asSchedule is the fleet as the scheduler sees it, given the pools whose workers may
// emulate.
func asSchedule(workers []*fleet.Worker, emulating []string) []schedule.Worker {
	out := make([]schedule.Worker, 0, len(workers))
	for _, w := range workers {
		report := w.Report()
		s := schedule.Worker{
			Name: w.Name, Platforms: w.Platforms, Reported: w.Reported(),
			Pool: w.Pool, Emulated: w.Emulated(), AllowEmulation: slices.Contains(emulating, w.Pool),
			Slots: int(report.GetSlots().GetTotal()), Used: int(report.GetSlots().GetUsed()), Reason: report.GetReason(),
		}
		switch report.GetState() {
		case archfarmv1.Worker_STATE_READY:
			s.State = schedule.Ready
		case archfarmv1.Worker_STATE_DRAINING:
			s.State = schedule.Draining
		case archfarmv1.Worker_STATE_CORDONED:
			s.State = schedule.Cordoned
		default:
			s.State = schedule.Unavailable
		}
		out = append(out, s)
	}
	return out
}

// run binds every address, serves, and on the way out stops the servers before
// what they depend on.
func (c *coordinator) run(ctx context.Context) error {
	doors, bound, err := c.bind(ctx)
	if err != nil {
		return err
	}
	defer closeAll(doors)
	server := c.server()
	calls, err := c.inside.Client()
	if err != nil {
		return err
	}
	defer calls.Close()
	web, webDoor, err := c.web(ctx, calls, &bound)
	if err != nil {
		return err
	}
	defer closeAll([]door{webDoor})
	if err := c.succeed(ctx); err != nil {
		return err
	}
	members, err := c.gossip(ctx, &bound) // last: who is found there must be able to serve
	if err != nil {
		return err
	}
	c.bound.Store(&bound)
	c.warnOfPlaintext()
	if c.cfg.Ready != nil {
		c.cfg.Ready(bound)
	}
	c.log.Info("coordinator serves", "listen", fmt.Sprint(bound.Listen), "http", bound.HTTP, "gossip", bound.Gossip, "version", c.cfg.Version)

	s := &service{coordinator: c, server: server, web: web, doors: append(doors, webDoor), members: members}
	return s.run(ctx)
}

// service is a coordinator whose addresses are bound.
type service struct {
	*coordinator
	server  *grpc.Server
	web     *http.Server
	doors   []door // that of web last
	members *gossip.Node
	retired atomic.Bool // a successor has the doors
}

func (s *service) run(ctx context.Context) error {
	serving, ctx := errgroup.WithContext(ctx) // a server that fails ends the others
	working, rest := context.WithCancel(context.WithoutCancel(ctx))
	serving.Go(func() error { s.work(working); return nil })
	for _, l := range s.listen() {
		serving.Go(func() error {
			err := s.server.Serve(l)
			if errors.Is(err, grpc.ErrServerStopped) || s.retired.Load() && errors.Is(err, net.ErrClosed) { // stopped before it had begun, or handed over
				return nil
			}
			return err
		})
	}
	serving.Go(func() error {
		if err := s.web.Serve(s.doors[len(s.doors)-1].secured); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	drained := s.last(ctx)
	rest()
	s.stop(ctx)
	s.leave(ctx)
	return errors.Join(serving.Wait(), drained)
}

// last returns when nothing runs here any more, or may: it lets builds end once ctx has
// ended, or a successor has taken over.
func (s *service) last(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return s.drain(ctx)
		case <-s.cfg.Upgrade:
		}
		err := s.handOver(ctx)
		switch {
		case err == nil:
			return s.outlive(ctx)
		case s.retired.Load(): // nobody listens any more
			return errors.Join(err, s.drain(ctx))
		}
		s.log.Error("handing over to a successor: this process goes on", "error", err)
	}
}

// drain lets running builds end, within bounds.
func (c *coordinator) drain(ctx context.Context) error {
	c.health.Shutdown()
	c.writeRoll()
	c.log.Info("draining: no new builds are taken", "timeout", c.cfg.DrainTimeout)
	ctx, cancel := c.patience(ctx)
	defer cancel()
	return c.drainAll(ctx)
}

// patience is for how long running builds may go on, from now.
func (c *coordinator) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), c.cfg.DrainTimeout) // ctx has ended: that is why
	go func() {                                                                        // ends with cancel
		select {
		case <-c.cfg.Stop:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// stop ends the servers: gently, as all builds are over, but not for long.
func (s *service) stop(ctx context.Context) {
	s.finishHistory(ctx) // while the workers are there
	s.farm.Fleet.Close()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell) // ctx has ended: that is why
	defer cancel()
	defer context.AfterFunc(ctx, s.server.Stop)()
	go func() { // ends with cancel
		select {
		case <-s.cfg.Stop:
			s.server.Stop()
		case <-ctx.Done():
		}
	}()
	s.server.GracefulStop()
	if err := s.web.Shutdown(ctx); err != nil {
		_ = s.web.Close()
	}
	s.log.Info("coordinator stopped")
}

// leave tells the other members that this one is gone.
func (s *service) leave(ctx context.Context) {
	if s.members == nil {
		return
	}
	if err := s.members.Close(context.WithoutCancel(ctx)); err != nil { // ctx has ended, the farewell has its own bound
		s.log.Warn("leaving gossip", "error", err)
	}
}

// door is a bound address.
type door struct {
	name    string // by which a successor inherits it
	address address.Address
	raw     net.Listener
	secured net.Listener     // HTTP's
	tunnels *tunnel.Listener // gRPC's, once it is open
}

// bind binds the addresses of the gRPC door, or takes them over from whoever has bound them.
func (c *coordinator) bind(ctx context.Context) ([]door, Bound, error) {
	var out []door
	var bound Bound
	for i, a := range c.administrated() {
		name := fmt.Sprintf("listen-%d", i)
		if a.Addr == c.door.AdminSocket {
			name = "admin"
		}
		l, inherited := c.cfg.Inherited.Take(name, a.Network, a.Addr)
		if !inherited {
			var err error
			if l, err = a.Listen(ctx); err != nil {
				closeAll(out)
				return nil, bound, fmt.Errorf("listening on %s: %w", a, err)
			}
		}
		actual := a
		if a.Network == "tcp" {
			actual = address.Address{Network: "tcp", Addr: l.Addr().String()}
		}
		if name == "admin" {
			bound.Admin = actual.Addr
		} else {
			bound.Listen = append(bound.Listen, actual)
		}
		out = append(out, door{name: name, address: a, raw: l})
	}
	return out, bound, nil
}

func closeAll(doors []door) {
	for _, d := range doors {
		if d.raw != nil {
			_ = d.raw.Close() // the server has closed it, unless it never served
		}
	}
}

// listen opens the gRPC doors. Each tells BuildKit's clients from agents' tunnels.
func (s *service) listen() []net.Listener {
	var out []net.Listener
	for i, d := range s.doors[:len(s.doors)-1] {
		s.doors[i].tunnels = tunnel.NewListener(d.raw, s.door.Security(d.address, s.cfg.Insecure), s.farm.Fleet.Accept, s.log)
		out = append(out, s.doors[i].tunnels)
	}
	return append(out, s.inside)
}

// server registers everything that is served on the gRPC door.
func (c *coordinator) server() *grpc.Server {
	server := grpc.NewServer(
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize), // as buildkitd,
		grpc.ChainUnaryInterceptor(c.unary, c.door.Unary), grpc.ChainStreamInterceptor(c.stream, c.door.Stream), grpc.StatsHandler(c.traces.StatsHandler()),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(introduction),
		grpc.Creds(c.door.Credentials(dispatch.Credentials(insecure.NewCredentials()))), // the listeners secure
		// A client or worker that vanished without a word is noticed within a minute.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 20 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	)
	control := &endpoint.Control{Solver: c, Builds: c.builds, Farm: c.farm, History: c.history}
	controlapi.RegisterControlServer(server, control)
	gwpb.RegisterLLBBridgeServer(server, &endpoint.Gateway{Builds: c.builds, Control: control})
	contentapi.RegisterContentServer(server, endpoint.Content(c.history))
	tracev1.RegisterTraceServiceServer(server, c.traces)
	archfarmv1.RegisterAgentServiceServer(server, c.farm.Fleet)
	archfarmv1.RegisterFleetServiceServer(server, &endpoint.Fleet{FleetServiceServer: c.farm.Fleet, Builds: c.builds, Scheduler: c.farm.Scheduler})
	archfarmv1.RegisterAuthorityServiceServer(server, c.authority)
	c.jobs.Register(server)
	healthpb.RegisterHealthServer(server, c.health)
	reflection.Register(server)
	return server
}
