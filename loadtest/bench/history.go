package main

import (
	"context"
	"database/sql"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/loadtest/load"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// goalPage, in milliseconds, is for 99 of 100 pages of pageSize jobs.
	goalPage, pageSize = 50, 100
	// fewJobs are what lists over many are compared with; pages are asked for so many times.
	fewJobs, pages = 1000, 200
	// historyDays is how far the history goes back: no further than jobs are kept.
	historyDays = 20
)

// Job i of the history, from 1, publishes to app-(i%1000), and has failed if i%100 is 0. The parameters of both
// statements: the first and, excluded, the last number, the tenant, a specification, and the microseconds of the first
// job's creation and between two.
const (
	historyState = "CASE i % 100 WHEN 0 THEN 'failed' WHEN 1 THEN 'cancelled' ELSE 'succeeded' END"
	jobColumns   = `INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, context, tags, repositories, priority,
		state, digest, last_seq, created, started, ended, legs) `
	jobValues = `, '', $3, 'client ci', '', $4, 'sha256:' || i, '', '["registry.example.com/app-' || (i % 1000) || ':v1"]',
		'["registry.example.com/app-' || (i % 1000) || '"]', 0, ` + historyState + `, 'sha256:' || i, 9, $5 + i * $6, $5 + i * $6, $5 + i * $6 + 1,
		'[{"Platform":"linux/amd64","State":"succeeded"}]' FROM `
	repositoryColumns = "INSERT INTO job_repositories (repository, state, job, tenant) SELECT 'registry.example.com/app-' || (i % 1000), " + historyState + ", "
	sqliteNumbers     = "WITH RECURSIVE numbers (i) AS (SELECT $1 UNION ALL SELECT i + 1 FROM numbers WHERE i + 1 < $2) "
	sqliteID          = "printf('job-%09d', i)"
	postgresNumbers   = "generate_series($1::bigint, $2::bigint - 1) i"
	postgresID        = "'job-' || lpad(i::text, 9, '0')"
)

// database is a store to be filled past the coordinator, which does not run meanwhile.
type database interface {
	fill(ctx context.Context, first, last int) error
}

// lists measures pages of a long history, as a client sees them.
func lists(ctx context.Context, t farmtest.T, o options) (all []figure) {
	t.Helper()
	farmtest.Within(t, func(t farmtest.T) {
		farm := farmtest.StartFarm(t, farmtest.FindFarmTools(t), farmtest.FarmOptions{})
		all = append(all, listsOf(ctx, t, o, farm, "SQLite", sqliteFile(filepath.Join(farm.DataDir, coordinator.StoreFile)))...)
	})
	farmtest.Within(t, func(t farmtest.T) {
		if url, ok := startPostgres(ctx, t); ok {
			farm := farmtest.StartFarm(t, farmtest.FindFarmTools(t), farmtest.FarmOptions{CoordinatorArgs: []string{"--store", url}})
			all = append(all, listsOf(ctx, t, o, farm, "PostgreSQL", postgresURL(url))...)
		}
	})
	return all
}

func listsOf(ctx context.Context, t farmtest.T, o options, farm *farmtest.Farm, engine string, db database) (all []figure) {
	t.Helper()
	pagesOf := func(first, last int) []float64 {
		farm.Coordinator.Stop(t)
		begun := time.Now()
		if err := db.fill(ctx, first, last); err != nil {
			t.Fatalf("filling %s: %v", engine, err)
		}
		t.Logf("%s: jobs %d to %d filled in %s", engine, first, last-1, time.Since(begun).Round(time.Millisecond))
		farm.StartCoordinator(t)
		awaitListening(ctx, t, strings.TrimPrefix(farm.Addr, "tcp://"))
		return measurePages(ctx, t, load.Clients(t, farm.Addr, 1)[0])
	}
	few := pagesOf(1, fewJobs+1)
	many := pagesOf(fewJobs+1, o.History+1)
	for i, q := range pageQueries {
		all = append(all, figure{
			name: fmt.Sprintf("%s of %d jobs, p99, %s", q.name, o.History, engine), got: many[i], unit: "ms", goal: goalPage,
			beside: fmt.Sprintf("of %d jobs", fewJobs), peer: few[i], note: fmt.Sprintf("%d a page", pageSize),
		})
	}
	return all
}

