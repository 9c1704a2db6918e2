package e2e_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// spare is a farm with two machines for amd64, of which the second is taken when the first is lost, and one for arm64.
func spare(t *testing.T, args ...string) rig {
	t.Helper()
	farmOnly(t)
	return newFarm(t, farmtest.FarmOptions{
		Workers: []farmtest.WorkerSpec{
			{Name: "amd-1", Slots: 2}, {Name: "amd-2", Slots: 1}, {Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1},
		},
		CoordinatorArgs: args,
	})
}

// losses are the ways in which a worker is lost.
var losses = map[string]func(*testing.T, *farmtest.FarmWorker){
	"its agent is killed":     func(_ *testing.T, w *farmtest.FarmWorker) { w.Agent.Kill() },
	"its buildkitd is killed": func(_ *testing.T, w *farmtest.FarmWorker) { w.Buildkitd.Kill() },
	"both are killed":         func(_ *testing.T, w *farmtest.FarmWorker) { w.Buildkitd.Kill(); w.Agent.Kill() },
	"its agent is frozen": func(t *testing.T, w *farmtest.FarmWorker) {
		w.Agent.Signal(syscall.SIGSTOP)
		t.Cleanup(func() { w.Agent.Signal(syscall.SIGCONT) }) // so that it can be stopped
	},
}

// amd is the worker that a build's amd64 leg is on.
func (r rig) amd(t *testing.T, build *farmtest.Process) (on, other *farmtest.FarmWorker) {
	t.Helper()
	build.WaitOutput(t, startLimit, "where the amd64 leg is", lineAbout("[linux/amd64] assigned to worker amd-"))
	if strings.Contains(build.Output(), "[linux/amd64] assigned to worker amd-1") {
		return r.Farm.Workers[0], r.Farm.Workers[1]
	}
	return r.Farm.Workers[1], r.Farm.Workers[0]
}

func TestFailover_ALostWorkersLegGoesOnElsewhere(t *testing.T) {
	t.Parallel()
	for name, lose := range losses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := spare(t)
			build, gate := r.atGate(t, "v1", both)
			lost, other := r.amd(t, build)
			lose(t, lost)
			gate.WaitArrival(t, build, frozenLimit)
			gate.Open()
			if code := build.Wait(t, buildLimit); code != 0 {
				t.Fatalf("exit code %d:\n%s", code, build.Output())
			}
			want := "[linux/amd64] worker " + lost.Name + " was lost; continuing on " + other.Name + " (attempt 2 of 3)"
			if !strings.Contains(build.Output(), want) {
				t.Errorf("the build's output does not say %q:\n%s", want, build.Output())
			}
			index := r.registry.Index(t, r.repo, "v1")
			wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
			wantEqual(t, "the step's file", r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["gate"], "open\n")
		})
	}
}

// TestFailover_SwitchedOffNothingGoesOn shows that the others test what they say.
func TestFailover_SwitchedOffNothingGoesOn(t *testing.T) {
	t.Parallel()
	r := spare(t, "--leg-attempts", "1")
	build, _ := r.atGate(t, "v1", both)
	lost, _ := r.amd(t, build)
	lost.Agent.Kill()
	if code := build.Wait(t, 20*time.Second); code == 0 {
		t.Fatalf("the build succeeded without its worker:\n%s", build.Output())
	}
	wantLost(t, build, lost.Name, "linux/amd64")
	r.wantNoTags(t)
}
