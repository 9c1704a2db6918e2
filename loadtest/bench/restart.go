package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// goalRestart, in milliseconds, is from the coordinator's start to the first leg on a worker.
const goalRestart = 5000

// restarts measures how soon a coordinator that was killed goes on with a long queue.
func restarts(ctx context.Context, t farmtest.T, o options) []figure {
	t.Helper()
	return []figure{{
		name: fmt.Sprintf("start with %d queued, to the first leg on a worker", o.Queued), got: restart(ctx, t, o.Queued), unit: "ms", goal: goalRestart,
		beside: "with 200 queued", peer: restart(ctx, t, 200), note: "after kill -9; the worker joins once it listens",
	}}
}

// restart returns the milliseconds from a process's start to the first solve at a worker's BuildKit.
func restart(ctx context.Context, t farmtest.T, queued int) (took float64) {
	t.Helper()
	farmtest.Within(t, func(t farmtest.T) {
		farm := farmtest.StartFarm(t, farmtest.FindFarmTools(t), farmtest.FarmOptions{})
		defer func() { farm.Coordinator.Kill() }() // it would wait for legs of the long queue to end
		addr := strings.TrimPrefix(farm.Addr, "tcp://")
		farmtest.Within(t, func(t farmtest.T) { // with a worker that never finishes
			stuck := load.NewBuildKit()
			stuck.Run = func(ctx context.Context, _ load.Tell) error { <-ctx.Done(); return context.Cause(ctx) }
			load.StartWorkers(ctx, t, stuck.Serve(t), addr, 1, 1, "linux/amd64")
			clients := load.Clients(t, farm.Addr, submitters)
			spec := load.Spec(load.Upload(ctx, t, clients[0]), []string{"linux/amd64"}, nil)
			load.Submit(ctx, t, clients, queued+100, func(int) *archfarmv1.JobSpec { return spec }, nil)
			farm.Coordinator.Kill()
		})
		buildkit := load.NewBuildKit()
		at := buildkit.Serve(t)
		begun := time.Now()
		farm.StartCoordinator(t)
		awaitListening(ctx, t, addr)
		listening := time.Since(begun)
		load.StartWorkers(ctx, t, at, addr, 1, 1, "linux/amd64")
		select {
		case first := <-buildkit.First():
			took = float64(first.Sub(begun).Microseconds()) / 1000
			t.Logf("restart with %d queued: listening after %s, first leg after %.0f ms", queued, listening.Round(time.Millisecond), took)
		case <-ctx.Done():
			t.Fatalf("interrupted")
		case <-time.After(time.Minute):
			t.Fatalf("no leg was dispatched within a minute:\n%s", farm.Logs())
		}
	})
	return took
}

func awaitListening(ctx context.Context, t farmtest.T, addr string) {
	t.Helper()
	var d net.Dialer
	for deadline := time.Now().Add(time.Minute); ; {
		conn, err := d.DialContext(ctx, "tcp", addr)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			t.Fatalf("the coordinator does not listen: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
