package main

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// TestBench_ShortRunFillsTheTable runs every contest once, with the real parts.
func TestBench_ShortRunFillsTheTable(t *testing.T) {
	if testing.Short() {
		t.Skip("starts buildkitds")
	}
	farmtest.FindFarmTools(t) // skips, or fails, where they are missing
	var out strings.Builder
	bench(t.Context(), t, shortly(), &out)
	for _, want := range []string{
		"cached push, two platforms  ", "cached push, two platforms, provenance", "cached push, one platform",
		"5 MB context, two platforms  ", "5 MB context, two platforms, pushed", "coordinator's peak memory",
		"5 MB context, two platforms, uplink of 100 Mbit/s", "500 small files", "rebuild, one of 5 files",
		"farm 5 of 5 amd64, 5 of 5 arm64 (goal: all ok)", "a worker lost during a step of 2s", "CPU time by GB relayed: an OCI archive",
		"a step bound by the CPU, emulated",
		"durable submissions, 64 clients, SQLite", "an event reaches 20 watchers", "the newest page of 20000 jobs", "start with 200 queued",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
}

func TestContest_EverySideBeginsARoundInTurn(t *testing.T) {
	t.Parallel()
	var order []string
	prepared := 0
	c := contest{
		sides: []string{"a", "b", "c"}, rounds: 4,
		prepare: func(farmtest.T) { prepared++ },
		build: func(_ farmtest.T, builder string) time.Duration {
			order = append(order, builder)
			return time.Duration(len(order))
		},
	}
	got := c.run(t.Context(), t, func() bool { return false })
	if s := strings.Join(order, ""); s != "abcbcacababc" {
		t.Errorf("the order was %s", s)
	}
	if prepared != len(order) {
		t.Errorf("%d builds were prepared %d times", len(order), prepared)
	}
	if want := []time.Duration{1, 6, 8, 10}; !slices.Equal(got.took[0], want) {
		t.Errorf("a's times are %v, want %v, by round", got.took[0], want)
	}
}

func TestContest_OutOfTimeKeepsOneRound(t *testing.T) {
	t.Parallel()
	c := contest{sides: []string{"a", "b"}, rounds: 5, build: func(farmtest.T, string) time.Duration { return time.Second }}
	if got := c.run(t.Context(), t, func() bool { return true }); got.rounds() != 1 {
		t.Errorf("%d rounds, want 1", got.rounds())
	}
}

func TestContest_InterruptEndsTheRun(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	var log strings.Builder
	p := &farmtest.Program{Title: "bench", Log: &log}
	undone := false
	ok := p.Run(func() {
		p.Cleanup(func() { undone = true })
		c := contest{sides: []string{"a", "b"}, rounds: 5, build: func(farmtest.T, string) time.Duration { cancel(); return 0 }}
		c.run(ctx, p, func() bool { return false })
		t.Error("the contest went on")
	})
	if ok || !undone || !strings.Contains(log.String(), "interrupted") {
		t.Errorf("ok %v, clean-up %v, log %q", ok, undone, log.String())
	}
}

func TestMedian(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		of   []time.Duration
		want time.Duration
	}{{[]time.Duration{7}, 7}, {[]time.Duration{9, 1}, 5}, {[]time.Duration{100, 1, 3}, 3}, {[]time.Duration{8, 2, 4, 1000}, 6}} {
		given := slices.Clone(c.of)
		if got := median(c.of); got != c.want || !slices.Equal(given, c.of) {
			t.Errorf("median(%v) = %v, want %v, and the list as it was", given, got, c.want)
		}
	}
}

func TestTable_ShowsRatioSpreadAndVerdict(t *testing.T) {
	t.Parallel()
	ms := time.Millisecond
	took := [][]time.Duration{{110 * ms, 120 * ms, 130 * ms}, {100 * ms, 100 * ms, 100 * ms}, {90 * ms, 80 * ms, 85 * ms}}
	for _, c := range []struct {
		goal float64
		want string
	}{{1.1, "1.10 MISS"}, {1.25, "1.25 ok"}, {0, "-"}} {
		var out strings.Builder
		table(t, &out, []outcome{{contest{name: "case one", sides: []string{theFarm, twoNodes, oneNode}, goal: c.goal}, took}})
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		got := strings.Join(strings.Fields(lines[len(lines)-1]), " ")
		want := "case one 3 farm 120 ms two nodes 100 ms 1.200 1.10..1.30 " + c.want + " one buildkitd 85 ms"
		if got != want {
			t.Errorf("goal %v:\n got %s\nwant %s", c.goal, got, want)
		}
	}
}

