package coordinator

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/archfarm/archfarm/coordinator/fleet"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// loadMetric is one reading that agents report of their machines.
type loadMetric struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
	// read tells nothing of what the machine does not.
	read     func(*archfarmv1.Load) (float64, bool)
	resource string // label of pressures; empty for the others
}

var pressureDesc = prometheus.NewDesc("archfarm_worker_pressure_ratio",
	"Share of the last 10 s in which some task of the worker's machine waited for the resource, 0 to 1 (PSI).", []string{"worker", "pool", "resource"}, nil)

var loadMetrics = []loadMetric{
	reading("archfarm_worker_cpu_busy_ratio", "Share of the CPUs of the worker's machine that was busy, 0 to 1.", func(l *archfarmv1.Load) (float64, bool) { return l.GetCpu(), l.Cpu != nil }),
	reading("archfarm_worker_memory_total_bytes", "Memory of the worker's machine.", known((*archfarmv1.Load).GetMemoryTotalBytes)),
	reading("archfarm_worker_memory_available_bytes", "Memory of the worker's machine that is available.", known((*archfarmv1.Load).GetMemoryAvailableBytes)),
	reading("archfarm_worker_disk_total_bytes", "Size of the disk with BuildKit's state.", known((*archfarmv1.Load).GetDiskTotalBytes)),
	reading("archfarm_worker_disk_free_bytes", "What is free of that disk.", func(l *archfarmv1.Load) (float64, bool) {
		return float64(l.GetDiskFreeBytes()), l.GetDiskTotalBytes() > 0
	}),
	reading("archfarm_worker_cache_bytes", "What BuildKit's cache takes of it.", func(l *archfarmv1.Load) (float64, bool) { return float64(l.GetCacheBytes()), l.CacheBytes != nil }),
	{
		desc: prometheus.NewDesc("archfarm_worker_oom_kills_total", "Processes that the kernel of the worker's machine has killed for want of memory.", []string{"worker", "pool"}, nil),
		kind: prometheus.CounterValue,
		read: func(l *archfarmv1.Load) (float64, bool) { return float64(l.GetOomKills()), l.OomKills != nil },
	},
	{pressureDesc, prometheus.GaugeValue, func(l *archfarmv1.Load) (float64, bool) { return l.GetCpuPressure(), l.CpuPressure != nil }, "cpu"},
	{pressureDesc, prometheus.GaugeValue, func(l *archfarmv1.Load) (float64, bool) { return l.GetMemoryPressure(), l.MemoryPressure != nil }, "memory"},
	{pressureDesc, prometheus.GaugeValue, func(l *archfarmv1.Load) (float64, bool) { return l.GetIoPressure(), l.IoPressure != nil }, "io"},
}

func reading(name, help string, read func(*archfarmv1.Load) (float64, bool)) loadMetric {
	return loadMetric{desc: prometheus.NewDesc(name, help, []string{"worker", "pool"}, nil), kind: prometheus.GaugeValue, read: read}
}

// known reads a figure that is 0 where it is not known.
func known(get func(*archfarmv1.Load) uint64) func(*archfarmv1.Load) (float64, bool) {
	return func(l *archfarmv1.Load) (float64, bool) { return float64(get(l)), get(l) > 0 }
}

// loadCollector passes on what the agents last reported of their machines.
type loadCollector struct{ fleet *fleet.Fleet }

// Describe implements prometheus.Collector.
func (loadCollector) Describe(out chan<- *prometheus.Desc) {
	for _, m := range loadMetrics {
		if m.resource == "" {
			out <- m.desc
		}
	}
	out <- pressureDesc
}

// Collect implements prometheus.Collector.
func (c loadCollector) Collect(out chan<- prometheus.Metric) {
	for _, w := range c.fleet.Workers() {
		load := w.Load()
		if load == nil {
			continue
		}
		for _, m := range loadMetrics {
			labels := []string{w.Name, w.Pool}
			if m.resource != "" {
				labels = append(labels, m.resource)
			}
			if v, told := m.read(load); told {
				out <- prometheus.MustNewConstMetric(m.desc, m.kind, v, labels...)
			}
		}
	}
}
