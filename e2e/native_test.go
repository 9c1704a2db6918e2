package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// TestNative_AnEmulatorThatIsRegisteredLaterMakesNoWorkerNative registers a handler for arm64 programs with the kernel
// while the farm runs. It takes part in no other test at the same time: a handler is there for the whole machine.
func TestNative_AnEmulatorThatIsRegisteredLaterMakesNoWorkerNative(t *testing.T) {
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 1}, farmtest.WorkerSpec{Name: "amd-tcp", Slots: 1, TCP: true})
	before := r.platforms(t, "amd-1")
	if before[0] != "linux/amd64" || slices.Contains(before, "linux/arm64") {
		t.Fatalf("amd-1 offers %v", before)
	}
	wantList(t, "what was proven through BuildKit, and what the machine says", r.platforms(t, "amd-tcp"), before...)

	emulates, unregister := registerARM64(t, r.tools)
	emulated := func(want bool, names ...string) func([]farmtest.WorkerStatus) bool {
		return func(workers []farmtest.WorkerStatus) bool {
			found := 0
			for _, w := range workers {
				if slices.Contains(names, w.Name) && slices.Contains(w.Emulated, "linux/arm64") == want {
					found++
				}
			}
			return found == len(names)
		}
	}
	r.Farm.WaitWorkers(t, "the emulator is seen", emulated(true, "amd-1"))
	// A worker that comes now finds BuildKit ready to run arm64, if this is a real emulator.
	r.Farm.AddWorker(t, farmtest.WorkerSpec{Name: "late-tcp", Slots: 1, TCP: true})
	r.Farm.WaitWorkers(t, "the late worker is there", func(w []farmtest.WorkerStatus) bool { return len(w) == 3 })
	if emulates {
		r.Farm.WaitWorkers(t, "BuildKit elsewhere lists it", emulated(true, "late-tcp"))
	}
	for _, name := range []string{"amd-1", "amd-tcp", "late-tcp"} {
		wantList(t, "platforms of "+name, r.platforms(t, name), before...)
	}

	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + farmtest.Run("/bin/busybox true") + "\n"})
	wantFailure(t, r.Client.TryBuild(t, "--platform", "linux/arm64", "--push", "-t", r.ref("v1"), dir), "no native worker for linux/arm64")
	r.wantNoTags(t)
	r.buildsAMD64(t, "v2")

	unregister()
	r.Farm.WaitWorkers(t, "the emulator is gone", emulated(false, "amd-1"))
}

func (r rig) platforms(t *testing.T, worker string) []string {
	t.Helper()
	workers, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range workers {
		if w.Name == worker && len(w.Platforms) > 0 {
			return w.Platforms
		}
	}
	t.Fatalf("no worker %s with platforms: %+v", worker, workers)
	return nil
}

const binfmtFolder = "/proc/sys/fs/binfmt_misc"

// registerARM64 registers qemu for arm64 programs, or where that is not installed a program that fails at once. It
// tells whether they run then. Where the machine has no binfmt_misc the test is skipped.
func registerARM64(t *testing.T, tools farmtest.Tools) (emulates bool, unregister func()) {
	t.Helper()
	register := filepath.Join(binfmtFolder, "register")
	if _, err := os.Stat(register); err != nil {
		if err := unix.Mount("binfmt_misc", binfmtFolder, "binfmt_misc", 0, ""); err != nil {
			t.Skipf("SKIPPED: no handler can be registered, binfmt_misc cannot be mounted: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(binfmtFolder, 0); err != nil {
				t.Errorf("unmounting binfmt_misc: %v", err)
			}
		})
	}
	interpreter, err := exec.LookPath("qemu-aarch64-static")
	if emulates = err == nil; !emulates {
		interpreter = tools.Busybox
	}
	name := fmt.Sprintf("archfarm-e2e-%d", os.Getpid())
	handler := strings.Join([]string{
		"", name, "M", "",
		`\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00`,
		`\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff`,
		interpreter, "F",
	}, ":")
	if err := os.WriteFile(register, []byte(handler), 0o200); err != nil {
		t.Skipf("SKIPPED: the kernel takes no handler: %v", err)
	}
	file := filepath.Join(binfmtFolder, name)
	unregister = func() {
		if _, err := os.Stat(file); err != nil {
			return
		}
		if err := os.WriteFile(file, []byte("-1"), 0o200); err != nil {
			t.Errorf("taking the handler away: %v", err)
		}
	}
	t.Cleanup(unregister)
	return emulates, unregister
}
