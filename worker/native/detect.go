package native

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Detect looks at the machine that this process runs on. It executes some tiny
// programs to see whether the CPU does. An error says also that this process
// itself is emulated.
func Detect(ctx context.Context) (Machine, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Machine{}, fmt.Errorf("asking for the machine's architecture: %w", err)
	}
	m := Machine{OS: runtime.GOOS, Arch: unix.ByteSliceToString(u.Machine[:])}
	if err := m.detail(ctx); err != nil {
		return Machine{}, fmt.Errorf("looking at the CPU: %w", err)
	}
	return m, nil
}

// maxLine is more than a line of /proc/cpuinfo has; flags have some 2 kB.
const maxLine = 1 << 20

// CommonFlags reads /proc/cpuinfo of an x86 machine and returns the flags that
// all its CPUs have: a program may run on any of them.
func CommonFlags(cpuinfo io.Reader) ([]string, error) {
	var common []string
	seen := false
	lines := bufio.NewScanner(cpuinfo)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(key) != "flags" {
			continue
		}
		flags := strings.Fields(value)
		if !seen {
			common, seen = flags, true
			continue
		}
		common = slices.DeleteFunc(common, func(f string) bool { return !slices.Contains(flags, f) })
	}
	return common, lines.Err()
}
