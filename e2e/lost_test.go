package e2e_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// goneLimit is how soon after a client or a worker is gone the farm must have noticed and cleaned up.
const goneLimit = 5 * time.Second

// oneSlot is a farm of one amd64 machine that builds one thing at a time.
func oneSlot() farmtest.WorkerSpec { return farmtest.WorkerSpec{Name: "amd-1", Slots: 1} }

// alone is a farm of one machine of each kind that does not wait for one that is lost.
func alone(t *testing.T) rig {
	t.Helper()
	farmOnly(t)
	return newFarm(t, farmtest.FarmOptions{
		Workers:         []farmtest.WorkerSpec{oneSlot(), {Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1}},
		CoordinatorArgs: []string{"--failover-wait", "0"},
	})
}

// atGate starts a build whose RUN step waits at a gate, and returns when it waits there.
func (r rig) atGate(t *testing.T, tag, platforms string) (*farmtest.Process, *farmtest.Gate) {
	t.Helper()
	gate := farmtest.NewGate(t)
	dockerfile := "FROM scratch AS base\nCOPY busybox /bin/busybox\nFROM base AS leg-amd64\n" + gate.Run() +
		"\nFROM base AS leg-arm64\nFROM leg-${TARGETARCH}\n"
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
	build := r.Client.StartBuild(t, "--platform", platforms, "--push", "-t", r.ref(tag), dir)
	gate.WaitArrival(t, build, startLimit)
	return build, gate
}

func idle(list []farmtest.WorkerStatus) bool { return farmtest.UsedSlots(list) == 0 }

func TestLost_WorkerMidBuildIsNamed(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	for name, kill := range map[string]func(*farmtest.FarmWorker){
		"its agent is killed":     func(w *farmtest.FarmWorker) { w.Agent.Kill() },
		"its buildkitd is killed": func(w *farmtest.FarmWorker) { w.Buildkitd.Kill() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := alone(t)
			build, _ := r.atGate(t, "v1", both)
			kill(r.Farm.Workers[0])
			if code := build.Wait(t, 20*time.Second); code == 0 {
				t.Fatalf("the build succeeded without its worker:\n%s", build.Output())
			}
			wantLost(t, build, "amd-1", "linux/amd64")
			r.wantNoTags(t)
			r.Farm.WaitWorkersWithin(t, goneLimit, "the other worker's slot is free", idle)
		})
	}
}

// frozenLimit is how soon a worker that has stopped without a word must have been noticed.
const frozenLimit = 15 * time.Second

// TestLost_AFrozenWorkerIsNamed stops a worker's agent as a machine that hangs does: its connections stay open.
func TestLost_AFrozenWorkerIsNamed(t *testing.T) {
	t.Parallel()
	r := alone(t)
	build, gate := r.atGate(t, "v1", both)
	agent := r.Farm.Workers[0].Agent
	agent.Signal(syscall.SIGSTOP)
	t.Cleanup(func() { agent.Signal(syscall.SIGCONT) }) // so that it can be stopped
	if code := build.Wait(t, frozenLimit); code == 0 {
		t.Fatalf("the build succeeded without its worker:\n%s", build.Output())
	}
	wantLost(t, build, "amd-1", "linux/amd64")
	r.wantNoTags(t)
	r.Farm.WaitWorkersWithin(t, goneLimit, "no slot is in use", idle)
	list, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	if w, known := farmtest.Find(list, "amd-1"); known && w.State == farmtest.Ready {
		t.Errorf("a frozen worker is called ready: %+v", w)
	}

	agent.Signal(syscall.SIGCONT)
	gate.WaitKilled(t, frozenLimit) // by the agent, which finds that nobody wants the attempt any more
	r.Farm.WaitWorkers(t, "the worker is back with its slot free", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return known && w.State == farmtest.Ready && w.Slots.Used == 0
	})
	r.buildsAMD64(t, "after")
}

