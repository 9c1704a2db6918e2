package e2e_test

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
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
	"its buildkitd is frozen": freeze,
}

// freeze stops a worker's buildkitd as a machine that hangs does; its agent goes on.
func freeze(t *testing.T, w *farmtest.FarmWorker) {
	w.Buildkitd.Signal(syscall.SIGSTOP)
	t.Cleanup(func() { w.Buildkitd.Signal(syscall.SIGCONT) })
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
			r.wantContinued(t, build, gate, lost, other)
		})
	}
}

// wantContinued checks that a build whose worker was lost just now goes on on the other one, and ends well.
func (r rig) wantContinued(t *testing.T, build *farmtest.Process, gate *farmtest.Gate, lost, other *farmtest.FarmWorker) {
	t.Helper()
	at := time.Now()
	build.WaitOutput(t, frozenLimit, "that the worker was lost", lineAbout("worker "+lost.Name+" was lost"))
	noticed := since(at)
	gate.WaitArrival(t, build, frozenLimit)
	t.Logf("noticed after %s, the step runs again after %s", noticed, since(at))
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	want := "[linux/amd64] worker " + lost.Name + " was lost; continuing on " + other.Name + " (attempt 2 of 3)"
	if !strings.Contains(build.Output(), want) {
		t.Errorf("the build's output does not say %q:\n%s", want, build.Output())
	}
	r.checkGate(t, "v1")
}

// TestFailover_AWorkersNetworkIsDropped has everything between a worker and the coordinator vanish, without a word.
func TestFailover_AWorkersNetworkIsDropped(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, spares()[1:]...)
	line := farmtest.NewMeter(t, r.Farm.Addr)
	lost := r.Farm.AddWorker(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 2, Dials: true, Via: line.Addr})
	r.Farm.WaitWorkers(t, "it is ready", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, lost.Name)
		return known && w.State == farmtest.Ready
	})
	build, gate := r.atGate(t, "v1", both)
	if !strings.Contains(build.Output(), "[linux/amd64] assigned to worker "+lost.Name) {
		t.Fatalf("the leg is not on the worker with the most room:\n%s", build.Output())
	}
	line.Drop(t)
	r.wantContinued(t, build, gate, lost, r.Farm.Workers[0])
}

// TestFailover_AStepThatFailsIsNotTriedAgain, not even one that ends as if its machine had been lost.
func TestFailover_AStepThatFailsIsNotTriedAgain(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{"it exits": "exit 7", "as one that is killed": "exit 137"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, gate := spare(t), farmtest.NewGate(t)
			gate.Open()
			dir := r.step(t, farmtest.Run("/bin/busybox wget -q -O /gate "+gate.URL+"; "+script), name)
			result := r.Client.TryBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), dir)
			wantFailure(t, result, "did not complete successfully")
			if strings.Contains(result.Output, "was lost") {
				t.Errorf("a worker is said to have been lost:\n%s", result.Output)
			}
			wantEqual(t, "how often the step ran", gate.Arrivals(), 1)
			r.wantNoTags(t)
		})
	}
}

// TestFailover_ALinkedTarget loses the worker of targets that build on one another, in the middle of either.
func TestFailover_ALinkedTarget(t *testing.T) {
	t.Parallel()
	for _, at := range []string{"base", "top"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			r, gate := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 2}, farmtest.WorkerSpec{Name: "amd-2", Slots: 2}), farmtest.NewGate(t)
			steps := map[string]string{"base": "COPY app /at-base\n", "top": "COPY app /at-top\n"}
			steps[at] += gate.Run() + "\n"
			file := strings.ReplaceAll(r.bakeFile([3]string{"base", "base.Dockerfile"},
				[3]string{"top", "top.Dockerfile", "  contexts = { base = \"target:base\" }"}), `, "linux/arm64"`, "")
			dir := r.context(t, map[string]string{
				"docker-bake.hcl": file, "app": t.Name(),
				"base.Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + steps["base"], "top.Dockerfile": "FROM base\n" + steps["top"],
			})
			bake := r.Client.StartBake(t, dir, "docker-bake.hcl", "--push")
			gate.WaitArrival(t, bake, startLimit)
			lost := r.busy(t, 1)[0]
			lost.Buildkitd.Kill()
			lost.Agent.Kill()
			gate.WaitArrival(t, bake, frozenLimit)
			gate.Open()
			if code := bake.Wait(t, buildLimit); code != 0 {
				t.Fatalf("exit code %d:\n%s", code, bake.Output())
			}
			if want := "worker " + lost.Name + " was lost; continuing on "; !strings.Contains(bake.Output(), want) {
				t.Errorf("the output does not say %q:\n%s", want, bake.Output())
			}
			image := r.registry.Image(t, r.repo, r.registry.Index(t, r.repo, "top").For(t, "linux/amd64"))
			for file, want := range map[string]string{"at-base": t.Name(), "at-top": t.Name(), "gate": "open\n"} {
				wantEqual(t, "/"+file, image.Files[file], want)
			}
			wantList(t, "tags", r.registry.Tags(t, r.repo), "base", "top")
		})
	}
}

