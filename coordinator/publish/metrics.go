package publish

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type metrics struct {
	ended     *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	recovered *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		ended:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_publications_total", Help: "Publications that ended, by door (endpoint, job) and outcome (published, refused, cancelled, failed)."}, []string{"door", "outcome"}),
		duration:  prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "archfarm_publication_seconds", Help: "Time from a publication's gates to its end.", Buckets: prometheus.ExponentialBuckets(0.002, 2.5, 12)}, []string{"door"}),
		recovered: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "archfarm_publication_tags_recovered_total", Help: "Tags whose publication was left by a crash, by what the registry told (published, undone, unknown)."}, []string{"outcome"}),
	}
	if r != nil {
		r.MustRegister(m.ended, m.duration, m.recovered)
	}
	return m
}

// began starts the clock until the function it returns is called.
func (m *metrics) began(door Door) func(error) {
	start := time.Now()
	return func(err error) {
		m.ended.WithLabelValues(string(door), outcome(err)).Inc()
		m.duration.WithLabelValues(string(door)).Observe(time.Since(start).Seconds())
	}
}

func outcome(err error) string {
	switch status.Code(err) {
	case codes.OK:
		return "published"
	case codes.FailedPrecondition:
		return "refused"
	case codes.Canceled:
		return "cancelled"
	}
	return "failed"
}

func (m *metrics) found(r result) {
	m.recovered.WithLabelValues("published").Add(float64(r.published))
	m.recovered.WithLabelValues("undone").Add(float64(r.undone))
	m.recovered.WithLabelValues("unknown").Add(float64(r.unknown))
}
