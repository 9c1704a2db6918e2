package job

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/archfarm/archfarm/coordinator/store"
)

// metrics are what an operator asks of jobs.
type metrics struct {
	jobs      *prometheus.GaugeVec
	running   prometheus.Gauge
	submitted *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	queue     prometheus.Histogram
	attempts  *prometheus.CounterVec
	watchers  prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		jobs:      prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "archfarm_jobs", Help: "Jobs in the store that have not ended, by state."}, []string{"state"}),
		running:   prometheus.NewGauge(prometheus.GaugeOpts{Name: "archfarm_jobs_running_here", Help: "Jobs that this coordinator has leases of."}),
		submitted: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_job_submissions_total", Help: "Calls of Submit, by gRPC code."}, []string{"code"}),
		duration:  prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "archfarm_job_duration_seconds", Help: "Time from a job's start to its end, by how it ended.", Buckets: prometheus.ExponentialBuckets(0.1, 2, 16)}, []string{"state"}),
		queue:     prometheus.NewHistogram(prometheus.HistogramOpts{Name: "archfarm_job_queue_seconds", Help: "Time from a job's submission to its start.", Buckets: prometheus.ExponentialBuckets(0.01, 4, 10)}),
		attempts:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_job_leg_attempts_total", Help: "Attempts of jobs' legs that ended, by platform and gRPC code."}, []string{"platform", "code"}),
		watchers:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "archfarm_job_watchers", Help: "Calls of Watch being served."}),
	}
	r.MustRegister(m.jobs, m.running, m.submitted, m.duration, m.queue, m.attempts, m.watchers)
	return m
}

func (m *metrics) count(jobs map[store.State]int) {
	for _, s := range []store.State{store.Queued, store.Running, store.Publishing} {
		m.jobs.WithLabelValues(string(s)).Set(float64(jobs[s]))
	}
}

func (m *metrics) started(j store.Job, retried bool) {
	if !retried && !j.Started.IsZero() {
		m.queue.Observe(j.Started.Sub(j.Created).Seconds())
	}
}

func (m *metrics) ended(s store.State, started, now time.Time) {
	if !started.IsZero() {
		m.duration.WithLabelValues(string(s)).Observe(now.Sub(started).Seconds())
	}
}
