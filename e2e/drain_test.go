package e2e_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// exitTimeout is the exit code of archfarm drain --wait whose --timeout has passed.
const exitTimeout = 3

// start starts an archfarm command that talks to the farm.
func (r rig) start(t *testing.T, args ...string) *farmtest.Process {
	t.Helper()
	return farmtest.StartProcess(t, farmtest.Spec{
		Name: "archfarm " + args[0], Path: r.tools.Archfarm, Args: append(args, "--farm", r.Farm.Addr), Keep: true,
	})
}

// archfarm runs an archfarm command that must succeed, and returns what it says.
func (r rig) archfarm(t *testing.T, command string, args ...string) string {
	t.Helper()
	result := r.Farm.Archfarm(t, command, args...)
	if result.Code != 0 {
		t.Fatalf("archfarm %s %s: exit code %d:\n%s", command, strings.Join(args, " "), result.Code, result.Output)
	}
	return result.Output
}

// jsonOf runs an archfarm command with --output json that must succeed.
func jsonOf[V any](t *testing.T, r rig, command string, args ...string) V {
	t.Helper()
	return unmarshal[V](t, r.archfarm(t, command, append(args, "--output", "json")...))
}

func unmarshal[V any](t *testing.T, output string) V {
	t.Helper()
	var out V
	if err := json.Unmarshal([]byte(output), &out); err != nil {
		t.Fatalf("%v:\n%s", err, output)
	}
	return out
}

// queued is one element of what archfarm queue --output json prints.
type queued struct {
	Build, Platform, Tenant, Reason string
	Pools                           []string
	Since                           time.Time
	Ahead                           int
	Estimate                        float64 `json:"estimate_seconds"`
}

// explained is one element of what archfarm explain --output json prints.
type explained struct {
	Platform, Worker, Summary string
	Workers                   []verdict
}

type verdict struct {
	Worker   string
	Eligible bool
	Reason   string
}

// isState matches the fleet where a worker has a state, for a reason that has the text in it.
func isState(name, state, reason string) func([]farmtest.WorkerStatus) bool {
	return func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, name)
		return known && w.State == state && strings.Contains(w.Reason, reason)
	}
}

// wantTexts checks that something says each of the texts.
func wantTexts(t *testing.T, what, got string, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if !strings.Contains(got, text) {
			t.Errorf("%s does not say %q:\n%s", what, text, got)
		}
	}
}

// wantBuilt checks that a build succeeded, and that its tag is the image whose step came through the gate.
func (r rig) wantBuilt(t *testing.T, build *farmtest.Process, tag string) {
	t.Helper()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Errorf("%s: exit code %d:\n%s", tag, code, build.Output())
		return
	}
	image := r.registry.Image(t, r.repo, r.registry.Index(t, r.repo, tag).For(t, "linux/amd64"))
	wantEqual(t, tag+": /gate", image.Files["gate"], "open\n")
}

// TestDrain_AnOrderKillsNothing drains the only worker while a build runs there, with a second slot free.
func TestDrain_AnOrderKillsNothing(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 2})
	build, gate := r.atGate(t, "running", "linux/amd64")

	asked := time.Now()
	drain := r.start(t, "drain", "amd-1", "--reason", "a new disk", "--wait")
	drain.WaitOutput(t, startLimit, "what still runs", farmtest.Contains("amd-1: draining, 1 attempt still runs"))
	t.Logf("draining %s after the command", time.Since(asked).Round(time.Millisecond))
	const reason = "drained by an operator: a new disk"
	r.Farm.WaitWorkersWithin(t, goneLimit, "the worker drains, and its build goes on", func(list []farmtest.WorkerStatus) bool {
		return isState("amd-1", "draining", reason)(list) && farmtest.UsedSlots(list) == 1
	})
	wantTexts(t, "archfarm workers", r.archfarm(t, "workers", "--state", "draining"), "amd-1", "1/2", "draining", reason)

	waiting := r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("waiting"), r.legsContext(t))
	waiting.WaitOutput(t, startLimit, "that it waits for a worker that drains", lineAbout("draining"))
	late := r.Farm.Archfarm(t, "drain", "amd-1", "--wait", "--timeout", "1s", "--reason", "a new disk")
	wantEqual(t, "exit code of --wait that has waited in vain", late.Code, exitTimeout)
	wantTexts(t, "archfarm drain --timeout 1s", late.Output, "after 1s", "amd-1 (1 attempt still runs)", "draining goes on")
	if !build.Running() || !waiting.Running() || !drain.Running() {
		t.Fatalf("the build, the one that waits, or archfarm drain has ended:\n%s\n%s\n%s", build.Tail(), waiting.Tail(), drain.Tail())
	}

	gate.Open()
	r.wantBuilt(t, build, "running")
	ended := time.Now()
	wantEqual(t, "exit code of archfarm drain --wait", drain.Wait(t, startLimit), 0)
	t.Logf("drained %s after the build had ended", time.Since(ended).Round(time.Millisecond))
	wantTexts(t, "archfarm drain --wait", drain.Output(), "amd-1: drained\n")
	wantList(t, "tags while it is drained", r.registry.Tags(t, r.repo), "running")

	wantTexts(t, "archfarm uncordon", r.archfarm(t, "uncordon", "amd-1"), "amd-1: ready")
	if code := waiting.Wait(t, buildLimit); code != 0 {
		t.Fatalf("the build that waited: exit code %d:\n%s", code, waiting.Output())
	}
	r.checkLeg(t, r.registry.Index(t, r.repo, "waiting"), "linux/amd64", "x86_64\n")
}

