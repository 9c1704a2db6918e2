package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

const (
	// How much longer than its peer the farm may take: than one buildkitd, of which it is two hops more; than buildx's
	// two nodes, for which the client does twice what it does for a farm; and than these with a context so large that
	// sending it is most of the build.
	goalOne, goalTwo, goalContext = 1.05, 1.00, 0.75
	// memoryGoal is what the coordinator's memory must stay below, in bytes.
	memoryGoal = 200 << 20
	// smallSize is the data in the context of the cached builds, in bytes.
	smallSize = 64 << 10
)

type jobPart struct {
	name    string
	measure func(context.Context, farmtest.T, options) []figure
}

// jobParts are the parts that measure jobs.
var jobParts = []jobPart{{"submit", submissions}, {"watch", fanOut}, {"list", lists}, {"restart", restarts}}

// buildParts are those that measure builds, but for the first, "builds".
var buildParts = []struct {
	name     string
	contests func(farmtest.T, options) []contest
}{
	{"narrow", narrow}, {"files", files}, {"rebuild", rebuilds}, {"cache", caches},
	{"failover", failovers}, {"relay", relays}, {"emulation", emulations},
}

// parts are all that can be measured by themselves.
func parts() []string {
	all := []string{"builds"}
	for _, p := range buildParts {
		all = append(all, p.name)
	}
	for _, p := range jobParts {
		all = append(all, p.name)
	}
	return all
}

// bench measures everything, or what was asked for, and writes what that gave to out.
func bench(ctx context.Context, t farmtest.T, o options, out io.Writer) {
	if !slices.ContainsFunc(jobParts, func(p jobPart) bool { return p.name == o.Only }) {
		builds(ctx, t, o, out)
	}
	if o.Only == "" || slices.ContainsFunc(jobParts, func(p jobPart) bool { return p.name == o.Only }) {
		jobs(ctx, t, o, out)
	}
}

// jobs measures jobs, and writes what that gave to out.
func jobs(ctx context.Context, t farmtest.T, o options, out io.Writer) {
	start := time.Now()
	var figures []figure
	defer func() { showFigures(t, out, figures) }() // what is known, if something ends this early
	for _, p := range jobParts {
		if o.selects(p.name) {
			figures = append(figures, p.measure(ctx, t, o)...)
			t.Logf("%s: done, %s after the start", p.name, time.Since(start).Round(time.Second))
		}
	}
	fmt.Fprintf(out, "%d CPUs, %s; clients, coordinator, database and stub workers share them; took %s\n", runtime.NumCPU(), runtime.Version(), time.Since(start).Round(time.Second))
}

// builds holds every contest of builds, and writes what they gave to out.
func builds(ctx context.Context, t farmtest.T, o options, out io.Writer) {
	start := time.Now()
	fmt.Fprintf(out, "%d CPUs, %s; wall-clock time of buildx build, sides in turns; the farm by TCP, others by unix socket\n", runtime.NumCPU(), runtime.Version())
	var outcomes []outcome
	defer func() { table(t, out, outcomes) }() // what is known, if something ends this early
	begun := start                             // this part
	hold := func(contests []contest) {
		for _, c := range contests {
			outcomes = append(outcomes, c.run(ctx, t, func() bool { return time.Since(begun) > o.Limit }))
			t.Logf("%s: done, %s after the start", c.name, time.Since(start).Round(time.Second))
		}
	}
	if o.selects("builds") {
		farmtest.Within(t, func(t farmtest.T) { newRig(t).builds(t, o, out, hold) })
	}
	for _, p := range buildParts {
		if begun = time.Now(); o.selects(p.name) {
			farmtest.Within(t, func(t farmtest.T) { hold(p.contests(t, o)) })
		}
	}
	fmt.Fprintf(out, "took %s\n", time.Since(start).Round(time.Second))
}

