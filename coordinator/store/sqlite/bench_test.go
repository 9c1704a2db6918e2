package sqlite

import (
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
	"github.com/archfarm/archfarm/coordinator/store/storetest"
)

func BenchmarkStore(b *testing.B) {
	storetest.Bench(b, func(t testing.TB) store.Store { return openTest(t, b.TempDir()) })
}

// BenchmarkHistory is of lists over a million jobs, and of how long a start takes with them.
func BenchmarkHistory(b *testing.B) {
	dir := b.TempDir()
	s := openTest(b, dir)
	for first := 1; first <= storetest.History; first += 100_000 {
		if err := s.engine.Write(b.Context(), func(tx sqlstore.Tx) error { return history(tx, first, first+100_000) }); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("List", func(b *testing.B) { storetest.BenchList(b, s) })
	b.Run("Open", func(b *testing.B) {
		for b.Loop() {
			if err := s.Close(); err != nil {
				b.Fatal(err)
			}
			began := time.Now()
			s = openTest(b, dir)
			b.ReportMetric(float64(time.Since(began).Milliseconds()), "open-ms")
		}
	})
}

func history(tx sqlstore.Tx, first, last int) error {
	const numbers = "WITH RECURSIVE numbers (i) AS (SELECT $1 UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < $2) "
	const state = "CASE i % 100 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END"
	_, err := tx.Exec(numbers+`INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, context, tags, repositories, priority, state,
			last_seq, created, started, ended, legs)
		SELECT printf('job-%09d', i), i, 'tenant-' || (i % 10), 'client ci', '', randomblob(600), 'sha256:' || i, '', '["registry.example/app:1"]',
			'["registry.example/app-' || (i % 1000) || '"]', 0, `+state+`, 9,
			(1577836800 + i) * 1000000, (1577836801 + i) * 1000000, (1577836900 + i) * 1000000, '[{"platform":"linux/amd64","state":"succeeded"}]' FROM numbers`, first, last)
	if err == nil {
		_, err = tx.Exec(numbers+`INSERT INTO job_repositories (repository, state, job, tenant)
			SELECT 'registry.example/app-' || (i % 1000), `+state+`, printf('job-%09d', i), 'tenant-' || (i % 10) FROM numbers`, first, last)
	}
	return err
}