// TestDrain_OthersTakeWhatComes drains one of two workers, and waits for both.
func TestDrain_OthersTakeWhatComes(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot(), farmtest.WorkerSpec{Name: "amd-2", Slots: 1})
	build, gate := r.atGate(t, "running", "linux/amd64")
	busy, other := "amd-1", "amd-2"
	if r.attempts(t)[busy] == 0 {
		busy, other = other, busy
	}
	r.archfarm(t, "drain", busy)
	// The worker that takes it has never seen the project, but for that it is the better one.
	r.buildsAMD64(t, "elsewhere")
	r.buildsAMD64(t, "elsewhere-2")
	wantEqual(t, "attempts on the worker that drains", r.attempts(t)[busy], 1)
	wantEqual(t, "attempts on the other", r.attempts(t)[other], 2)

	drain := r.start(t, "drain", busy, other, "--wait")
	drain.WaitOutput(t, startLimit, "what runs nowhere", farmtest.Contains(other+": draining, nothing runs there"))
	gate.Open()
	r.wantBuilt(t, build, "running")
	wantEqual(t, "exit code of archfarm drain --wait", drain.Wait(t, startLimit), 0)
	wantTexts(t, "archfarm drain --wait", drain.Output(), busy+": drained\n", other+": drained\n")
}

// attempts is how many attempts each worker was given since the coordinator started.
func (r rig) attempts(t *testing.T) map[string]int {
	t.Helper()
	_, body, err := get(r.Farm.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for line := range strings.Lines(body) {
		labels, ok := strings.CutPrefix(line, "archfarm_leg_attempts_total{")
		if !ok {
			continue
		}
		_, worker, _ := strings.Cut(labels, `worker="`)
		worker, _, _ = strings.Cut(worker, `"`)
		var n int
		if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' '):], &n); err != nil || worker == "" {
			t.Fatalf("%v: %s", err, line)
		}
		out[worker] += n
	}
	return out
}

// TestDrain_TheOrderOutlivesRestarts stops the agent, kills it, and restarts the coordinator.
func TestDrain_TheOrderOutlivesRestarts(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1, Dials: true})
	w := r.Farm.Workers[0]
	anew := func(what string, stays func([]farmtest.WorkerStatus) bool) {
		t.Helper()
		r.Farm.WaitWorkersWithin(t, goneLimit, "its agent has left", func(list []farmtest.WorkerStatus) bool { return len(list) == 0 })
		r.Farm.RestartAgent(t, w)
		r.Farm.WaitWorkers(t, what, func(list []farmtest.WorkerStatus) bool {
			if len(list) > 0 && !stays(list) {
				t.Fatalf("not %s, but %+v", what, list)
			}
			return stays(list)
		})
	}
	r.archfarm(t, "drain", "amd-1", "--reason", "a new disk")
	draining := isState("amd-1", "draining", "drained by an operator: a new disk")
	w.Agent.Stop(t)
	anew("draining after the agent's restart", draining)
	r.Farm.RestartCoordinator(t)
	r.Farm.WaitWorkers(t, "draining after the coordinator's restart", draining)

	r.archfarm(t, "cordon", "amd-1", "--reason", "looks slow today")
	w.Agent.Kill()
	anew("cordoned after the agent's end", isState("amd-1", "cordoned", "cordoned by an operator: looks slow today"))

	r.archfarm(t, "uncordon", "amd-1")
	w.Agent.Kill()
	anew("ready after the agent's end", isState("amd-1", farmtest.Ready, ""))
	r.buildsAMD64(t, "v1")
}

func TestDrain_WhatCannotBeDrainedIsSaid(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	result := r.Farm.Archfarm(t, "drain", "amd-1", "amd-7", "--wait")
	wantEqual(t, "exit code", result.Code, 1)
	wantTexts(t, "archfarm drain", result.Output, "drain amd-7", "amd-1: draining, nothing runs there", "amd-1: drained")
	wantEqual(t, "exit code of a --timeout without --wait", r.Farm.Archfarm(t, "drain", "amd-1", "--timeout", "1s").Code, 2)
}