var pageQueries = []struct {
	name string
	ask  *archfarmv1.ListRequest
}{
	{"the newest page", &archfarmv1.ListRequest{PageSize: pageSize}},
	{"a repository's page", &archfarmv1.ListRequest{PageSize: pageSize, Repository: "registry.example.com/app-77"}},
	{"a page of those failed", &archfarmv1.ListRequest{PageSize: pageSize, States: []archfarmv1.Job_State{archfarmv1.Job_STATE_FAILED}}},
	{"a page of those running", &archfarmv1.ListRequest{PageSize: pageSize, States: []archfarmv1.Job_State{archfarmv1.Job_STATE_RUNNING}}},
}

// measurePages returns the 99th percentile of each query, in milliseconds.
func measurePages(ctx context.Context, t farmtest.T, c *client.Client) (all []float64) {
	t.Helper()
	for _, q := range pageQueries {
		var took []time.Duration
		for try := range pages + 1 {
			begun, n := time.Now(), 0
			for _, err := range c.List(ctx, q.ask) {
				if err != nil {
					t.Fatalf("%s: %v", q.name, err)
				}
				if n++; n == pageSize {
					break
				}
			}
			if try > 0 { // the first connects and warms up
				took = append(took, time.Since(begun))
			}
			if wanted := len(q.ask.GetStates()) == 0 || q.ask.GetStates()[0] != archfarmv1.Job_STATE_RUNNING; wanted != (n > 0) {
				t.Fatalf("%s has %d jobs", q.name, n)
			}
		}
		all = append(all, percentile(took, 99))
	}
	return all
}

// parameters of the statements.
func parameters(first, last int) ([]any, error) {
	spec, err := proto.Marshal(load.Spec(&archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Git{
		Git: &archfarmv1.GitContext{Url: "https://git.example.com/team/app.git", Ref: "main"},
	}}, []string{"linux/amd64"}, []string{"registry.example.com/app:v1"}))
	every := historyDays * 24 * time.Hour / 1_000_000
	return []any{first, last, identity.DefaultTenant, spec, time.Now().Add(-historyDays * 24 * time.Hour).UnixMicro(), every.Microseconds()}, err
}

type sqliteFile string

func (path sqliteFile) fill(ctx context.Context, first, last int) error {
	db, err := sql.Open("sqlite", "file:"+string(path)+"?_pragma=journal_mode(WAL)&_pragma=synchronous(OFF)&_pragma=cache_size(-262144)")
	if err != nil {
		return err
	}
	defer db.Close() //nolint:errcheck // what is missing shows
	db.SetMaxOpenConns(1)
	const batch = 100_000
	for ; first < last; first += batch {
		args, err := parameters(first, min(first+batch, last))
		if err != nil {
			return err
		}
		if _, err := db.ExecContext(ctx, sqliteNumbers+jobColumns+"SELECT "+sqliteID+jobValues+"numbers", args...); err != nil {
			return err
		}
		if _, err := db.ExecContext(ctx, sqliteNumbers+repositoryColumns+sqliteID+", $3 FROM numbers", args[:3]...); err != nil {
			return err
		}
	}
	return nil
}

type postgresURL string

func (url postgresURL) fill(ctx context.Context, first, last int) error {
	db, err := pgx.Connect(ctx, string(url))
	if err != nil {
		return err
	}
	defer db.Close(ctx) //nolint:errcheck // what is missing shows
	args, err := parameters(first, last)
	if err != nil {
		return err
	}
	for _, statement := range []struct {
		sql  string
		args []any
	}{
		{"SET synchronous_commit = off", nil},
		{jobColumns + "SELECT " + postgresID + jobValues + postgresNumbers, args},
		{repositoryColumns + postgresID + ", $3 FROM " + postgresNumbers, args[:3]},
		{"ANALYZE", nil}, // as the server does by itself, later
	} {
		if _, err := db.Exec(ctx, statement.sql, statement.args...); err != nil {
			return fmt.Errorf("%w: %s", err, statement.sql)
		}
	}
	return nil
}
