package main

import (
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// The same program for two architectures, on this machine.
const emulated, natively = "qemu-user", "native"

// emulators are QEMU's names of architectures.
var emulators = map[string]string{"linux/arm64": "aarch64", "linux/amd64": "x86_64"}

// emulations run what a step would run, natively and under an emulator. There is no goal: it is why farms have machines
// of every architecture.
func emulations(t farmtest.T, o options) []contest {
	const name = "a step bound by the CPU, emulated"
	native, foreign := platforms()
	emulator := findEmulator(foreign)
	if emulator == "" {
		return []contest{absent(name, "qemu-user is not installed", emulated, natively)}
	}
	tools, dir := farmtest.FindTools(t), farmtest.Folder(t)
	commands := map[string][]string{natively: {program(t, tools.Root, dir, native)}, emulated: {emulator, program(t, tools.Root, dir, foreign)}}
	said := map[string]string{}
	return []contest{{
		name: name, sides: []string{emulated, natively}, rounds: o.Turns,
		build: func(t farmtest.T, side string) time.Duration {
			command := append(commands[side], strconv.Itoa(o.Burn))
			start := time.Now()
			result := farmtest.Command(t, command[0], command[1:]...)
			took := time.Since(start)
			if said[side] = result.Output; result.Code != 0 || len(said) == 2 && said[emulated] != said[natively] {
				t.Fatalf("%s: exit code %d, and not the same result:\n%s", strings.Join(command, " "), result.Code, said)
			}
			return took
		},
	}}
}

// findEmulator returns the path of what runs programs of a platform, or nothing where that is not installed.
func findEmulator(platform string) string {
	for _, name := range []string{"qemu-" + emulators[platform], "qemu-" + emulators[platform] + "-static"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

// program builds the step's program for a platform.
func program(t farmtest.T, root, dir, platform string) string {
	t.Helper()
	_, arch, _ := strings.Cut(platform, "/")
	path := filepath.Join(dir, "burn-"+arch)
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "./loadtest/bench/burn")
	cmd.Dir, cmd.Env = root, append(cmd.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building a program for %s: %v:\n%s", platform, err, out)
	}
	return path
}
