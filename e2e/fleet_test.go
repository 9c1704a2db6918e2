package e2e_test

import (
	"crypto/rand"
	"encoding/base64"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// newFarm is newFarmRig for a farm that needs more than its workers described.
func newFarm(t *testing.T, options farmtest.FarmOptions) rig {
	t.Helper()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	return rigAt(t, tools, &farmtest.StartFarm(t, tools, options).Endpoint, registry)
}

// buildsAMD64 checks that the endpoint works, by a build with a RUN step.
func (r rig) buildsAMD64(t *testing.T, tag string) {
	t.Helper()
	r.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref(tag), r.legsContext(t))
	r.checkLeg(t, r.registry.Index(t, r.repo, tag), "linux/amd64", "x86_64\n")
}

// TestFleet_TwoLegsShareTheOnlySlot has more legs than the farm has slots: waiting for each other they would never end.
func TestFleet_TwoLegsShareTheOnlySlot(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nARG TARGETARCH\nLABEL arch=$TARGETARCH\nCOPY app /app\n", "app": "app"})
	r.Client.Build(t, "--platform", "linux/amd64,linux/386", "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/386")
	for arch, platform := range map[string]string{"amd64": "linux/amd64", "386": "linux/386"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": label", image.Config.Config.Labels["arch"], arch)
		wantEqual(t, platform+": /app", image.Files["app"], "app")
	}
	r.Farm.WaitWorkersWithin(t, goneLimit, "the slot is free", idle)
}

func TestFleet_AWorkerWithoutGossipDialsTheCoordinator(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1, Dials: true})
	r.buildsAMD64(t, "v1")
}

func TestFleet_ACoordinatorWithoutGossip(t *testing.T) {
	t.Parallel()
	r := newFarm(t, farmtest.FarmOptions{
		Workers:         []farmtest.WorkerSpec{{Name: "amd-1", Slots: 1, Dials: true}},
		CoordinatorArgs: []string{"--gossip", ""},
	})
	r.buildsAMD64(t, "v1")
}

func TestFleet_BuildkitdOnTCP(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1, TCP: true})
	r.buildsAMD64(t, "v1")
}

func TestFleet_OnlyTheRightGossipKeyJoins(t *testing.T) {
	t.Parallel()
	key, wrong := gossipKey(t), gossipKey(t)
	r := newFarm(t, farmtest.FarmOptions{
		Workers:         []farmtest.WorkerSpec{{Name: "amd-1", Slots: 1, Args: []string{"--gossip-key", key}}},
		CoordinatorArgs: []string{"--gossip-key", key},
	})
	// In this order: one source is warned of once a minute.
	for _, name := range []string{"wrong", "none"} {
		args := map[string][]string{"wrong": {"--gossip-key", wrong}}[name]
		w := r.Farm.AddWorker(t, farmtest.WorkerSpec{Name: name, Slots: 1, Args: args})
		w.Agent.WaitOutput(t, startLimit, "a log line about a join that went wrong", lineAbout("joining"))
		if name == "none" {
			continue
		}
		r.Farm.Coordinator.WaitOutput(t, startLimit, "a log line about a message that cannot be read", lineAbout("decrypt"))
	}
	// Whoever joined would be attached long before these builds have ended.
	r.buildsAMD64(t, "v1")
	r.buildsAMD64(t, "v2")
	list, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != "amd-1" {
		t.Errorf("want amd-1 alone: %+v", list)
	}
	for _, secret := range []string{key, wrong} {
		if strings.Contains(r.Logs(), secret) {
			t.Error("a gossip key is in a log")
		}
	}
}

func gossipKey(t *testing.T) string {
	t.Helper()
	raw := make([]byte, 32)
	if _, err := rand.Read(raw); err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(raw)
}

func TestFleet_TheCoordinatorListensOnASocketToo(t *testing.T) {
	t.Parallel()
	socket := "unix://" + filepath.Join(farmtest.Folder(t), "farm.sock")
	r := newFarm(t, farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{oneSlot()}, CoordinatorArgs: []string{"--listen", socket}})
	r.buildsAMD64(t, "tcp")
	dir := r.legsContext(t)
	result := farmtest.Buildctl(t, r.tools, socket, "build", "--progress=plain", "--frontend", "dockerfile.v0",
		"--local", "context="+dir, "--local", "dockerfile="+dir, "--opt", "platform=linux/amd64",
		"--output", "type=image,name="+r.ref("buildctl")+",push=true")
	if result.Code != 0 {
		t.Fatalf("buildctl: exit code %d:\n%s", result.Code, result.Output)
	}
	r.checkImage(t, r.registry.Image(t, r.repo, farmtest.Descriptor(r.registry.Index(t, r.repo, "buildctl"))), "linux/amd64", "x86_64\n")
	r.Client = farmtest.NewClient(t, r.tools, socket)
	r.buildsAMD64(t, "buildx")
	r.Farm.Coordinator.Signal(syscall.SIGTERM)
	wantEqual(t, "exit code of the coordinator", r.Farm.Coordinator.Wait(t, startLimit), 0)
	if _, err := os.Stat(strings.TrimPrefix(socket, "unix://")); !os.IsNotExist(err) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func newUpRig(t *testing.T) rig {
	t.Helper()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	return rigAt(t, tools, &farmtest.StartUp(t, tools, "all-in-one").Endpoint, registry)
}

func TestUp_OneCommandIsAFarmAndOneSIGTERMItsEnd(t *testing.T) {
	t.Parallel()
	r := newUpRig(t)
	r.buildsAMD64(t, "v1")
	daemon := buildkitdOf(t, r.Farm.Coordinator)
	r.Farm.Coordinator.Signal(syscall.SIGTERM)
	wantEqual(t, "exit code", r.Farm.Coordinator.Wait(t, startLimit), 0)
	if err := syscall.Kill(daemon, 0); err == nil {
		t.Errorf("its buildkitd (%d) still runs", daemon)
	}
}

func TestUp_ItsBuildkitdComesBack(t *testing.T) {
	t.Parallel()
	r := newUpRig(t)
	first := buildkitdOf(t, r.Farm.Coordinator)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.Farm.Coordinator.WaitOutput(t, startLimit, "why it does not run", farmtest.Contains("buildkitd ended by itself: signal: killed"))
	r.buildsAMD64(t, "v1")
	if second := buildkitdOf(t, r.Farm.Coordinator); second == first {
		t.Errorf("buildkitd is still process %d", first)
	}
}

// buildkitdOf returns the process id of the one child of archfarm up.
func buildkitdOf(t *testing.T, up *farmtest.Process) int {
	t.Helper()
	lists, err := filepath.Glob("/proc/" + strconv.Itoa(up.Pid()) + "/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var children []string
	for _, list := range lists { // one for each thread
		raw, err := os.ReadFile(list)
		if err != nil {
			continue // that thread has ended
		}
		children = append(children, strings.Fields(string(raw))...)
	}
	if len(children) != 1 {
		t.Fatalf("archfarm up has the children %v, want its buildkitd alone", children)
	}
	pid, err := strconv.Atoi(children[0])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}
