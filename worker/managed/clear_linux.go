package managed

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// clear removes what a buildkitd that died has left behind: containers, which go
// on without it, and mounts. It is an error if one still runs on this state: it may
// be another agent's, or one that is just ending because its agent died.
func (d *Daemon) clear() error {
	lock, err := os.OpenFile(filepath.Join(d.Root(), "buildkitd.lock"), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // the first start, or the last end was a clean one
	}
	if err != nil {
		return fmt.Errorf("opening buildkitd's lock: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil { //nolint:gosec // a file descriptor is small
		return fmt.Errorf("another buildkitd runs in %s: waiting for its end", d.Root())
	}
	containers := d.deleteContainers()
	mounts := unmountUnder(d.Root())
	if containers+mounts > 0 {
		d.log.Info("cleared up after a buildkitd that died", "containers", containers, "mounts", mounts)
	}
	return nil
}

// maxContainerState bounds runc's note of a container, in bytes.
const maxContainerState = 4 << 20

// deleteContainers ends the containers whose root file system is in this
// buildkitd's state. runc keeps a note of each under /run/runc.
func (d *Daemon) deleteContainers() (deleted int) {
	notes, _ := filepath.Glob("/run/runc/*/state.json") // the pattern is right
	for _, note := range notes {
		if !strings.HasPrefix(rootfsOf(note), d.Root()+"/") {
			continue
		}
		runc, err := exec.LookPath("buildkit-runc")
		if err != nil {
			runc = "runc"
		}
		id := filepath.Base(filepath.Dir(note))
		if out, err := exec.Command(runc, "delete", "--force", id).CombinedOutput(); err != nil { //nolint:gosec // runc's own name for it
			d.log.Warn("deleting a container that buildkitd left behind", "container", id, "error", err, "output", string(out))
			continue
		}
		deleted++
	}
	return deleted
}

// rootfsOf is empty if there is no such container any more.
func rootfsOf(note string) string {
	f, err := os.Open(note) //nolint:gosec // runc's
	if err != nil {
		return ""
	}
	defer f.Close()
	var state struct {
		Config struct {
			Rootfs string `json:"rootfs"`
		} `json:"config"`
	}
	if json.NewDecoder(io.LimitReader(f, maxContainerState)).Decode(&state) != nil {
		return ""
	}
	return state.Config.Rootfs
}

// unmountUnder takes off every container's mounts below dir, deepest first.
func unmountUnder(dir string) (unmounted int) {
	raw, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return 0
	}
	points := mountsUnder(string(raw), dir)
	for _, point := range points {
		if unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
			unmounted++
		}
	}
	return unmounted
}

// escapes are those of /proc/mounts (fstab(5)).
var escapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// mountsUnder lists the mounts of containers of the buildkitd whose state is in
// dir, and leaves alone what an operator has mounted there.
func mountsUnder(mounts, dir string) []string {
	var points []string
	for line := range strings.Lines(mounts) {
		if fields := strings.Fields(line); len(fields) > 1 {
			if point := escapes.Replace(fields[1]); strings.HasPrefix(point, dir+"/runc-") && strings.Contains(point, "/executor/") {
				points = append(points, point)
			}
		}
	}
	slices.Reverse(points) // a mount is listed after the one that it is in
	return points
}
