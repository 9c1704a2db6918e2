package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/identity"
	"github.com/archfarm/archfarm/loadtest/load"
	"github.com/archfarm/archfarm/worker"
	"github.com/archfarm/archfarm/worker/enroll"
)

// joinAgain is the pause of archfarm worker between two tries to join.
const joinAgain = 5 * time.Second

// agents are the workers' agents, as archfarm worker runs them.
type agents struct {
	coordinator, token string
	dir                string
	buildkit           address.Address

	arrivals, refused moments
	failed            chan error // the first agent's that ended by itself
}

func newAgents(t farmtest.T, coordinator, token string) *agents {
	t.Helper()
	return &agents{
		coordinator: coordinator, token: token, dir: farmtest.Folder(t), buildkit: load.NewBuildKit().Serve(t),
		failed: make(chan error, 1),
	}
}

// start starts all at once. They end with t.
func (a *agents) start(ctx context.Context, t farmtest.T, number int) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	for i := range number {
		running.Go(func() {
			name := fmt.Sprintf("worker-%04d", i)
			err := a.run(ctx, name)
			if ctx.Err() != nil {
				return // its end was asked for
			}
			select {
			case a.failed <- fmt.Errorf("%s ended: %w", name, err):
			default:
			}
		})
	}
}

// run joins the farm and works for it until ctx ends.
func (a *agents) run(ctx context.Context, name string) error {
	dir := filepath.Join(a.dir, name)
	creds, err := a.join(ctx, name, dir)
	if err != nil {
		return err
	}
	return worker.Run(ctx, worker.Config{
		Name: name, BuildKit: a.buildkit, DataDir: dir, Slots: 2, Coordinators: []string{a.coordinator},
		// Said, because what is so slow to answer as this BuildKit may be could as well be on another machine.
		Platforms:   []string{"linux/" + runtime.GOARCH},
		Credentials: counted{creds, &a.arrivals}, Logger: slog.New(ear{&a.refused}), Version: "load test",
	})
}

// join asks until the farm answers.
func (a *agents) join(ctx context.Context, name, dir string) (*enroll.Credentials, error) {
	for {
		creds, err := enroll.Join(ctx, enroll.Request{
			Token: a.token, Kinds: []identity.Kind{identity.Worker}, Coordinators: []string{a.coordinator}, Name: name, Dir: dir,
		})
		if err == nil || !passing(err) {
			return creds, err
		}
		select {
		case <-time.After(joinAgain):
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), err)
		}
	}
}

// passing tells whether asking again may be answered.
func passing(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted:
		return true
	default:
		return false
	}
}

// rest lets d pass, unless an agent or ctx ends before.
func (a *agents) rest(ctx context.Context, t farmtest.T, d time.Duration) {
	t.Helper()
	over := time.NewTimer(d)
	defer over.Stop()
	select {
	case <-over.C:
	case err := <-a.failed:
		t.Fatalf("%v", err)
	case <-ctx.Done():
		t.Fatalf("interrupted")
	}
}

// counted are credentials that note when they are used: once for each connection to a coordinator.
type counted struct {
	worker.Credentials
	used *moments
}

func (c counted) TLS() *tls.Config {
	c.used.add(time.Now())
	return c.Credentials.TLS()
}

// notAttached is what an agent logs when it could not attach, or is attached no more.
const notAttached = "not attached: trying again"

// ear is an agent's log, of which it notes when the agent was not attached.
type ear struct{ refused *moments }

func (ear) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }
func (e ear) WithAttrs([]slog.Attr) slog.Handler             { return e }
func (e ear) WithGroup(string) slog.Handler                  { return e }

func (e ear) Handle(_ context.Context, r slog.Record) error {
	if r.Message == notAttached {
		e.refused.add(r.Time)
	}
	return nil
}
