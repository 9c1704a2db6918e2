package e2e_test

import (
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// spare is a farm with two machines for amd64, of which the second is taken when the first is lost, and one for arm64.
func spare(t *testing.T, args ...string) rig {
	t.Helper()
	farmOnly(t)
	return newFarm(t, farmtest.FarmOptions{Workers: spares(), CoordinatorArgs: args})
}

func spares() []farmtest.WorkerSpec {
	return []farmtest.WorkerSpec{
		{Name: "amd-1", Slots: 2}, {Name: "amd-2", Slots: 1}, {Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1},
	}
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
			// A killed buildkitd whose agent has not noticed yet may have been tried once more.
			said := regexp.MustCompile(`\[linux/amd64\] worker ` + lost.Name + ` was lost; continuing on ` + other.Name + ` \(attempt [23] of 3\)`)
			if !said.MatchString(build.Output()) {
				t.Errorf("the build's output does not say %q:\n%s", said, build.Output())
			}
			r.checkGate(t, "v1")
		})
	}
}

// TestFailover_WhatGoesToTheClientIsWhole: of the lost attempt nothing is in what the client gets.
func TestFailover_WhatGoesToTheClientIsWhole(t *testing.T) {
	t.Parallel()
	for name, check := range map[string]func(*testing.T, string){
		"type=oci,tar=false,dest=DEST": func(t *testing.T, dest string) {
			var top, merged ocispec.Index
			readJSON(t, readFile(t, dest, "index.json"), &top)
			readJSON(t, readFile(t, dest, filepath.Join("blobs/sha256", top.Manifests[0].Digest.Encoded())), &merged)
			var found []string
			for _, desc := range merged.Manifests {
				readJSON(t, readFile(t, dest, filepath.Join("blobs/sha256", desc.Digest.Encoded())), &ocispec.Manifest{}) // is there
				if desc.Platform.OS != "unknown" {
					found = append(found, desc.Platform.OS+"/"+desc.Platform.Architecture)
				}
			}
			wantList(t, "platforms", found, "linux/amd64", "linux/arm64")
		},
		"type=local,dest=DEST,platform-split=true,mode=delete": func(t *testing.T, dest string) {
			wantEqual(t, "the step's file", readFile(t, dest, "linux_amd64/gate"), "open\n")
			wantEqual(t, "the other platform's file", readFile(t, dest, "linux_arm64/bin/busybox") != "", true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, gate := spare(t), farmtest.NewGate(t)
			dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch AS base\nCOPY busybox /bin/busybox\nFROM base AS leg-amd64\n" +
				gate.Run() + "\nFROM base AS leg-arm64\nFROM leg-${TARGETARCH}\n"})
			dest := filepath.Join(farmtest.Folder(t), "out")
			build := r.Client.StartBuild(t, "--allow", "buildx.local.delete", "--platform", both, "--output", strings.ReplaceAll(name, "DEST", dest), dir)
			gate.WaitArrival(t, build, startLimit)
			lost, _ := r.amd(t, build)
			lost.Agent.Kill()
			gate.WaitArrival(t, build, frozenLimit)
			gate.Open()
			if code := build.Wait(t, buildLimit); code != 0 {
				t.Fatalf("exit code %d:\n%s", code, build.Output())
			}
			check(t, dest)
		})
	}
}

// checkGate checks that a tag is of both platforms, and has what the step at the gate has written.
func (r rig) checkGate(t *testing.T, tag string) {
	t.Helper()
	index := r.registry.Index(t, r.repo, tag)
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	wantEqual(t, "the step's file", r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["gate"], "open\n")
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

// TestFailover_AWorkerThatComesBackIsTakenAgain: no other runs its platform.
func TestFailover_AWorkerThatComesBackIsTakenAgain(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot(), farmtest.WorkerSpec{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1})
	build, gate := r.atGate(t, "v1", both)
	r.Farm.Workers[0].Agent.Kill()
	build.WaitOutput(t, startLimit, "that the leg waits", lineAbout("worker amd-1 was lost; queued for a worker"))
	r.Farm.RestartAgent(t, r.Farm.Workers[0])
	gate.WaitArrival(t, build, startLimit)
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	r.checkGate(t, "v1")
}