// builds are those whose memory counts, too.
func (r *rig) builds(t farmtest.T, o options, out io.Writer, hold func([]contest)) {
	hold(r.cached(t, o))
	memory := func(during string, do func()) {
		coordinator := r.farm.Coordinator.Pid()
		load.ResetPeak(t, coordinator)
		do()
		used := load.Peak(t, coordinator)
		fmt.Fprintf(out, "coordinator's peak memory with %s: %.0f MiB, goal below %d MiB: %s\n", during, mebibytes(used), memoryGoal>>20, verdict(used < memoryGoal))
	}
	memory("the large context", func() { hold(r.large(t, o)) })
	memory(fmt.Sprintf("%d builds at once", o.AtOnce), func() { r.atOnce(t, o) })
	memory(fmt.Sprintf("exports of a %d MB image", o.ImageSize/1_000_000), func() { hold(r.image(t, o)) })
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// cached are builds of which nothing has changed since the last: what they take is mostly overhead.
func (r *rig) cached(t farmtest.T, o options) []contest {
	contests := []contest{
		{name: "cached push, two platforms", sides: []string{theFarm, twoNodes, oneNode}, goal: goalTwo, build: r.cachedBuild(t, "two", r.both, "--provenance=false")},
		{name: "cached push, two platforms, provenance", sides: []string{theFarm, twoNodes, oneNode}, goal: goalTwo, build: r.cachedBuild(t, "proven", r.both)},
		{name: "cached push, one platform", sides: []string{theFarm, oneNode}, goal: goalOne, build: r.cachedBuild(t, "single", r.native, "--provenance=false")},
	}
	for i := range contests {
		c := &contests[i]
		c.rounds = o.CachedRounds
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

// large are builds of a large context that nobody has seen before. Each build starts with empty caches. To push what
// was built takes both sides the same, and there is no goal for that.
func (r *rig) large(t farmtest.T, o options) []contest {
	s := newSource(t, o.Size)
	sides := []string{theFarm, twoNodes, oneNode}
	prepare := func(t farmtest.T) {
		r.forget(t)
		s.change(t)
	}
	what := fmt.Sprintf("%d MB context, two platforms", o.Size/1_000_000)
	return []contest{
		{name: what, sides: sides, rounds: o.Rounds, goal: goalContext, prepare: prepare, build: func(t farmtest.T, builder string) time.Duration {
			return r.build(t, builder, r.both, s.dir)
		}},
		{name: what + ", pushed", sides: sides, rounds: o.Rounds, prepare: prepare, build: func(t farmtest.T, builder string) (took time.Duration) {
			farmtest.Within(t, func(t farmtest.T) { // an empty registry, whose layers go with it
				registry := load.StartRegistry(t, r.tools)
				took = r.build(t, builder, r.both, s.dir, "--push", "--tag", repository(registry, "large", builder), "--provenance=false")
			})
			return took
		}},
	}
}

// image exports one image of two platforms as an archive, again and again. Buildx's two nodes cannot: each would
// write its own.
func (r *rig) image(t farmtest.T, o options) []contest {
	s := newPair(t, r.both, o.ImageSize/2)
	dest := filepath.Join(farmtest.Folder(t), "image.tar")
	c := contest{name: fmt.Sprintf("%d MB image as an OCI archive, two platforms", o.ImageSize/1_000_000), sides: []string{theFarm, oneNode}, rounds: o.ImageRounds}
	c.build = func(t farmtest.T, builder string) time.Duration {
		t.Helper()
		took := r.build(t, builder, r.both, s.dir, "--provenance=false", "--output", "type=oci,compression=uncompressed,dest="+dest)
		if info, err := os.Stat(dest); err != nil || info.Size() < o.ImageSize {
			t.Fatalf("the archive is too small to hold both platforms: %v, %v", info, err)
		}
		return took
	}
	for _, side := range c.sides { // the first build takes the context in
		c.build(t, side)
	}
	return []contest{c}
}

// atOnce runs builds of two platforms at the farm at the same time, each with a context of its own.
func (r *rig) atOnce(t farmtest.T, o options) {
	t.Helper()
	var builds []*farmtest.Process
	for i := range o.AtOnce {
		s := newSource(t, o.Size/10)
		builds = append(builds, r.farm.Client.StartBuild(t, "--platform", r.both,
			"--push", "--tag", repository(r.registry, fmt.Sprintf("at-once-%d", i), theFarm)+":latest", s.dir))
	}
	for _, b := range builds {
		if code := b.Wait(t, o.Limit); code != 0 {
			t.Fatalf("one of %d builds at once: exit code %d:\n%s", o.AtOnce, code, b.Output())
		}
	}
}
