package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	// clockTick is the unit of a process's times, on every Linux that Go runs on (USER_HZ).
	clockTick = time.Second / 100
	// filesPerWorker are its connections to the coordinator and to BuildKit, both ends of the latter, and what it reads
	// of the machine now and then; spareFiles are the program's own.
	filesPerWorker, spareFiles = 5, 200
)

// enoughFiles returns an error if this process may not open as many files as the workers need. Go has raised the soft
// limit already.
func enoughFiles(workers int) error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	if need := uint64(workers)*filesPerWorker + spareFiles; limit.Cur < need { //nolint:gosec // not negative
		return fmt.Errorf("%d workers need up to %d open files, and this process may have %d: raise the limit (ulimit -Hn %d), or use fewer -workers", workers, need, limit.Cur, need)
	}
	return nil
}

// peak is the most memory, in bytes, that a process has had resident at once.
func peak(t farmtest.T, pid int) int64 {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatalf("reading a process's peak memory: %v", err)
	}
	bytes, err := parsePeak(string(raw))
	if err != nil {
		t.Fatalf("reading a process's peak memory: %v", err)
	}
	return bytes
}

// parsePeak finds VmHWM in proc_pid_status(5).
func parsePeak(status string) (bytes int64, err error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("the kernel does not tell VmHWM")
}

// cpuTime is how long a process has been running on all CPUs together.
func cpuTime(t farmtest.T, pid int) time.Duration {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatalf("reading a process's CPU time: %v", err)
	}
	used, err := parseCPU(string(raw))
	if err != nil {
		t.Fatalf("reading a process's CPU time: %v", err)
	}
	return used
}

// parseCPU adds up utime and stime of proc_pid_stat(5), the 12th and 13th fields after the program's name, which may
// hold spaces and parentheses.
func parseCPU(stat string) (used time.Duration, err error) {
	fields := strings.Fields(stat[strings.LastIndex(stat, ")")+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("%q is not as proc_pid_stat(5) says", stat)
	}
	for _, field := range fields[11:13] {
		ticks, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("%q is not as proc_pid_stat(5) says: %w", stat, err)
		}
		used += time.Duration(ticks) * clockTick
	}
	return used, nil
}

// usage is how much CPU time was used during a time.
type usage struct{ took, coordinator, agents time.Duration }

// measurement is one that has begun.
type measurement struct {
	pid   int // the coordinator's
	since time.Time
	usage
}

func begin(t farmtest.T, pid int) measurement {
	t.Helper()
	return measurement{pid: pid, since: time.Now(), usage: usage{coordinator: cpuTime(t, pid), agents: cpuTime(t, os.Getpid())}}
}

func (m measurement) end(t farmtest.T) usage {
	t.Helper()
	return usage{
		took: time.Since(m.since), coordinator: cpuTime(t, m.pid) - m.coordinator, agents: cpuTime(t, os.Getpid()) - m.agents,
	}
}

// percent is how much of one CPU a time of use was.
func (u usage) percent(used time.Duration) float64 { return 100 * used.Seconds() / u.took.Seconds() }
