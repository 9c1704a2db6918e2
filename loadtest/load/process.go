package load

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// clockTick is the unit of a process's times, on every Linux that Go runs on (USER_HZ).
const clockTick = time.Second / 100

// Peak is the most memory, in bytes, that a process has had resident at once, since ResetPeak if that was called.
func Peak(t farmtest.T, pid int) int64 {
	t.Helper()
	return memory(t, pid, "VmHWM")
}

// Resident is the memory, in bytes, that a process has resident.
func Resident(t farmtest.T, pid int) int64 {
	t.Helper()
	return memory(t, pid, "VmRSS")
}

// ResetPeak makes the kernel forget a process's peak memory (proc_pid_clear_refs(5)).
func ResetPeak(t farmtest.T, pid int) {
	t.Helper()
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0o200); err != nil {
		t.Fatalf("resetting the peak memory of process %d: %v", pid, err)
	}
}

func memory(t farmtest.T, pid int, field string) int64 {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatalf("reading a process's memory: %v", err)
	}
	size, err := parseMemory(string(raw), field)
	if err != nil {
		t.Fatalf("reading a process's memory: %v", err)
	}
	return size
}

// parseMemory finds a field of proc_pid_status(5), in bytes.
func parseMemory(status, field string) (size int64, err error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("the kernel does not tell %s", field)
}

// CPUTime is how long a process has been running on all CPUs together.
func CPUTime(t farmtest.T, pid int) time.Duration {
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

// Held is what a coordinator that does nothing holds on to.
type Held struct {
	Goroutines     int
	Heap, Resident int64 // bytes; the heap after a collection
}

// Holds asks a coordinator that serves profiles at http.
func Holds(t farmtest.T, http string, pid int) (h Held) {
	t.Helper()
	heap := profile(t, http+"/debug/pprof/heap?gc=1&debug=1")
	h.Heap = int64(number(t, heap, "# HeapAlloc = "))
	h.Goroutines = number(t, profile(t, http+"/debug/pprof/goroutine?debug=1"), "goroutine profile: total ")
	h.Resident = Resident(t, pid)
	return h
}

func (h Held) String() string {
	return fmt.Sprintf("%d goroutines, %.1f MiB heap in use after a collection, %.0f MiB resident", h.Goroutines, float64(h.Heap)/(1<<20), float64(h.Resident)/(1<<20))
}

func profile(t farmtest.T, url string) []byte {
	t.Helper()
	resp, err := http.Get(url) //nolint:gosec // of a coordinator that the load test has started
	if err != nil {
		t.Fatalf("asking the coordinator for a profile: %v", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("asking the coordinator for a profile: %s, %v", resp.Status, err)
	}
	return text
}

// number is what follows name in a profile's text.
func number(t farmtest.T, text []byte, name string) int {
	t.Helper()
	_, rest, _ := bytes.Cut(text, []byte(name))
	line, _, _ := bytes.Cut(rest, []byte("\n"))
	n, err := strconv.Atoi(string(line))
	if err != nil {
		t.Fatalf("reading a profile: no number after %q: %v", name, err)
	}
	return n
}
