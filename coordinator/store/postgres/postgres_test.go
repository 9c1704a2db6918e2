package postgres

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
	"github.com/archfarm/archfarm/coordinator/store/storetest"
	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
)

func openTest(t testing.TB, address string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{URL: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s.(*Store)
}

func TestStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t testing.TB) store.Store {
		server, name := postgrestest.Database(t)
		return openTest(t, server.URL(name))
	})
}

// Two coordinators, each with its own connections.
func two(t *testing.T) (server *postgrestest.Server, name string, a, b *Store) {
	t.Helper()
	server, name = postgrestest.Database(t)
	return server, name, openTest(t, server.URL(name)), openTest(t, server.URL(name))
}

func job(id string) store.Job {
	return store.Job{ID: id, Tenant: "acme", Legs: []store.Leg{{Platform: "linux/amd64"}}}
}

func TestOpen_AtTheSameTime(t *testing.T) {
	t.Parallel()
	server, name := postgrestest.Database(t)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() { openTest(t, server.URL(name)) })
	}
	wg.Wait()
}

func TestWakes_OfOthers(t *testing.T) {
	t.Parallel()
	server, name, a, b := two(t)
	wakes := b.Wakes(t.Context())
	hear := func(id string) {
		t.Helper()
		// Again and again: those who are not listening yet miss a hint.
		for late := time.After(30 * time.Second); ; {
			if _, err := a.Cancel(t.Context(), id, nil); err != nil {
				t.Fatal(err)
			}
			select {
			case got := <-wakes:
				if got.Job == id {
					return
				}
			case <-late:
				t.Fatal("nothing was heard of " + id)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	for _, id := range []string{"a", "b"} {
		if _, _, err := a.Submit(t.Context(), job(id), nil); err != nil {
			t.Fatal(err)
		}
		hear(id)
		terminate(t, server, name) // and after that they listen again
	}
}

// terminate ends all connections to a database.
func terminate(t *testing.T, server *postgrestest.Server, name string) {
	t.Helper()
	if err := server.Load(t.Context(), "postgres", fmt.Appendf(nil,
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '%s'", name)); err != nil {
		t.Fatal(err)
	}
}

func TestLease_GoesOverToTheOther(t *testing.T) {
	t.Parallel()
	_, _, a, b := two(t)
	ctx := t.Context()
	if _, _, err := a.Submit(ctx, job("a"), nil); err != nil {
		t.Fatal(err)
	}
	first, err := a.Claim(ctx, "a", 300*time.Millisecond, 1)
	if err != nil || len(first) != 1 {
		t.Fatal(first, err)
	}
	var second []store.Claimed
	for len(second) == 0 {
		if second, err = b.Claim(ctx, "b", time.Hour, 1); err != nil {
			t.Fatal(err)
		}
	}
	if held := time.Since(first[0].Lease.Asked); held < 300*time.Millisecond {
		t.Errorf("the lease lasted %v", held)
	}
	if _, err := a.Update(ctx, first[0].Lease, store.Update{State: store.Succeeded}); !errors.Is(err, store.ErrLeaseLost) {
		t.Errorf("with the old lease: %v", err)
	}
	if _, err := b.Update(ctx, second[0].Lease, store.Update{State: store.Running}); err != nil {
		t.Error(err)
	}
}

// Connections that break are made anew, and what they were about is done once. They
// break after so many jobs, not so often: however slow the machine is, there is time to
// make them in between.
func TestConnectionsBreak(t *testing.T) {
	t.Parallel()
	server, name, a, b := two(t)
	const jobs, breakAfter = 300, 10
	var wg sync.WaitGroup
	submitted := make(chan struct{})
	for w := range 4 {
		wg.Go(func() {
			for i := w; i < jobs; i += 4 {
				s := []*Store{a, b}[i%2]
				j := job(fmt.Sprintf("job-%03d", i))
				j.RequestID = j.ID
				_, _, err := s.Submit(t.Context(), j, []store.Event{{Data: []byte("x")}})
				for err != nil && strings.Contains(err.Error(), "may have happened") { // the commit was cut off, and may be again
					_, _, err = s.Submit(t.Context(), j, []store.Event{{Data: []byte("x")}}) // as a client would
				}
				if err != nil {
					t.Errorf("job %d: %v", i, err)
				}
				submitted <- struct{}{}
			}
		})
	}
	for n := range jobs {
		<-submitted
		if n%breakAfter == 0 {
			terminate(t, server, name) // while the others submit theirs
		}
	}
	wg.Wait()
	got, err := a.List(t.Context(), store.Query{Limit: 1000})
	if err != nil || len(got) != jobs {
		t.Fatalf("%d jobs, %v", len(got), err)
	}
	for _, j := range got {
		if events, err := b.Events(t.Context(), j.ID, 0, 10); err != nil || len(events) != 1 {
			t.Errorf("%s has %d events, %v", j.ID, len(events), err)
		}
	}
}

func TestServerRestarts(t *testing.T) {
	t.Parallel()
	server, err := postgrestest.Start(t.Context())
	postgrestest.Require(t, err)
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	s := openTest(t, server.TCPURL("postgres"))
	if _, _, err := s.Submit(t.Context(), job("a"), nil); err != nil {
		t.Fatal(err)
	}
	if err := server.Halt(); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if _, err := s.Job(t.Context(), "a"); err == nil || errors.Is(err, store.ErrNotFound) || time.Since(began) > answers {
		t.Errorf("without a server, after %v: %v", time.Since(began), err)
	}
	if err := server.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Job(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Submit(t.Context(), job("b"), nil); err != nil {
		t.Error(err)
	}
}

func TestPassword_IsNotTold(t *testing.T) {
	t.Parallel()
	server := postgrestest.Shared(t)
	const password = "s3cr3t-word"
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
	wrong, err := url.Parse(server.TCPURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	wrong.User = url.UserPassword(wrong.User.Username(), password)
	gone := *wrong
	gone.Host = "127.0.0.1:1"
	for _, address := range []string{
		wrong.String(), gone.String(),
		"postgres://user:" + password + "@127.0.0.1:port/x",
		"postgres://user:" + password + "%zz@127.0.0.1/x",
		"postgres://user:" + password + "@127.0.0.1/x?pool_max_conns=many",
		"postgres://user:" + password + "/x@127.0.0.1/x?sslmode=" + password,
		"host=127.0.0.1 port=1 password=" + password,
		"host=127.0.0.1 password='" + password,
	} {
		_, err := Open(t.Context(), Options{URL: address, Log: log})
		if err == nil {
			t.Fatalf("%s was opened", address)
		}
		if strings.Contains(err.Error(), "s3cr3t") {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	if strings.Contains(logged.String(), "s3cr3t") {
		t.Errorf("the log tells the password: %s", logged.String())
	}
}

// What has been answered is durable even where the server's default is otherwise.
func TestSynchronousCommit(t *testing.T) {
	t.Parallel()
	server, name := postgrestest.Database(t)
	if err := server.Load(t.Context(), name, fmt.Appendf(nil, "ALTER DATABASE %s SET synchronous_commit = off", name)); err != nil {
		t.Fatal(err)
	}
	s := openTest(t, server.URL(name))
	var setting string
	if err := s.engine.pool.QueryRow(t.Context(), "SHOW synchronous_commit").Scan(&setting); err != nil || setting != "on" {
		t.Errorf("synchronous_commit is %s, %v", setting, err)
	}
}

// A transaction that the server rolls back, as it does to end a deadlock, is made again.
func TestDeadlocksAreTriedAgain(t *testing.T) {
	t.Parallel()
	_, _, a, b := two(t)
	for _, id := range []string{"x", "y"} {
		if _, _, err := a.Submit(t.Context(), job(id), nil); err != nil {
			t.Fatal(err)
		}
	}
	var wg, both sync.WaitGroup
	both.Add(2)
	tried := make([]int, 2)
	for i, order := range [][]string{{"x", "y"}, {"y", "x"}} {
		wg.Go(func() {
			err := []*Store{a, b}[i].engine.Write(t.Context(), func(tx sqlstore.Tx) error {
				tried[i]++
				for n, id := range order {
					if _, err := tx.Exec("UPDATE jobs SET retries = retries + 1 WHERE id = $1", id); err != nil {
						return err
					}
					if n == 0 && tried[i] == 1 {
						both.Done()
						both.Wait()
					}
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if tried[0]+tried[1] != 3 {
		t.Errorf("tried %v times", tried)
	}
	for _, id := range []string{"x", "y"} {
		if j, err := a.Job(t.Context(), id); err != nil || j.Retries != 2 {
			t.Errorf("%s was changed %d times, %v", id, j.Retries, err)
		}
	}
}