// TestLost_AFrozenBuildkitdIsNoticed stops a worker's buildkitd: its agent sees that it does not answer.
func TestLost_AFrozenBuildkitdIsNoticed(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	daemon := r.Farm.Workers[0].Buildkitd
	freeze(t, r.Farm.Workers[0])
	r.Farm.WaitWorkersWithin(t, frozenLimit, "the worker takes nothing", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return known && w.State == "unavailable"
	})
	waiting := r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), r.legsContext(t))
	waiting.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
	daemon.Signal(syscall.SIGCONT)
	if code := waiting.Wait(t, buildLimit); code != 0 {
		t.Errorf("exit code %d:\n%s", code, waiting.Output())
	}
	r.checkLeg(t, r.registry.Index(t, r.repo, "v1"), "linux/amd64", "x86_64\n")
}

// wantLost checks that a build's error names the worker and the leg that were lost.
func wantLost(t *testing.T, build *farmtest.Process, names ...string) {
	t.Helper()
	last := build.Output()[max(0, strings.LastIndex(build.Output(), "ERROR:")):]
	for _, want := range names {
		if !strings.Contains(last, want) {
			t.Errorf("the error does not name %s: %s", want, last)
		}
	}
}

func TestLost_WorkerComesBack(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	r.Farm.Workers[0].Agent.Kill()
	r.Farm.WaitWorkers(t, "the dead worker is no longer ready", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return !known || w.State != farmtest.Ready
	})
	r.Farm.RestartAgent(t, r.Farm.Workers[0])
	r.Farm.WaitWorkers(t, "the worker is back", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return known && w.State == farmtest.Ready
	})
	r.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), r.legsContext(t))
	r.checkLeg(t, r.registry.Index(t, r.repo, "v1"), "linux/amd64", "x86_64\n")
}

func TestGone_AKilledClientsLegsEndAndItsSlotsAreFree(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]syscall.Signal{"killed": syscall.SIGKILL, "interrupted": syscall.SIGINT} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newFarmRig(t, oneSlot())
			build, gate := r.atGate(t, "v1", "linux/amd64")
			r.Farm.WaitWorkersWithin(t, goneLimit, "the build holds its slot", func(list []farmtest.WorkerStatus) bool {
				return farmtest.UsedSlots(list) == 1
			})
			if end == syscall.SIGKILL {
				build.Kill()
			} else {
				build.SignalGroup(end)
			}
			gate.WaitKilled(t, goneLimit)
			r.Farm.WaitWorkersWithin(t, goneLimit, "the slot is free", idle)
			r.wantNoTags(t)
			r.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref("after"), r.legsContext(t))
			wantList(t, "tags", r.registry.Tags(t, r.repo), "after")
		})
	}
}

func TestQueue_TheSecondBuildWaitsVisiblyAndThenRuns(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	first, gate := r.atGate(t, "first", "linux/amd64")
	second := r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("second"), r.legsContext(t))
	line := second.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
	t.Logf("the waiting build says: %s", line)
	if !strings.Contains(line+second.Output(), "linux/amd64") {
		t.Errorf("the queue step does not say what it waits for:\n%s", second.Output())
	}
	wantList(t, "tags while both wait", r.registry.Tags(t, r.repo))
	gate.Open()
	for _, build := range []*farmtest.Process{first, second} {
		if code := build.Wait(t, buildLimit); code != 0 {
			t.Errorf("exit code %d:\n%s", code, build.Output())
		}
	}
	wantList(t, "tags", r.registry.Tags(t, r.repo), "first", "second")
	r.checkLeg(t, r.registry.Index(t, r.repo, "second"), "linux/amd64", "x86_64\n")
	r.Farm.WaitWorkersWithin(t, goneLimit, "the slot is free", idle)
}

func TestQueue_AWaitingBuildThatIsKilledLeavesTheQueue(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	first, gate := r.atGate(t, "first", "linux/amd64")
	waiting := r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("waiting"), r.legsContext(t))
	waiting.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
	waiting.Kill()
	last := r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("last"), r.legsContext(t))
	last.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
	gate.Open()
	for _, build := range []*farmtest.Process{first, last} {
		if code := build.Wait(t, buildLimit); code != 0 {
			t.Errorf("exit code %d:\n%s", code, build.Output())
		}
	}
	wantList(t, "tags", r.registry.Tags(t, r.repo), "first", "last")
}

// lineAbout makes a match for the first line of the output that has the word, in any case.
func lineAbout(word string) func(string) string {
	return func(output string) string {
		for line := range strings.Lines(output) {
			if strings.Contains(strings.ToLower(line), word) {
				return strings.TrimSpace(line)
			}
		}
		return ""
	}
}
