package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// managedWorker is a worker with a buildkitd of its own.
type managedWorker struct {
	*farmtest.Process
	dir string // its data folder
}

// startManaged starts the agent of a farm's worker with a buildkitd of its own, whose state is under dir, and waits
// until it is ready. A buildkitd that ends leaves no mounts, so that what dir is on can be taken off.
func startManaged(t *testing.T, r rig, name, dir string, args ...string) managedWorker {
	t.Helper()
	agent := farmtest.StartProcess(t, farmtest.Spec{
		Name: "agent of " + name, Path: r.tools.Archfarm, Args: append([]string{
			"worker", "--name", name, "--slots", "1", "--coordinator", strings.TrimPrefix(r.Farm.Addr, "tcp://"),
			"--managed", "--buildkitd", r.tools.Buildkitd, "--data-dir", dir, "--buildkitd-arg", "--oci-worker-net=host",
		}, args...),
	})
	r.Farm.WaitWorkers(t, "the worker with its own buildkitd is ready", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, name)
		return known && w.State == farmtest.Ready
	})
	return managedWorker{agent, dir}
}

// buildkitd is the process id of the worker's buildkitd.
func (w managedWorker) buildkitd(t *testing.T) int {
	t.Helper()
	config := filepath.Join(w.dir, "buildkitd.toml")
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		raw, err := os.ReadFile(line)
		if err != nil || !strings.Contains(string(raw), "\x00"+config+"\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(line)))
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}
	t.Fatalf("no process has the argument %s; the agent says:\n%s", config, w.Tail())
	return 0
}

const diskMiB = 192

// smallDisk is a file system of its own, in memory.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := farmtest.Folder(t)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", diskMiB)); err != nil {
		t.Fatalf("mounting a small disk: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("taking off the small disk: %v", err)
		}
	})
	return dir
}

// TestDisk_AFullOneCordonsTheWorkerUntilThereIsRoom fills the disk of a managed buildkitd by a RUN step, which goes on;
// what comes next waits until its layer could be pruned.
func TestDisk_AFullOneCordonsTheWorkerUntilThereIsRoom(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t)
	agent := startManaged(t, r, "amd-1", filepath.Join(smallDisk(t), "w"), "--disk-high", "90", "--disk-low", "70", "--buildkitd-arg", "--oci-worker-gc=false")

	gate := farmtest.NewGate(t)
	fill := fmt.Sprintf("/bin/busybox dd if=/dev/zero of=/big bs=1M count=%d", diskMiB*90/100)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + farmtest.Run(fill) + "\n" + gate.Run()})
	full := r.Client.StartBuild(t, "--platform", "linux/amd64", dir)
	gate.WaitArrival(t, full, startLimit)
	var reason string
	r.Farm.WaitWorkers(t, "the worker is cordoned", func(list []farmtest.WorkerStatus) bool {
		w, _ := farmtest.Find(list, "amd-1")
		reason = w.Reason
		return w.State == "cordoned" && w.Slots.Used == 1
	})
	if !regexp.MustCompile(`^disk 9[0-9] % full: [0-9.]+ MB free of 201\.3 MB`).MatchString(reason) {
		t.Errorf("the reason is %q", reason)
	}

	next := r.Client.StartBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("next"), r.legsContext(t))
	next.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
	gate.Open()
	for _, build := range []*farmtest.Process{full, next} {
		if code := build.Wait(t, buildLimit); code != 0 {
			t.Errorf("exit code %d:\n%s\n%s", code, build.Output(), agent.Output())
		}
	}
	r.checkLeg(t, r.registry.Index(t, r.repo, "next"), "linux/amd64", "x86_64\n")
	for _, want := range []string{"the disk is nearly full", "pruned the cache", "the disk has room again"} {
		if !strings.Contains(agent.Output(), want) {
			t.Errorf("the agent's log does not say %q:\n%s", want, agent.Output())
		}
	}
}

// TestManaged_AKilledBuildkitdComesBackAndItsContainersEnd kills the buildkitd while a step runs, then the agent, and
// looks for what stays behind.
func TestManaged_AKilledBuildkitdComesBackAndItsContainersEnd(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t)
	agent := startManaged(t, r, "amd-1", filepath.Join(farmtest.Folder(t), "w"))
	build, gate := r.atGate(t, "v1", "linux/amd64")
	first := agent.buildkitd(t)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	gate.WaitKilled(t, goneLimit)
	gate.WaitArrival(t, build, startLimit) // the build goes on
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Errorf("exit code %d:\n%s", code, build.Output())
	}
	r.Farm.WaitWorkers(t, "the worker is back", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return known && w.State == farmtest.Ready && w.Slots.Used == 0
	})
	r.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref("after"), r.legsContext(t))
	r.checkLeg(t, r.registry.Index(t, r.repo, "after"), "linux/amd64", "x86_64\n")

	second := agent.buildkitd(t)
	if second == first {
		t.Fatalf("buildkitd is still process %d", first)
	}
	agent.Kill()
	farmtest.Eventually(t, 20*time.Second, "buildkitd follows its agent", func() (string, bool) {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", second))
		return string(raw), err != nil || strings.Contains(string(raw), ") Z ")
	})
}
