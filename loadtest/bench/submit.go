package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	_ "modernc.org/sqlite" // the driver

	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// submitters are the clients that submit at a time, each with a connection.
	submitters = 64
	// goalSubmit is how many submissions a second SQLite has to make durable.
	goalSubmit = 1000
	// rowSize is about what one submission adds to the database, in bytes: the job, its first event, its indexes.
	rowSize = 1400
)

// idlePlatform is that of the jobs, which nobody runs.
const idlePlatform = "linux/riscv64"

// submissions measures how many jobs a second become durable: clients, coordinator and database share this machine.
func submissions(ctx context.Context, t farmtest.T, o options) (all []figure) {
	t.Helper()
	farmtest.Within(t, func(t farmtest.T) {
		raw := rawSQLite(ctx, t, o.Window)
		all = append(all, figure{
			name: fmt.Sprintf("durable submissions, %d clients, SQLite", submitters), got: submitRate(ctx, t, o.Window), unit: "/s", goal: goalSubmit,
			beside: "SQLite, a commit per row", peer: raw, note: "synchronous=FULL; commits are shared",
		})
	})
	farmtest.Within(t, func(t farmtest.T) {
		url, ok := startPostgres(ctx, t)
		if !ok {
			return
		}
		raw := rawPostgres(ctx, t, url, o.Window)
		all = append(all, figure{
			name: fmt.Sprintf("durable submissions, %d clients, PostgreSQL", submitters), got: submitRate(ctx, t, o.Window, "--store", url), unit: "/s",
			beside: "PostgreSQL, a commit per row", peer: raw, note: "fsync=on, on the same machine",
		})
	})
	return all
}

// submitRate submits for a while to a coordinator whose one running job waits for a worker.
func submitRate(ctx context.Context, t farmtest.T, d time.Duration, args ...string) float64 {
	t.Helper()
	farm := farmtest.StartFarm(t, farmtest.FindFarmTools(t), farmtest.FarmOptions{CoordinatorArgs: append([]string{"--max-jobs", "1", "--pprof"}, args...)})
	clients := load.Clients(t, farm.Addr, submitters)
	from := load.Upload(ctx, t, clients[0])
	spec := func(i int) *archfarmv1.JobSpec {
		return load.Spec(from, []string{idlePlatform}, []string{fmt.Sprintf("registry.example.com/team/app-%d:v%d", i%100, i)})
	}
	load.Submit(ctx, t, clients, submitters, spec, nil) // connections, prepared statements
	t.Logf("submitting for %s; profiles: %s/debug/pprof/", d, farm.HTTP)
	window, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	ids, took := load.Submit(window, t, clients, 1<<30, spec, nil)
	return float64(len(ids)) / took.Seconds()
}

// startPostgres returns the URL of a new database; false where PostgreSQL is not installed.
func startPostgres(ctx context.Context, t farmtest.T) (url string, ok bool) {
	t.Helper()
	s, err := postgrestest.Start(ctx)
	if errors.Is(err, postgrestest.ErrMissing) {
		t.Logf("PostgreSQL is left out: %v", err)
		return "", false
	}
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Errorf("stopping PostgreSQL: %v", err)
		}
	})
	name, err := s.Database(ctx)
	if err != nil {
		t.Fatalf("creating a database: %v", err)
	}
	return s.URL(name), true
}

const rawTable = "CREATE TABLE raw (id TEXT PRIMARY KEY, job BLOB)"

// rawSQLite is how many rows a second a plain database takes with the coordinator's settings, each in a transaction.
func rawSQLite(ctx context.Context, t farmtest.T, d time.Duration) float64 {
	t.Helper()
	path := filepath.Join(farmtest.Folder(t), "raw.db")
	db, err := sql.Open("sqlite", "file:"+path+"?_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		t.Fatalf("opening a database: %v", err)
	}
	defer db.Close() //nolint:errcheck // it is thrown away
	db.SetMaxOpenConns(1)
	if _, err := db.ExecContext(ctx, rawTable); err != nil {
		t.Fatalf("making a table: %v", err)
	}
	return inserts(ctx, t, d, func(ctx context.Context, id string, row []byte) error {
		_, err := db.ExecContext(ctx, "INSERT INTO raw VALUES ($1, $2)", id, row)
		return err
	})
}

// rawPostgres is the same of PostgreSQL, which lets commits share a flush by itself.
func rawPostgres(ctx context.Context, t farmtest.T, url string, d time.Duration) float64 {
	t.Helper()
	config, err := pgxpool.ParseConfig(url)
	if err != nil {
		t.Fatalf("opening a database: %v", err)
	}
	config.MaxConns = submitters
	db, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		t.Fatalf("opening a database: %v", err)
	}
	defer db.Close()
	if _, err := db.Exec(ctx, "CREATE TABLE raw (id TEXT PRIMARY KEY, job BYTEA)"); err != nil {
		t.Fatalf("making a table: %v", err)
	}
	defer db.Exec(ctx, "DROP TABLE raw") //nolint:errcheck // the database is thrown away
	return inserts(ctx, t, d, func(ctx context.Context, id string, row []byte) error {
		_, err := db.Exec(ctx, "INSERT INTO raw VALUES ($1, $2)", id, row)
		return err
	})
}

// inserts counts rows a second, by as many callers as there are clients.
func inserts(ctx context.Context, t farmtest.T, d time.Duration, insert func(ctx context.Context, id string, row []byte) error) float64 {
	t.Helper()
	row := make([]byte, rowSize)
	_, _ = rand.Read(row) // never returns an error
	var n atomic.Int64
	var failed atomic.Pointer[error]
	var running sync.WaitGroup
	begun := time.Now()
	for range submitters {
		running.Go(func() { // ends after d
			for time.Since(begun) < d && ctx.Err() == nil {
				if err := insert(ctx, rand.Text(), row); err != nil {
					failed.Store(&err)
					return
				}
				n.Add(1)
			}
		})
	}
	running.Wait()
	if err := failed.Load(); err != nil {
		t.Fatalf("inserting a row: %v", *err)
	}
	return float64(n.Load()) / time.Since(begun).Seconds()
}
