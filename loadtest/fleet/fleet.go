package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

// measure runs the fleet through its day, writes what that gave to out, and reports whether every goal was reached.
func measure(ctx context.Context, t farmtest.T, o options, out io.Writer) (reached bool) {
	if err := enoughFiles(o.Workers); err != nil {
		t.Fatalf("%v", err)
	}
	farm := farmtest.StartFarm(t, farmtest.FindFarmTools(t), farmtest.FarmOptions{Host: "127.0.0.1"}) // a host means: with TLS
	view := watch(t, farm.Admin)
	agents := newAgents(t, strings.TrimPrefix(farm.Addr, "tcp://"), farm.Token(t, "--worker", "--uses", fmt.Sprint(o.Workers)))
	fmt.Fprintf(out, "%d workers in one process and their coordinator in another on %d CPUs, %s; TLS over loopback\n", o.Workers, runtime.NumCPU(), runtime.Version())

	var r results
	use := begin(t, farm.Coordinator.Pid())
	agents.start(ctx, t, o.Workers)
	r.join = view.awaitReady(ctx, t, agents, o)
	r.joining = use.end(t)
	t.Logf("all have joined after %s", seconds(r.join))

	use = begin(t, farm.Coordinator.Pid())
	agents.rest(ctx, t, o.Idle)
	r.idle = use.end(t)
	r.memory = load.Peak(t, farm.Coordinator.Pid())

	killed := time.Now()
	farm.Coordinator.Kill()
	agents.rest(ctx, t, o.Down)
	started := time.Now()
	farm.RestartCoordinator(t)
	view.awaitReady(ctx, t, agents, o)
	r.back = time.Since(killed)
	r.memory = max(r.memory, load.Peak(t, farm.Coordinator.Pid()))
	r.refused = agents.refused.between(killed, time.Now())
	r.arrivals = agents.arrivals.between(started, time.Now())
	return r.write(t, out, o)
}

// results are what was measured.
type results struct {
	join, back time.Duration
	memory     int64 // bytes
	// joining and idle are the use of CPUs meanwhile.
	joining, idle usage
	// refused are the tries to reach the coordinator that came to nothing, by when they did after its end; arrivals
	// the connections made to the new one, by when after its start.
	refused, arrivals []time.Duration
}
