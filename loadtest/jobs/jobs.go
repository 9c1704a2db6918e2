package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// repositories that the jobs publish to in turn.
	repositories = 50
	// lookEvery is the time between two looks at how far the jobs are.
	lookEvery = 100 * time.Millisecond
)

var platforms = []string{"linux/amd64", "linux/arm64"}

// run is one run of the load test.
type run struct {
	options
	farm     *farmtest.Farm
	registry string // its host; empty: nothing is published
	buildkit *load.BuildKit
	clients  []*client.Client
	context  *archfarmv1.BuildContext
	watchers
}

// measure runs the jobs, checks them, and writes what that took to out.
func measure(ctx context.Context, t farmtest.T, o options, out io.Writer) {
	r := &run{options: o, buildkit: load.NewBuildKit()}
	r.start(ctx, t)
	fmt.Fprintf(out, "%d jobs of %d platforms by %d clients, %d stub workers with %d slots each, on %d CPUs that clients, workers and the registry share; %s\n",
		o.Jobs, o.Platforms, o.Clients, o.Workers, o.Slots, runtime.NumCPU(), runtime.Version())
	r.connect(ctx, t)
	before := load.Holds(t, r.farm.HTTP, r.farm.Coordinator.Pid())
	begun, cpu, own := time.Now(), load.CPUTime(t, r.farm.Coordinator.Pid()), load.CPUTime(t, os.Getpid())
	ids, submitted := load.Submit(ctx, t, r.clients, o.Jobs, r.spec, func(i int, id string) {
		if i%max(1, o.Jobs/max(1, o.Watched)) == 0 {
			r.watch(ctx, r.clients[i%len(r.clients)], id)
		}
	})
	fmt.Fprintf(out, "submitted while others ran: %.1f s, %.0f a second\n", submitted.Seconds(), float64(o.Jobs)/submitted.Seconds())
	if o.Kill {
		r.restart(ctx, t, begun, out)
		cpu = 0 // another process
	}
	r.awaitEnd(ctx, t)
	took := time.Since(begun)
	pid := r.farm.Coordinator.Pid()
	fmt.Fprintf(out, "ended: %.1f s after the first was submitted, %.0f jobs and %.0f legs a second\n", took.Seconds(), float64(o.Jobs)/took.Seconds(), float64(o.Jobs*o.Platforms)/took.Seconds())
	fmt.Fprintf(out, "coordinator: peak memory %.0f MiB, CPU time %.1f s, %.1f ms a job; clients and workers %.1f s\n", float64(load.Peak(t, pid))/(1<<20),
		(load.CPUTime(t, pid) - cpu).Seconds(), (load.CPUTime(t, pid)-cpu).Seconds()*1000/float64(o.Jobs), (load.CPUTime(t, os.Getpid()) - own).Seconds())
	r.check(ctx, t, ids, out)
	r.checkHeld(t, before, out)
}

// start starts the farm, the registry with what the workers would push, and the workers.
func (r *run) start(ctx context.Context, t farmtest.T) {
	t.Helper()
	tools := farmtest.FindFarmTools(t)
	args := []string{"--max-builds", "4000", "--history=" + strconv.FormatBool(r.History), "--pprof"}
	r.buildkit.Images = map[string]load.Image{}
	for _, p := range platforms[:r.Platforms] {
		r.buildkit.Images[p] = load.NewImage(t, p)
	}
	if r.Publish {
		r.registry = load.StartRegistry(t, tools)
		for i := range repositories {
			for _, image := range r.buildkit.Images {
				image.Push(t, r.registry, name(i))
			}
		}
	}
	r.farm = farmtest.StartFarm(t, tools, farmtest.FarmOptions{CoordinatorArgs: args})
	t.Logf("profiles: %s/debug/pprof/", r.farm.HTTP)
	r.clients = load.Clients(t, r.farm.Addr, r.options.Clients)
	r.context = load.Upload(ctx, t, r.clients[0])
	load.StartWorkers(ctx, t, r.buildkit.Serve(t), strings.TrimPrefix(r.farm.Addr, "tcp://"), r.Workers, r.Slots, platforms...)
	r.farm.WaitWorkers(t, "every worker is ready", func(list []farmtest.WorkerStatus) bool {
		ready := 0
		for _, w := range list {
			if w.State == farmtest.Ready {
				ready++
			}
		}
		return ready == r.Workers
	})
}

