package coordinator

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator/access"
	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/httpapi"
	"github.com/archfarm/archfarm/coordinator/schedule"
)

// web serves health and metrics to everybody, and jobs to those who may call them,
// by the connection that it is given. It returns an idle server when no address is
// configured.
func (c *coordinator) web(ctx context.Context, calls grpc.ClientConnInterface, bound *Bound) (*http.Server, door, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if c.builds.Draining() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
			return
		}
		if silent := c.state.silent(); silent > 0 { // why is in the log: this is for everybody
			http.Error(w, fmt.Sprintf("the store has not answered for %s", silent), http.StatusServiceUnavailable)
			return
		}
		_, _ = io.WriteString(w, "ok\n")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.metrics, promhttp.HandlerOpts{}))
	if c.cfg.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute,
		Protocols: access.HTTPProtocols(), ConnContext: c.door.ConnContext,
	}
	if c.cfg.HTTP == "" {
		return server, door{secured: closedListener{}}, nil
	}
	l, inherited := c.cfg.Inherited.Take("http", "tcp", c.cfg.HTTP)
	if !inherited {
		var config net.ListenConfig
		var err error
		if l, err = config.Listen(ctx, "tcp", c.cfg.HTTP); err != nil {
			return nil, door{}, fmt.Errorf("listening on %s for health, metrics and jobs: %w", c.cfg.HTTP, err)
		}
	}
	api, err := httpapi.New(ctx, calls, httpapi.Options{Metrics: c.metrics, MaxArchive: c.cfg.MaxContext})
	if err != nil {
		_ = l.Close()
		return nil, door{}, fmt.Errorf("serving jobs over HTTP: %w", err)
	}
	mux.Handle("/v1/", c.door.Identified(api))
	bound.HTTP = l.Addr().String()
	actual := address.Address{Network: "tcp", Addr: bound.HTTP}
	return server, door{name: "http", address: actual, raw: l, secured: c.door.HTTP(l, actual, c.cfg.Insecure)}, nil
}

// closedListener serves nobody.
type closedListener struct{}

func (closedListener) Accept() (net.Conn, error) { return nil, http.ErrServerClosed }
func (closedListener) Close() error              { return nil }
func (closedListener) Addr() net.Addr            { return &net.TCPAddr{} }

func registerMetrics(r *prometheus.Registry, farm *dispatch.Farm, version string) {
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "archfarm_build_info", Help: "The program's version.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	info.Set(1)
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), info, &fleetCollector{farm}, loadCollector{farm.Fleet})
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "archfarm_sessions", Help: "Client sessions that are open."},
		func() float64 { return float64(farm.Sessions.Len()) }))
	if contexts := farm.Sessions.Spool; contexts != nil {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "archfarm_context_spool_bytes", Help: "Bytes of disk that files of local contexts take which several workers want."},
			func() float64 { return float64(contexts.Used()) }))
	}
}

var (
	workersDesc = prometheus.NewDesc("archfarm_worker_state", "1 for the state that an attached worker is in.", []string{"worker", "platform", "pool", "state"}, nil)
	workerDesc  = prometheus.NewDesc("archfarm_worker_slots", "Slots of an attached worker, free and used.", []string{"worker", "platform", "pool", "state"}, nil)
	queueDesc   = prometheus.NewDesc("archfarm_queue_depth", `Legs that wait for a worker, by what they ask for; "any" pool: they may run in all.`, []string{"platform", "pool"}, nil)
	slotsDesc   = prometheus.NewDesc("archfarm_slots", "Slots of the attached workers: used, free, or not to be had although nothing runs in them.", []string{"platform", "pool", "state"}, nil)
)

// anyPool is the pool of legs that may run in all.
const anyPool = "any"

// slotStates are what a slot is, and all that it is counted as.
var slotStates = []string{"free", "used", "draining", "unavailable", "cordoned"}

// fleetCollector reads the fleet when it is asked: workers come and go.
type fleetCollector struct{ farm *dispatch.Farm }

func (*fleetCollector) Describe(out chan<- *prometheus.Desc) {
	out <- workersDesc
	out <- workerDesc
	out <- slotsDesc
	out <- queueDesc
}

func (c *fleetCollector) Collect(out chan<- prometheus.Metric) {
	workers := c.farm.Scheduler.Snapshot()
	for _, w := range workers {
		platform := schedule.Primary(w)
		out <- gauge(workersDesc, 1, w.Name, platform, w.Pool, w.State.String())
		out <- gauge(workerDesc, w.Used, w.Name, platform, w.Pool, "used")
		out <- gauge(workerDesc, max(0, w.Slots-w.Used), w.Name, platform, w.Pool, "free")
	}
	for at, legs := range queueDepths(workers, c.farm.Scheduler.Waiting()) {
		out <- gauge(queueDesc, legs, at.Platform, at.Pool)
	}
	for at, states := range slotCounts(workers) {
		for _, state := range slotStates {
			out <- gauge(slotsDesc, states[state], at.Platform, at.Pool, state)
		}
	}
}

func gauge(desc *prometheus.Desc, v int, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(v), labels...)
}

// queueDepths adds to what waits a zero for every platform in every pool that the farm
// has workers of: to an autoscaler, no figure is not the same as 0.
func queueDepths(workers []schedule.Worker, waiting map[schedule.Place]int) map[schedule.Place]int {
	out := map[schedule.Place]int{}
	for _, w := range workers {
		for _, platform := range schedule.Base(w) {
			out[schedule.Place{Platform: platform, Pool: w.Pool}] = 0
			out[schedule.Place{Platform: platform, Pool: anyPool}] = 0
		}
	}
	maps.Copy(out, waiting)
	return out
}

// slotCounts counts the slots of each kind of worker, known by its best platform, in
// each pool, by their state.
func slotCounts(workers []schedule.Worker) map[schedule.Place]map[string]int {
	out := map[schedule.Place]map[string]int{}
	for _, w := range workers {
		at := schedule.Place{Platform: schedule.Primary(w), Pool: w.Pool}
		if out[at] == nil {
			out[at] = map[string]int{}
		}
		rest := w.State.String()
		if w.State == schedule.Ready {
			rest = "free"
		}
		used := min(w.Used, w.Slots)
		out[at]["used"] += used
		out[at][rest] += w.Slots - used
	}
	return out
}
