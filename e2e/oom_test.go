package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	cgroups = "/sys/fs/cgroup"
	// steps may take so much memory, and one that wants hungry gets killed: an amount that no machine minds, should
	// the limit fail.
	allowed = 64 << 20
	hungry  = "/bin/busybox dd if=/dev/zero of=/dev/null bs=192M count=1"
	oomSays = "killed a process for want of memory"
)

// TestOOM_TheBuildThatSufferedIsTold has the kernel kill steps in a cgroup that is small. It takes part in no other test
// at the same time: what the kernel kills it counts for the whole machine.
func TestOOM_TheBuildThatSufferedIsTold(t *testing.T) {
	farmOnly(t)
	group := smallCgroup(t) // gone after the farm
	r := newFarmRig(t, oneSlot())
	try := func(script string) farmtest.Result {
		t.Helper()
		dockerfile := "FROM scratch\nCOPY busybox /bin/busybox\n" + farmtest.Run(script) + "\n"
		return r.Client.TryBuild(t, "--platform", "linux/amd64", "--cgroup-parent", group, "--push", "-t", r.ref("v1"),
			r.context(t, map[string]string{"Dockerfile": dockerfile}))
	}

	killed := try(hungry)
	wantFailure(t, killed, "dd if=/dev/zero", "did not complete successfully", "the kernel of worker amd-1 "+oomSays)
	t.Logf("killed: %s", killed.Output[max(0, strings.LastIndex(killed.Output, "ERROR:")):])
	failed := unmarshal[record](t, r.history(t, "inspect", "--format", "json"))
	if failed.Error == nil || !strings.Contains(failed.Error.Message, oomSays) {
		t.Errorf("the build's record says %+v", failed.Error)
	}
	survivor := try(hungry + " || exit 7")
	wantFailure(t, survivor, "|| exit 7", "did not complete successfully", "the kernel of worker amd-1 "+oomSays)
	t.Logf("one of its processes was killed: %s", survivor.Output[max(0, strings.LastIndex(survivor.Output, "ERROR:")):])
	wantEqual(t, "legs killed for memory, as counted", r.killedForMemory(t, "amd-1"), 2)

	for _, innocent := range []string{"exit 7", "exit 137"} {
		result := try(innocent)
		wantFailure(t, result, strings.Replace(innocent, "exit", "exit code:", 1))
		if strings.Contains(result.Output, "memory") {
			t.Errorf("a step that ended by itself was told about memory:\n%s", result.Output)
		}
	}
	r.wantNoTags(t)
	if result := try("/bin/busybox true"); result.Code != 0 {
		t.Errorf("a step that needs little: exit code %d:\n%s", result.Code, result.Output)
	}
	wantEqual(t, "legs killed for memory, in the end", r.killedForMemory(t, "amd-1"), 2)
}

func (r rig) killedForMemory(t *testing.T, worker string) int {
	t.Helper()
	_, body, err := get(r.Farm.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	_, value, found := strings.Cut(body, fmt.Sprintf("\narchfarm_legs_killed_for_memory_total{worker=%q} ", worker))
	value, _, _ = strings.Cut(value, "\n")
	n, err := strconv.Atoi(value)
	if !found || err != nil {
		t.Errorf("nothing is counted of %s: %v", worker, err)
	}
	return n
}

// smallCgroup makes a cgroup whose members together get the memory that is allowed, and returns its name. It skips the
// test where none can be made.
func smallCgroup(t *testing.T) (name string) {
	t.Helper()
	name = fmt.Sprintf("archfarm-e2e-%d", os.Getpid())
	hierarchy, limits := cgroups, map[string]string{"memory.max": strconv.Itoa(allowed), "memory.swap.max": "0"}
	if v1 := filepath.Join(cgroups, "memory"); exists(v1) {
		hierarchy, limits = v1, map[string]string{"memory.limit_in_bytes": strconv.Itoa(allowed), "memory.swappiness": "0"}
	}
	dir := filepath.Join(hierarchy, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("SKIPPED: no cgroup can be made: %v", err)
	}
	t.Cleanup(func() { removeCgroup(t, name) })
	for file, limit := range limits {
		path := filepath.Join(dir, file)
		if !exists(path) && strings.Contains(file, "swap") { // a kernel without
			continue
		}
		if err := os.WriteFile(path, []byte(limit), 0); err != nil {
			t.Skipf("SKIPPED: the memory of a cgroup cannot be limited: %v", err)
		}
	}
	return name
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// removeCgroup removes what runc has made of the cgroup, in every hierarchy.
func removeCgroup(t *testing.T, name string) {
	t.Helper()
	inOthers, err := filepath.Glob(filepath.Join(cgroups, "*", name))
	if err != nil {
		t.Error(err)
	}
	for _, root := range append(inOthers, filepath.Join(cgroups, name)) {
		var dirs []string
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		for _, dir := range slices.Backward(dirs) {
			if err := os.Remove(dir); err != nil {
				t.Errorf("removing a cgroup: %v", err)
			}
		}
	}
}