// connect has every client connected, which the coordinator holds on to until the clients leave.
func (r *run) connect(ctx context.Context, t farmtest.T) {
	t.Helper()
	for _, c := range r.clients {
		for j, err := range c.List(ctx, &archfarmv1.ListRequest{PageSize: 1}) {
			t.Fatalf("a new coordinator has the job %s: %v", j.GetId(), err)
		}
	}
}

// name is the repository of a job, within the registry.
func name(job int) string { return fmt.Sprintf("load/app-%02d", job%repositories) }

func (r *run) spec(i int) *archfarmv1.JobSpec {
	var tags []string
	if r.Publish {
		tags = []string{fmt.Sprintf("%s/%s:job-%05d", r.registry, name(i), i)}
	}
	return load.Spec(r.context, platforms[:r.Platforms], tags)
}

// restart kills the coordinator once a third of the legs has reached a worker, and starts it again.
func (r *run) restart(ctx context.Context, t farmtest.T, begun time.Time, out io.Writer) {
	t.Helper()
	await(ctx, t, "a third of the legs is at work", func() error {
		if legs := r.buildkit.Solves.Load(); legs < int64(r.Jobs*r.Platforms/3) {
			return fmt.Errorf("%d legs have been", legs)
		}
		return nil
	})
	killed := time.Since(begun)
	r.farm.Coordinator.Kill()
	r.farm.RestartCoordinator(t)
	fmt.Fprintf(out, "the coordinator was killed after %.1f s, and started again\n", killed.Seconds())
}

// awaitEnd waits until every job has ended.
func (r *run) awaitEnd(ctx context.Context, t farmtest.T) {
	t.Helper()
	open := []archfarmv1.Job_State{archfarmv1.Job_STATE_QUEUED, archfarmv1.Job_STATE_RUNNING, archfarmv1.Job_STATE_PUBLISHING}
	await(ctx, t, "every job has ended", func() error {
		for j, err := range r.clients[0].List(ctx, &archfarmv1.ListRequest{States: open, PageSize: 1}) { // no more than is looked at
			if err != nil {
				return err
			}
			return fmt.Errorf("job %s is %s", j.GetId(), j.GetState())
		}
		return nil
	})
}

// await waits until nothing is missing.
func await(ctx context.Context, t farmtest.T, what string, missing func() error) {
	t.Helper()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for err := missing(); err != nil; err = missing() {
		select {
		case <-ctx.Done():
			t.Fatalf("waiting until %s: %v; %v", what, err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// watchers follow jobs from their first event on.
type watchers struct {
	running sync.WaitGroup
	mu      sync.Mutex
	number  int
	events  int
	wrong   []string
}

// watch follows a job to its end. The client breaks off at a gap, and takes up again what breaks.
func (w *watchers) watch(ctx context.Context, c *client.Client, id string) {
	w.running.Go(func() { // ends with the job, or ctx
		last, ends := int64(0), 0
		var failed error
		for e, err := range c.Watch(ctx, id, 0) {
			if failed = err; err != nil {
				break
			}
			if e.GetSeq() != last+1 {
				failed = fmt.Errorf("event %d follows %d", e.GetSeq(), last)
				break
			}
			last = e.GetSeq()
			if e.GetJob() != nil && client.Ended(e.GetJob().GetState()) {
				ends++
			}
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.number++
		w.events += int(last)
		if failed != nil || ends != 1 {
			w.wrong = append(w.wrong, fmt.Sprintf("job %s: %d events, %d of them an end: %v", id, last, ends, failed))
		}
	})
}
