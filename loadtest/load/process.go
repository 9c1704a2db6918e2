package load

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// clockTick is the unit of a process's times, on every Linux that Go runs on (USER_HZ).
const clockTick = time.Second / 100

// Peak is the most memory, in bytes, that a process has had resident at once.
func Peak(t farmtest.T, pid int) int64 {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatalf("reading a process's peak memory: %v", err)
	}
	for line := range strings.Lines(string(raw)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			if err != nil {
				t.Fatalf("reading a process's peak memory: %v", err)
			}
			return kib << 10
		}
	}
	t.Fatalf("reading a process's peak memory: the kernel does not tell VmHWM")
	return 0
}

// CPUTime is how long a process has been running on all CPUs together: utime and stime of proc_pid_stat(5).
func CPUTime(t farmtest.T, pid int) (used time.Duration) {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatalf("reading a process's CPU time: %v", err)
	}
	fields := strings.Fields(string(raw[strings.LastIndex(string(raw), ")")+1:]))
	if len(fields) < 13 {
		t.Fatalf("reading a process's CPU time: %q is not as proc_pid_stat(5) says", raw)
	}
	for _, field := range fields[11:13] {
		ticks, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			t.Fatalf("reading a process's CPU time: %v", err)
		}
		used += time.Duration(ticks) * clockTick
	}
	return used
}