// explainRig is a farm where a build runs on amd-1, amd-2 is cordoned, and another build waits, for its own gate.
func explainRig(t *testing.T) (r rig, running, waiting *farmtest.Process, gates [2]*farmtest.Gate) {
	t.Helper()
	r = newFarmRig(t, oneSlot(), farmtest.WorkerSpec{Name: "amd-2", Slots: 1, Dials: true},
		farmtest.WorkerSpec{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1})
	r.archfarm(t, "cordon", "amd-2", "--reason", "looks slow today")
	running, gates[0] = r.atGate(t, "running", "linux/amd64")
	gates[1] = farmtest.NewGate(t)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + gates[1].Run() + "\n"})
	waiting = r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("waiting"), dir)
	waiting.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
	return r, running, waiting, gates
}

// TestExplain_AWaitingBuildIsToldWhy asks by its reference, while it waits, runs, and is over.
func TestExplain_AWaitingBuildIsToldWhy(t *testing.T) {
	t.Parallel()
	r, running, waiting, gates := explainRig(t)
	legs := jsonOf[[]queued](t, r, "queue")
	if len(legs) != 1 {
		t.Fatalf("want one leg in the queue: %+v", legs)
	}
	leg := legs[0]
	wantEqual(t, "platform in the queue", leg.Platform, "linux/amd64")
	wantEqual(t, "legs ahead", leg.Ahead, 0)
	wantTexts(t, "the reason in the queue", leg.Reason, "1 full", "1 cordoned")
	if leg.Build == "" || leg.Pools == nil || leg.Since.IsZero() || time.Since(leg.Since) > time.Minute {
		t.Errorf("the queue says %+v", leg)
	}
	table := r.archfarm(t, "queue")
	wantTexts(t, "archfarm queue", table, "BUILD", "PLATFORM", "REASON", leg.Build, "linux/amd64", "any", "cordoned")
	t.Logf("archfarm queue:\n%s", table)

	table = r.archfarm(t, "explain", leg.Build)
	wantTexts(t, "archfarm explain", table, "linux/amd64: waiting ", "amd-1", "amd-2", "arm-1", "looks slow today")
	t.Logf("archfarm explain of a build that waits:\n%s", table)
	one := r.explain(t, leg.Build)
	wantTexts(t, "the summary", one.Summary, "waiting", "is full", "is cordoned")
	r.wantVerdicts(t, one)

	gates[0].Open()
	gates[1].WaitArrival(t, waiting, buildLimit)
	one = r.explain(t, leg.Build)
	wantEqual(t, "where it runs", one.Worker, "amd-1")
	wantTexts(t, "the summary", one.Summary, "running on amd-1 for ")
	gates[1].Open()
	r.wantBuilt(t, running, "running")
	r.wantBuilt(t, waiting, "waiting")
	wantFailure(t, r.Farm.Archfarm(t, "explain", leg.Build), "no such build is running")
	wantEqual(t, "what waits in the end", len(jsonOf[[]queued](t, r, "queue")), 0)
}

func (r rig) explain(t *testing.T, args ...string) explained {
	t.Helper()
	legs := jsonOf[[]explained](t, r, "explain", args...)
	if len(legs) != 1 {
		t.Fatalf("archfarm explain %s: want one leg: %+v", args, legs)
	}
	return legs[0]
}

// wantVerdicts checks what is said of each worker of explainRig to a leg for amd64.
func (r rig) wantVerdicts(t *testing.T, got explained) {
	t.Helper()
	want := []verdict{
		{"amd-1", true, "full: 1 of 1 slots"},
		{"amd-2", false, "cordoned: cordoned by an operator: looks slow today"},
		{"arm-1", false, "runs linux/arm64 only"},
	}
	if !slices.Equal(got.Workers, want) {
		t.Errorf("verdicts\n%+v, want\n%+v", got.Workers, want)
	}
}

// TestExplain_APlatformIsToldWhereItWouldRun asks for platforms of a farm that is busy.
func TestExplain_APlatformIsToldWhereItWouldRun(t *testing.T) {
	t.Parallel()
	r, _, waiting, _ := explainRig(t)
	amd := r.explain(t, "linux/amd64")
	wantEqual(t, "platform", amd.Platform, "linux/amd64")
	wantTexts(t, "the summary for amd64", amd.Summary, "would wait", "is full", "is cordoned", "1 leg comes first")
	r.wantVerdicts(t, amd)
	arm := r.explain(t, "arm64") // as people write it
	wantEqual(t, "platform", arm.Platform, "linux/arm64")
	wantTexts(t, "the summary for arm64", arm.Summary, "would run on arm-1")
	risc := r.explain(t, "linux/riscv64")
	wantTexts(t, "the summary for riscv64", risc.Summary, "would be refused", "no native worker for linux/riscv64")
	for _, v := range risc.Workers {
		if v.Eligible || !strings.Contains(v.Reason, "only") {
			t.Errorf("for riscv64: %+v", v)
		}
	}
	for _, subject := range []string{"linux/amd64", "linux/arm64", "linux/riscv64"} {
		t.Logf("archfarm explain %s:\n%s", subject, r.archfarm(t, "explain", subject))
	}

	r.archfarm(t, "uncordon", "amd-2")
	waiting.WaitOutput(t, startLimit, "that amd-2 takes it", lineAbout("assigned to worker amd-2"))
}
