package farmtest

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
)

// Folder returns a new folder that is removed with the test. Its path is short, because a unix socket's is limited to
// 107 bytes; containers that run from it are deleted and mounts under it are taken off first.
func Folder(t T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "farm-")
	if err != nil {
		t.Fatalf("making a folder: %v", err)
	}
	t.Cleanup(func() {
		deleteContainers(t, dir)
		unmountUnder(t, dir)
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("removing %s: %v", dir, err)
		}
	})
	return dir
}

// WriteFile writes a file under dir, with the folders above it.
func WriteFile(t T, dir, name, content string) string {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatalf("making the folder of %s: %v", name, err)
	}
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatalf("writing %s: %v", name, err)
	}
	return file
}

// deleteContainers ends the containers that a killed buildkitd with its root under dir left running: runc keeps one
// folder for each, whose state names the container's root file system.
func deleteContainers(t T, dir string) {
	states, _ := filepath.Glob("/run/runc/*/state.json")
	for _, file := range states {
		raw, err := os.ReadFile(file)
		if err != nil {
			continue // it ended by itself
		}
		var state struct {
			Config struct {
				Rootfs string `json:"rootfs"`
			} `json:"config"`
		}
		if json.Unmarshal(raw, &state) != nil || !strings.HasPrefix(state.Config.Rootfs, dir+"/") {
			continue
		}
		id := filepath.Base(filepath.Dir(file))
		if out, err := exec.Command("runc", "delete", "--force", id).CombinedOutput(); err != nil {
			t.Logf("deleting the left-over container %s: %v: %s", id, err, out)
		}
	}
}

// unmountUnder takes off every mount under dir, deepest first.
func unmountUnder(t T, dir string) {
	raw, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Logf("listing mounts: %v", err)
		return
	}
	var points []string
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.HasPrefix(fields[1], dir+"/") {
			points = append(points, fields[1])
		}
	}
	sort.Sort(sort.Reverse(sort.StringSlice(points)))
	for _, point := range points {
		if err := syscall.Unmount(point, syscall.MNT_DETACH); err != nil {
			t.Logf("unmounting %s: %v", point, err)
		}
	}
}