// TestFailover_WhileAClientEvaluates has a frontend on the client's side ask for a result when the worker is lost, and
// read from it afterwards.
func TestFailover_WhileAClientEvaluates(t *testing.T) {
	t.Parallel()
	r, gate := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1}, farmtest.WorkerSpec{Name: "amd-2", Slots: 1}), farmtest.NewGate(t)
	base := r.base(t)
	steps, err := r.gatewayBuild(t, client.SolveOpt{Exports: r.pushTo("v1")}, func(ctx context.Context, c gateway.Client) (*gateway.Result, error) {
		run := llb.Image(base, llb.LinuxAmd64).Run(llb.Args([]string{"/bin/busybox", "wget", "-q", "-O", "/gate", gate.URL})).Root()
		ref, _, err := solveState(ctx, c, run, false)
		if err != nil {
			return nil, err
		}
		evaluated := make(chan error, 1)
		go func() { evaluated <- ref.Evaluate(ctx) }()
		for _, last := range []bool{false, true} {
			select {
			case <-gate.Arrived():
			case err := <-evaluated:
				return nil, fmt.Errorf("Evaluate ended before its step: %w", err)
			}
			if last {
				gate.Open()
				break
			}
			r.busy(t, 1)[0].Buildkitd.Kill()
		}
		if err := <-evaluated; err != nil {
			return nil, fmt.Errorf("Evaluate: %w", err)
		}
		content, err := ref.ReadFile(ctx, gateway.ReadRequest{Filename: "/gate"})
		wantAnswer(t, "ReadFile", string(content), err, "open\n")
		res := gateway.NewResult()
		res.SetRef(ref)
		return res, nil
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, steps)
	}
	wantTexts(t, "the progress", steps, "was lost; continuing on ")
	image := r.registry.Image(t, r.repo, farmtest.Descriptor(r.registry.Index(t, r.repo, "v1")))
	wantEqual(t, "/gate", image.Files["gate"], "open\n")
}

// busy waits until that many workers have a slot in use, and returns them.
func (r rig) busy(t *testing.T, want int) (out []*farmtest.FarmWorker) {
	t.Helper()
	r.Farm.WaitWorkers(t, fmt.Sprintf("%d workers build", want), func(list []farmtest.WorkerStatus) bool {
		out = nil
		for _, w := range r.Farm.Workers {
			if status, known := farmtest.Find(list, w.Name); known && status.Slots.Used > 0 && status.State == farmtest.Ready {
				out = append(out, w)
			}
		}
		return len(out) == want
	})
	return out
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

// TestFailover_AFrozenBuildkitdThatGoesOnIsTakenAgain: not before it answers, which costs no attempt.
func TestFailover_AFrozenBuildkitdThatGoesOnIsTakenAgain(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	build, gate := r.atGate(t, "v1", "linux/amd64")
	freeze(t, r.Farm.Workers[0])
	build.WaitOutput(t, frozenLimit, "that the leg waits", lineAbout("worker amd-1 was lost; queued for a worker"))
	r.Farm.Workers[0].Buildkitd.Signal(syscall.SIGCONT)
	gate.WaitArrival(t, build, startLimit)
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	wantTexts(t, "the build's output", build.Output(), "worker amd-1 was lost; continuing on amd-1 (attempt 2 of 3)")
	wantEqual(t, "how often the step ran", gate.Arrivals(), 2)
}

func TestFailover_NobodyWaitsForEver(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"its agent is killed", "its buildkitd is killed"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			farmOnly(t)
			r := newFarm(t, farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{oneSlot()}, CoordinatorArgs: []string{"--failover-wait", "3s"}})
			build, gate := r.atGate(t, "v1", "linux/amd64")
			losses[name](t, r.Farm.Workers[0])
			if code := build.Wait(t, 30*time.Second); code == 0 {
				t.Fatalf("the build succeeded without its worker:\n%s", build.Output())
			}
			wantLost(t, build, "amd-1", "linux/amd64", "none came back within 3s")
			wantEqual(t, "how often the step ran", gate.Arrivals(), 1)
			r.wantNoTags(t)
		})
	}
}

// TestFailover_ABuildThatEndsItsWorkersIsGivenUp: the fourth worker is spared.
func TestFailover_ABuildThatEndsItsWorkersIsGivenUp(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1}, farmtest.WorkerSpec{Name: "amd-2", Slots: 1}, farmtest.WorkerSpec{Name: "amd-3", Slots: 1}, farmtest.WorkerSpec{Name: "amd-4", Slots: 1})
	build, gate := r.atGate(t, "v1", "linux/amd64")
	for attempt := 1; ; attempt++ {
		used := r.busy(t, 1)[0]
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
	spared := 0
	for _, w := range r.Farm.Workers {
		if w.Agent.Running() {
			spared++
		}
	}
	wantEqual(t, "workers that are left", spared, 1)
	wantEqual(t, "how often the step ran", gate.Arrivals(), 3)
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
