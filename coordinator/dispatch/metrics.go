package dispatch

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what an operator asks of builds: how many, where their legs ran,
// how long they waited.
type Metrics struct {
	builds   *prometheus.CounterVec
	duration prometheus.Histogram
	running  prometheus.Gauge
	attempts *prometheus.CounterVec
	queue    *prometheus.HistogramVec
	emulated *prometheus.CounterVec
	killed   *prometheus.CounterVec
	rescues  *prometheus.CounterVec
}

// NewMetrics registers the metrics of builds.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		builds:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_builds_total", Help: "Builds that ended, by gRPC code."}, []string{"code"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "archfarm_build_duration_seconds", Help: "Time from a build's request to its answer.", Buckets: prometheus.ExponentialBuckets(0.1, 2, 16)}),
		running:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "archfarm_builds_running", Help: "Builds that have begun and not ended."}),
		attempts: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_leg_attempts_total", Help: "Attempts started, by platform and worker."}, []string{"platform", "worker"}),
		queue:    prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "archfarm_leg_queue_seconds", Help: "Time that legs waited for a worker.", Buckets: prometheus.ExponentialBuckets(0.001, 4, 10)}, []string{"platform"}),
	}
	m.emulated = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_legs_emulated_total", Help: "Legs that ran where their platform, or that of some of their steps, is emulated."}, []string{"platform", "worker"})
	m.killed = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_legs_killed_for_memory_total", Help: "Legs that failed while their worker's kernel killed processes for want of memory."}, []string{"worker"})
	m.rescues = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_leg_failovers_total", Help: "Legs whose worker was lost, by whether they were continued on another one."}, []string{"platform", "outcome"})
	r.MustRegister(m.rescues, m.builds, m.duration, m.running, m.attempts, m.queue, m.emulated, m.killed)
	return m
}

// Begun counts a build as running until the function it returns is called with
// the build's gRPC code.
func (m *Metrics) Begun() func(code string) {
	start := time.Now()
	m.running.Inc()
	return func(code string) {
		m.running.Dec()
		m.builds.WithLabelValues(code).Inc()
		m.duration.Observe(time.Since(start).Seconds())
	}
}

func (m *Metrics) attempt(platform, worker string) {
	m.attempts.WithLabelValues(platform, worker).Inc()
}

func (m *Metrics) waited(platform string, d time.Duration) {
	m.queue.WithLabelValues(platform).Observe(d.Seconds())
}

func (m *Metrics) emulates(platform, worker string) {
	m.emulated.WithLabelValues(platform, worker).Inc()
}

func (m *Metrics) rescued(platform string, err error) {
	outcome := "continued"
	if err != nil {
		outcome = "failed"
	}
	m.rescues.WithLabelValues(platform, outcome).Inc()
}

func (m *Metrics) ranOutOfMemory(worker string) { m.killed.WithLabelValues(worker).Inc() }
