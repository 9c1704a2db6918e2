package coordinator

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/pprof"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/schedule"
)

// web serves health and metrics. It returns an idle server when no address is configured.
func (c *coordinator) web(ctx context.Context, bound *Bound) (*http.Server, net.Listener, error) {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if c.builds.Draining() {
			http.Error(w, "draining", http.StatusServiceUnavailable)
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
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	if c.cfg.HTTP == "" {
		return server, closedListener{}, nil
	}
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", c.cfg.HTTP)
	if err != nil {
		return nil, nil, fmt.Errorf("listening on %s for health and metrics: %w", c.cfg.HTTP, err)
	}
	bound.HTTP = l.Addr().String()
	return server, l, nil
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
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), info, &fleetCollector{farm})
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "archfarm_sessions", Help: "Client sessions that are open."},
		func() float64 { return float64(farm.Sessions.Len()) }))
}

var (
	workersDesc = prometheus.NewDesc("archfarm_worker_state", "1 for the state that an attached worker is in.", []string{"worker", "platform", "state"}, nil)
	queueDesc   = prometheus.NewDesc("archfarm_queue_depth", "Legs that wait for a worker.", []string{"platform"}, nil)
	slotsDesc   = prometheus.NewDesc("archfarm_worker_slots", "Slots of an attached worker, free and used.", []string{"worker", "platform", "state"}, nil)
)

// fleetCollector reads the fleet when it is asked: workers come and go.
type fleetCollector struct{ farm *dispatch.Farm }

func (*fleetCollector) Describe(out chan<- *prometheus.Desc) {
	out <- workersDesc
	out <- slotsDesc
	out <- queueDesc
}

func (c *fleetCollector) Collect(out chan<- prometheus.Metric) {
	for platform, legs := range c.farm.Scheduler.Waiting() {
		out <- prometheus.MustNewConstMetric(queueDesc, prometheus.GaugeValue, float64(legs), platform)
	}
	for _, w := range c.farm.Scheduler.Snapshot() {
		platform := schedule.Primary(w)
		out <- prometheus.MustNewConstMetric(workersDesc, prometheus.GaugeValue, 1, w.Name, platform, w.State.String())
		out <- prometheus.MustNewConstMetric(slotsDesc, prometheus.GaugeValue, float64(w.Used), w.Name, platform, "used")
		out <- prometheus.MustNewConstMetric(slotsDesc, prometheus.GaugeValue, float64(max(0, w.Slots-w.Used)), w.Name, platform, "free")
	}
}