func TestFailover_NobodyWaitsForEver(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newFarm(t, farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{oneSlot()}, CoordinatorArgs: []string{"--failover-wait", "3s"}})
	build, _ := r.atGate(t, "v1", "linux/amd64")
	r.Farm.Workers[0].Agent.Kill()
	if code := build.Wait(t, 30*time.Second); code == 0 {
		t.Fatalf("the build succeeded without its worker:\n%s", build.Output())
	}
	wantLost(t, build, "amd-1", "linux/amd64", "none came back within 3s")
	r.wantNoTags(t)
}

// TestFailover_ABuildThatEndsItsWorkersIsGivenUp: the fourth worker is spared.
func TestFailover_ABuildThatEndsItsWorkersIsGivenUp(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1}, farmtest.WorkerSpec{Name: "amd-2", Slots: 1}, farmtest.WorkerSpec{Name: "amd-3", Slots: 1}, farmtest.WorkerSpec{Name: "amd-4", Slots: 1})
	build, gate := r.atGate(t, "v1", "linux/amd64")
	for attempt := 1; ; attempt++ {
		used := func() (out *farmtest.FarmWorker) {
			r.Farm.WaitWorkers(t, "the leg is on a worker", func(list []farmtest.WorkerStatus) bool {
				for _, w := range r.Farm.Workers {
					if status, known := farmtest.Find(list, w.Name); known && status.Slots.Used == 1 && status.State == farmtest.Ready {
						out = w
					}
				}
				return out != nil
			})
			return out
		}()
		used.Agent.Kill()
		if attempt == 3 {
			break
		}
		gate.WaitArrival(t, build, startLimit)
	}
	if code := build.Wait(t, 20*time.Second); code == 0 {
		t.Fatalf("the build succeeded:\n%s", build.Output())
	}
	wantLost(t, build, "linux/amd64", "attempt 3 of 3", "may be what ends its workers")
	r.wantNoTags(t)
}

// TestFailover_WhereverTheLegIs kills the worker at other moments of a leg's life than a RUN step.
func TestFailover_WhereverTheLegIs(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("0123456789abcdef", 4<<20) // 64 MiB
	for name, test := range map[string]struct {
		when string // the line of the build's output at which the worker is killed
		held bool   // the registry takes nothing before that
	}{
		"it reads the context":  {when: "transferring context"},
		"it exports its layers": {when: "exporting layers"},
		"it pushes them":        {when: "pushing layers", held: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			farmOnly(t)
			tools, letGo := farmtest.FindFarmTools(t), make(chan struct{})
			registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{Fault: func(q *http.Request) int {
				if test.held && q.Method != http.MethodGet && q.Method != http.MethodHead {
					select {
					case <-letGo:
					case <-q.Context().Done():
					}
				}
				return 0
			}})
			r := rigAt(t, tools, &farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: spares()}).Endpoint, registry)
			dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY big /big\nCOPY hello /hello\n", "big": big, "hello": "hello\n"})
			build := r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), dir)
			lost, _ := r.amd(t, build)
			build.WaitOutput(t, buildLimit, test.when, lineAbout(test.when))
			lost.Buildkitd.Kill()
			close(letGo)
			if code := build.Wait(t, buildLimit); code != 0 {
				t.Fatalf("exit code %d:\n%s", code, build.Output())
			}
			if !strings.Contains(build.Output(), "worker "+lost.Name+" was lost; continuing on ") {
				t.Errorf("the leg was not continued: it had ended:\n%s", build.Output())
			}
			index := r.registry.Index(t, r.repo, "v1")
			wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
			for _, platform := range index.Platforms() {
				image := r.registry.Image(t, r.repo, index.For(t, platform))
				if image.Files["hello"] != "hello\n" || image.Files["big"] != big {
					t.Errorf("the image of %s has not the files of the context", platform)
				}
			}
		})
	}
}
