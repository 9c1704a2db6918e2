package session

import "github.com/prometheus/client_golang/prometheus"

// Metrics tell how much of builds' contexts clients had to send.
type Metrics struct {
	client, spool prometheus.Counter
}

// NewMetrics registers the metrics of sessions.
func NewMetrics(r prometheus.Registerer) *Metrics {
	bytes := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "archfarm_context_bytes_total",
		Help: "Bytes of local files for workers, by who had them: the client, or the spool, because the client had sent them for another worker.",
	}, []string{"source"})
	r.MustRegister(bytes)
	return &Metrics{client: bytes.WithLabelValues("client"), spool: bytes.WithLabelValues("spool")}
}

func (m *Metrics) fromClient(n int) {
	if m != nil {
		m.client.Add(float64(n))
	}
}

func (m *Metrics) fromSpool(n int) {
	if m != nil {
		m.spool.Add(float64(n))
	}
}