func TestTable_WhatCannotBeMeasuredIsSaid(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	c := absent("emulation", "not installed", emulated, natively)
	table(t, &out, []outcome{c.run(t.Context(), t, func() bool { return false })})
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if got, want := strings.Join(strings.Fields(lines[len(lines)-1]), " "), "emulation 0 qemu-user - native - - - - not installed"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCountHits_ByArchitecture(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		output, want string
		complete     bool
	}{
		"nothing built": {"#1 [internal] load .dockerignore\n#1 DONE 0.0s\n", "none", false},
		"a farm": {"#1 [linux/arm64] assigned to worker one\n#1 DONE 0.0s\n\n#2 [linux/arm64 base 1/1] COPY a /a\n#2 CACHED\n\n" +
			"#12 [linux/amd64 base 1/1] COPY a /a\n#12 DONE 0.1s\n", "0 of 1 amd64, 1 of 1 arm64", false},
		"two nodes, of which one fetches": {"#4 [linux/amd64 base 1/1] COPY a /a\n#4 extracting sha256:12 done\n#4 DONE 0.1s\n\n" +
			"#5 [stage-2 2/2] RUN [\"head > /after-arm64\"]\n#5 CACHED\n", "1 of 1 amd64, 1 of 1 arm64", true},
		"a step that is shown twice": {"#4 [linux/amd64 1/1] COPY a /a\n#4 CACHED\n\n#4 [linux/amd64 1/1] COPY a /a\n#4 CACHED\n", "1 of 1 amd64", false},
	} {
		if got := countHits(c.output); got.String() != c.want || got.complete() != c.complete {
			t.Errorf("%s: %q, complete %v, want %q", name, got, got.complete(), c.want)
		}
	}
}

func TestPerGB(t *testing.T) {
	t.Parallel()
	if got := perGB(time.Second, 200_000_000); got != 5*time.Second {
		t.Errorf("a second for 200 MB is %s by GB", got)
	}
}

func TestParts_EachHasOneName(t *testing.T) {
	t.Parallel()
	all := parts()
	slices.Sort(all)
	if len(slices.Compact(slices.Clone(all))) != len(all) {
		t.Errorf("parts share names: %v", all)
	}
	for _, name := range all {
		if o := (options{Only: name}); !o.selects(name) || o.selects("others") {
			t.Errorf("-only %s selects something else", name)
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	usual := options{
		Rounds: 10, CachedRounds: 30, Size: 200_000_000, ImageRounds: 3, ImageSize: 2_000_000_000, AtOnce: 20, Limit: 7 * time.Minute,
		Turns: 3, Files: 20_000, Step: 6 * time.Second, Burn: 4,
		Window: 10 * time.Second, Watchers: 1000, History: 1_000_000, Queued: 10_000,
	}
	small, briefWatch, relayOnly := usual, shortly(), usual
	relayOnly.Only, relayOnly.Turns = "relay", 1
	small.Rounds, small.Size = 3, 7_000_000
	briefWatch.Only = "watch"
	for _, c := range []struct {
		args []string
		ok   bool
		want options
	}{
		{nil, true, usual},
		{[]string{"-short"}, true, shortly()},
		{[]string{"-short", "-only", "watch"}, true, briefWatch},
		{[]string{"-rounds", "3", "-megabytes", "7"}, true, small},
		{[]string{"-only", "relay", "-turns", "1"}, true, relayOnly},
		{[]string{"-rounds", "0"}, false, options{}},
		{[]string{"-turns", "0"}, false, options{}},
		{[]string{"-step", "1ms"}, false, options{}},
		{[]string{"-only", "nothing"}, false, options{}},
		{[]string{"-history", "1000"}, false, options{}},
		{[]string{"more"}, false, options{}},
	} {
		got, err := parse(c.args)
		if (err == nil) != c.ok || c.ok && got != c.want {
			t.Errorf("parse(%q) = %+v, %v", c.args, got, err)
		}
	}
}
