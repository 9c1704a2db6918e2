package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	// goal is how much longer than its peer the farm may take.
	goal = 1.10
	// memoryGoal is what the coordinator's memory must stay below, in bytes.
	memoryGoal = 150 << 20
	// smallSize is the data in the context of the cached builds, in bytes.
	smallSize = 64 << 10
)

// bench runs every contest and writes what they gave to out.
func bench(ctx context.Context, t farmtest.T, o options, out io.Writer) {
	start := time.Now()
	r := newRig(t)
	fmt.Fprintf(out, "%d CPUs, %s; wall-clock time of buildx build, sides in turns; the farm by TCP, others by unix socket\n", runtime.NumCPU(), runtime.Version())
	var outcomes []outcome
	defer func() { table(t, out, outcomes) }() // what is known, if something ends this early
	hold := func(contests []contest) {
		for _, c := range contests {
			outcomes = append(outcomes, c.run(ctx, t, func() bool { return time.Since(start) > o.Limit }))
			t.Logf("%s: done, %s after the start", c.name, time.Since(start).Round(time.Second))
		}
	}
	hold(r.cached(t, o))
	before := r.coordinatorPeak(t)
	r.resetCoordinatorPeak(t)
	hold(r.large(t, o))
	used := r.coordinatorPeak(t)
	fmt.Fprintf(out, "coordinator's peak memory with the large context: %.0f MiB, goal below %d MiB: %s (with the others: %.0f MiB)\n",
		mebibytes(used), memoryGoal>>20, verdict(used < memoryGoal), mebibytes(before))
	fmt.Fprintf(out, "took %s\n", time.Since(start).Round(time.Second))
}

func (r *rig) resetCoordinatorPeak(t farmtest.T) {
	t.Helper()
	if err := resetPeak(r.farm.Coordinator.Pid()); err != nil {
		t.Fatalf("%v", err)
	}
}

func (r *rig) coordinatorPeak(t farmtest.T) int64 {
	t.Helper()
	bytes, err := peak(r.farm.Coordinator.Pid())
	if err != nil {
		t.Fatalf("%v", err)
	}
	return bytes
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// cached are builds of which nothing has changed since the last: what they take is mostly overhead.
func (r *rig) cached(t farmtest.T, o options) []contest {
	contests := []contest{
		{name: "cached push, two platforms", sides: []string{theFarm, twoNodes, oneNode}, build: r.cachedBuild(t, "two", r.both, "--provenance=false")},
		{name: "cached push, two platforms, provenance", sides: []string{theFarm, twoNodes, oneNode}, build: r.cachedBuild(t, "proven", r.both)},
		{name: "cached push, one platform", sides: []string{theFarm, oneNode}, build: r.cachedBuild(t, "single", r.native, "--provenance=false")},
	}
	for i := range contests {
		c := &contests[i]
		c.rounds, c.goal = o.CachedRounds, goal
		for range 2 { // the first build of each fills caches, the registry and buildx's own files
			for _, side := range c.sides {
				c.build(t, side)
			}
		}
	}
	return contests
}

// cachedBuild pushes always the same image.
func (r *rig) cachedBuild(t farmtest.T, name, platforms string, args ...string) func(farmtest.T, string) time.Duration {
	s := newSource(t, smallSize)
	return func(t farmtest.T, builder string) time.Duration {
		t.Helper()
		tag := repository(r.registry, name, builder) + ":latest"
		return r.build(t, builder, platforms, s.dir, append([]string{"--push", "--tag", tag}, args...)...)
	}
}

// large are builds of a large context that nobody has seen before. Each build starts with empty caches. There is no goal
// but for memory: the context passes through the coordinator once for each platform.
func (r *rig) large(t farmtest.T, o options) []contest {
	s := newSource(t, o.Size)
	sides := []string{theFarm, twoNodes, oneNode}
	prepare := func(t farmtest.T) {
		r.forget(t)
		s.change(t)
	}
	what := fmt.Sprintf("%d MB context, two platforms", o.Size/1_000_000)
	return []contest{
		{name: what, sides: sides, rounds: o.Rounds, prepare: prepare, build: func(t farmtest.T, builder string) time.Duration {
			return r.build(t, builder, r.both, s.dir)
		}},
		{name: what + ", pushed", sides: sides, rounds: o.Rounds, prepare: prepare, build: func(t farmtest.T, builder string) (took time.Duration) {
			within(t, func(t farmtest.T) { // an empty registry, whose layers go with it
				registry := startRegistry(t, r.tools)
				took = r.build(t, builder, r.both, s.dir, "--push", "--tag", repository(registry, "large", builder), "--provenance=false")
			})
			return took
		}},
	}
}
