package postgres

import (
	"testing"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/storetest"
	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
)

func BenchmarkStore(b *testing.B) {
	storetest.Bench(b, func(t testing.TB) store.Store {
		server, name := postgrestest.Database(t)
		return openTest(t, server.URL(name))
	})
}

// BenchmarkHistory is of lists over a million jobs.
func BenchmarkHistory(b *testing.B) {
	server, name := postgrestest.Database(b)
	s := openTest(b, server.URL(name))
	const state = "CASE i % 100 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END"
	for _, statement := range []string{
		`INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, context, tags, repositories, priority, state,
			last_seq, created, started, ended, legs)
		SELECT 'job-' || lpad(i::text, 9, '0'), i::text, 'tenant-' || (i % 10), 'client ci', '', decode(repeat(md5(i::text), 40), 'hex'), 'sha256:' || i, '', '["registry.example/app:1"]',
			'["registry.example/app-' || (i % 1000) || '"]', 0, ` + state + `, 9,
			(1577836800 + i) * 1000000, (1577836801 + i) * 1000000, (1577836900 + i) * 1000000, '[{"platform":"linux/amd64","state":"succeeded"}]'
		FROM generate_series(1, $1::bigint) AS numbers (i)`,
		`INSERT INTO job_repositories (repository, state, job, tenant)
		SELECT 'registry.example/app-' || (i % 1000), ` + state + `, 'job-' || lpad(i::text, 9, '0'), 'tenant-' || (i % 10) FROM generate_series(1, $1::bigint) AS numbers (i)`,
	} {
		if _, err := s.engine.pool.Exec(b.Context(), statement, storetest.History); err != nil {
			b.Fatal(err)
		}
	}
	storetest.BenchList(b, s) // before and after autovacuum has looked at it
	if _, err := s.engine.pool.Exec(b.Context(), "VACUUM ANALYZE"); err != nil {
		b.Fatal(err)
	}
	b.Run("Analyzed", func(b *testing.B) { storetest.BenchList(b, s) })
}
