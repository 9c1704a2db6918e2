package loadtest

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// BenchmarkIdle measures what the real coordinator keeps in memory for clients that do nothing: those that are
// connected, those that have a session open, and those whose build waits for its frontend. Each has a connection of its
// own, as BuildKit's clients have, which is part of what each costs.
//
//	go test ./loadtest -run '^$' -bench Idle -benchtime 1x
func BenchmarkIdle(b *testing.B) {
	tools := farmtest.FindFarmTools(b)
	for _, bench := range []struct {
		name string
		n    int
		open func(ctx context.Context, c *client.Client, held func()) error
	}{
		{"connection", 1000, connected},
		{"session", 1000, inSession},
		{"build", 200, inBuild},
	} {
		b.Run(bench.name, func(b *testing.B) {
			farm := farmtest.StartFarm(b, tools, farmtest.FarmOptions{CoordinatorArgs: []string{"--pprof"}})
			for b.Loop() {
				before := residentAfterGC(b, farm)
				release := hold(b, farm.Addr, bench.n, bench.open)
				after := residentAfterGC(b, farm)
				release()
				b.ReportMetric(float64(after-before)/float64(bench.n), "KiB/"+bench.name)
				b.ReportMetric(float64(after)/1024, "MiB-in-all")
			}
		})
	}
}

// hold opens n of something and returns what lets go of them.
func hold(b *testing.B, addr string, n int, open func(context.Context, *client.Client, func()) error) (release func()) {
	b.Helper()
	ctx, cancel := context.WithCancel(b.Context())
	held := make(chan struct{}, n)
	var all errgroup.Group
	for range n {
		c, err := client.New(ctx, addr)
		if err != nil {
			b.Fatal(err)
		}
		all.Go(func() error {
			defer c.Close()
			err := open(ctx, c, func() { held <- struct{}{} })
			if ctx.Err() != nil {
				return nil // let go
			}
			return fmt.Errorf("it ended by itself: %w", err)
		})
	}
	deadline := time.After(time.Minute)
	for i := range n {
		select {
		case <-held:
		case <-deadline:
			cancel()
			b.Fatalf("%d of %d are open after a minute: %v", i, n, all.Wait())
		}
	}
	return func() {
		cancel()
		if err := all.Wait(); err != nil {
			b.Error(err)
		}
	}
}

func connected(ctx context.Context, c *client.Client, held func()) error {
	if _, err := c.Info(ctx); err != nil {
		return err
	}
	held()
	<-ctx.Done()
	return ctx.Err()
}

func inSession(ctx context.Context, c *client.Client, held func()) error {
	s, err := session.NewSession(ctx, "")
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }() // it only ends
	var running errgroup.Group
	running.Go(func() error { return s.Run(ctx, grpchijack.Dialer(c.ControlClient())) })
	if _, err := c.ListWorkers(ctx); err != nil { // a round trip: the session's first frames have arrived before
		return err
	}
	held()
	return running.Wait()
}

// inBuild starts a build as buildx does, whose frontend, on the client's side, does not go on.
func inBuild(ctx context.Context, c *client.Client, held func()) error {
	_, err := c.Build(ctx, client.SolveOpt{}, "", func(ctx context.Context, _ gateway.Client) (*gateway.Result, error) {
		held()
		<-ctx.Done()
		return nil, ctx.Err()
	}, discard())
	return err
}

// discard takes a build's progress.
func discard() chan *client.SolveStatus {
	updates := make(chan *client.SolveStatus)
	go func() {
		for range updates { // Build closes it
		}
	}()
	return updates
}

// residentAfterGC is resident once the coordinator has collected its garbage.
func residentAfterGC(b *testing.B, farm *farmtest.Farm) int {
	b.Helper()
	for range 2 { // pools survive one collection
		response, err := http.Get(farm.HTTP + "/debug/pprof/heap?gc=1")
		if err != nil {
			b.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, response.Body) // only the collection matters
		response.Body.Close()
	}
	return resident(b, farm)
}

// resident is the coordinator's resident memory, in KiB.
func resident(b *testing.B, farm *farmtest.Farm) int {
	b.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", farm.Coordinator.Pid()))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), "VmRSS:")
	kib, err := strconv.Atoi(strings.Fields(rest + " none")[0])
	if err != nil {
		b.Fatalf("the kernel does not tell the coordinator's memory: %v", err)
	}
	return kib
}
