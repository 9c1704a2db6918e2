package e2e_test

import (
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// arm64Env is "1" where the test with the real arm64 machine is to run: make test sets it.
const arm64Env = "ARCHFARM_E2E_ARM64"

// TestARM64_EachLegRunsOnItsOwnKernel builds with RUN for both platforms on an amd64 buildkitd and in a real arm64 machine
// whose agent dials out through its NAT.
func TestARM64_EachLegRunsOnItsOwnKernel(t *testing.T) {
	farmOnly(t)
	if os.Getenv(arm64Env) != "1" {
		t.Skipf("SKIPPED the arm64 machine: run make test, or set %s=1 after make arm64vm", arm64Env)
	}
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1})
	machine := startARM64(t, r)
	dockerfile := "FROM scratch\nARG TARGETARCH\nCOPY busybox-$TARGETARCH /bin/busybox\n" +
		farmtest.Run("{ /bin/busybox uname -m; /bin/busybox uname -r; } > /uname") + "\n"
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
	if err := os.Rename(filepath.Join(dir, "busybox"), filepath.Join(dir, "busybox-amd64")); err != nil {
		t.Fatal(err)
	}
	copyARM64Busybox(t, r, filepath.Join(dir, "busybox-arm64"))
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), dir)

	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	host := kernelRelease(t)
	wantEqual(t, "amd64's uname", r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["uname"], "x86_64\n"+host+"\n")
	uname := strings.Fields(r.registry.Image(t, r.repo, index.For(t, "linux/arm64")).Files["uname"])
	if len(uname) != 2 || uname[0] != "aarch64" || uname[1] == host {
		t.Errorf("arm64's uname says %q: want aarch64 and a kernel other than the host's %s", uname, host)
	}
	r.Farm.WaitWorkers(t, "all slots are free", idle)
	machine.goesAway(t, r, dir)
}

// goesAway freezes the machine, pulls its plug in the middle of a build, and boots it again: it is back by itself each
// time, with the certificate that it has, as its token is used up, and the build goes on.
func (m arm64Machine) goesAway(t *testing.T, r rig, dir string) {
	t.Helper()
	m.signal(t, unix.SIGSTOP)
	r.Farm.WaitWorkersWithin(t, frozenLimit, "the frozen machine is not offered", away(arm64Name))
	m.signal(t, unix.SIGCONT)
	r.Farm.WaitWorkers(t, "the thawed machine is back", ready(arm64Name))

	gate := farmtest.NewGate(t)
	farmtest.WriteFile(t, dir, "Dockerfile", "FROM scratch\nARG TARGETARCH\nCOPY busybox-$TARGETARCH /bin/busybox\n"+
		farmtest.Run("/bin/busybox wget -q -O /gate "+guestURL(gate)+"; /bin/busybox uname -m > /uname")+"\n")
	build := r.Client.StartBuild(t, "--platform", "linux/arm64", "--push", "-t", r.ref("v2"), dir)
	gate.WaitArrival(t, build, buildLimit)
	m.vm("kill")
	build.WaitOutput(t, frozenLimit, "that the machine was lost", lineAbout("worker "+arm64Name+" was lost"))
	m.vm("start")
	r.Farm.WaitWorkers(t, "the machine that was booted again is back", ready(arm64Name))
	gate.WaitArrival(t, build, buildLimit)
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	index := r.registry.Index(t, r.repo, "v2")
	wantEqual(t, "uname -m", r.registry.Image(t, r.repo, index.For(t, "linux/arm64")).Files["uname"], "aarch64\n")
}

// guestURL is a gate as the arm64 machine's guest sees it.
func guestURL(gate *farmtest.Gate) string {
	return strings.Replace(gate.URL, "127.0.0.1", "10.0.2.2", 1)
}

func away(name string) func([]farmtest.WorkerStatus) bool {
	return func(list []farmtest.WorkerStatus) bool { return !ready(name)(list) }
}

// copyARM64Busybox puts the static busybox of the machine's image into a build context.
func copyARM64Busybox(t *testing.T, r rig, file string) {
	t.Helper()
	image, err := exec.Command(filepath.Join(r.tools.Root, "deploy", "arm64vm", "image.sh")).Output()
	if err != nil {
		t.Fatalf("image.sh: %v", err)
	}
	busybox, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(image)), "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, busybox, 0o755); err != nil {
		t.Fatal(err)
	}
}

const arm64Name = "arm64-e2e"

// arm64Machine is the virtual machine: its folder, and what vm.sh does with it.
type arm64Machine struct {
	dir string
	vm  func(verb string)
}

// signal is for the machine as a whole.
func (m arm64Machine) signal(t *testing.T, sig unix.Signal) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join(m.dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
}

// startARM64 boots the machine and waits until its agent has joined.
func startARM64(t *testing.T, r rig) arm64Machine {
	t.Helper()
	coordinator, err := url.Parse(r.Addr)
	if err != nil {
		t.Fatal(err)
	}
	run, token := farmtest.Folder(t), r.Farm.Token(t, "--worker", "--name", arm64Name) // for a machine that is not this one
	vm := func(verb string) {
		cmd := exec.Command(filepath.Join(r.tools.Root, "deploy", "arm64vm", "vm.sh"), verb)
		cmd.Env = append(os.Environ(), "ARM64VM_NAME="+arm64Name, "ARM64VM_RUN="+run,
			"ARM64VM_COORDINATOR=10.0.2.2:"+coordinator.Port(), // where the guest sees the host's 127.0.0.1
			"ARM64VM_AGENT_ARGS=--token "+token,
			"ARM64VM_AGENT="+filepath.Join(r.tools.Root, "bin", "archfarm-linux-arm64"),
			"ARM64VM_BUILDKITD="+filepath.Join(r.tools.Root, "bin", "tools", "buildkitd-linux-arm64"))
		out, err := cmd.CombinedOutput()
		switch {
		case err != nil && verb == "start":
			t.Fatalf("vm.sh start: %v: %s", err, out)
		case err != nil:
			t.Errorf("vm.sh %s: %v: %s", verb, err, out)
		case verb == "log" && t.Failed():
			t.Logf("the machine's console:\n%s", out)
		}
	}
	t.Cleanup(func() {
		vm("log")
		vm("stop")
	})
	vm("start")
	r.Farm.WaitWorkers(t, "the arm64 machine is ready", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, arm64Name)
		return known && w.State == farmtest.Ready && strings.Contains(strings.Join(w.Platforms, " "), "linux/arm64")
	})
	return arm64Machine{filepath.Join(run, arm64Name), vm}
}

func kernelRelease(t *testing.T) string {
	t.Helper()
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	return unix.ByteSliceToString(name.Release[:])
}
