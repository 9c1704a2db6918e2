package vitals

import (
	"io"
	"math"
	"path"
	"strconv"
	"strings"
)

func readBounded(r io.Reader) string {
	data, err := io.ReadAll(io.LimitReader(r, maxFile))
	if err != nil {
		return ""
	}
	return string(data)
}

// cpuTimes are ticks since boot, of all CPUs together.
type cpuTimes struct{ busy, total uint64 }

// parseStat reads the first line of /proc/stat (proc_stat(5)): user, nice,
// system, idle, iowait, irq, softirq, steal. Time that a hypervisor stole was
// wanted, so it counts as busy; a guest's time is in that of its user already.
func parseStat(text string) (cpuTimes, bool) {
	line, _, _ := strings.Cut(text, "\n")
	fields := strings.Fields(line)
	const idle, iowait, steal = 3, 4, 7
	if len(fields) < idle+2 || fields[0] != "cpu" {
		return cpuTimes{}, false
	}
	var t cpuTimes
	for i, field := range fields[1:min(len(fields), steal+2)] {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil || n > math.MaxUint64-t.total {
			return cpuTimes{}, false
		}
		t.total += n
		if i != idle && i != iowait {
			t.busy += n
		}
	}
	return t, true
}

// busySince is a share, 0 to 1; nil if no time has passed. Counters may go back a
// little where CPUs come and go.
func (t cpuTimes) busySince(before cpuTimes) *float64 {
	if t.total <= before.total {
		return nil
	}
	share := 0.0
	if t.busy > before.busy {
		share = min(1, float64(t.busy-before.busy)/float64(t.total-before.total))
	}
	return &share
}

// parseMeminfo reads MemTotal and MemAvailable of /proc/meminfo, in bytes.
func parseMeminfo(text string) (total, available uint64, ok bool) {
	var hasTotal, hasAvailable bool
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		switch name {
		case "MemTotal":
			total, hasTotal = kilobytes(value)
		case "MemAvailable":
			available, hasAvailable = kilobytes(value)
		}
	}
	return total, min(available, total), hasTotal && hasAvailable && total > 0
}

func kilobytes(value string) (uint64, bool) {
	fields := strings.Fields(value)
	if len(fields) != 2 || fields[1] != "kB" {
		return 0, false
	}
	n, err := strconv.ParseUint(fields[0], 10, 64)
	return n << 10, err == nil && n < 1<<53
}

// parsePressure reads "some avg10" of a file in /proc/pressure as a share, 0 to 1
// (Linux, Documentation/accounting/psi.rst).
func parsePressure(text string) (float64, bool) {
	for line := range strings.Lines(text) {
		rest, is := strings.CutPrefix(line, "some ")
		if !is {
			continue
		}
		for _, field := range strings.Fields(rest) {
			if value, is := strings.CutPrefix(field, "avg10="); is {
				percent, err := strconv.ParseFloat(value, 64)
				return percent / 100, err == nil && percent >= 0 && percent <= 100
			}
		}
	}
	return 0, false
}

// parseOOMKills reads oom_kill of /proc/vmstat (Linux 4.13).
func parseOOMKills(text string) (uint64, bool) { return counter(text, "oom_kill") }

// counter finds "name value" on a line of its own.
func counter(text, name string) (uint64, bool) {
	for line := range strings.Lines(text) {
		if rest, is := strings.CutPrefix(line, name+" "); is {
			n, err := strconv.ParseUint(strings.TrimSpace(rest), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// memoryCgroup is a control group that may limit this process's memory: the files
// that say so, below the root folder.
type memoryCgroup struct {
	limit, usage, stat string
	reclaimable        string // the counter in stat of what the kernel gives up first
}

// memory is a group's limit and what is left of it. Page cache that was not used
// lately is left, as in the machine's MemAvailable.
func (c memoryCgroup) memory(read func(string) string) (limit, left uint64, ok bool) {
	limit, err := strconv.ParseUint(strings.TrimSpace(read(c.limit)), 10, 64)
	if err != nil || limit == 0 { // "max" is none
		return 0, 0, false
	}
	usage, err := strconv.ParseUint(strings.TrimSpace(read(c.usage)), 10, 64)
	if err != nil {
		return 0, 0, false
	}
	cached, _ := counter(read(c.stat), c.reclaimable)
	usage -= min(cached, usage)
	return limit, limit - min(usage, limit), true
}

// maxDepth bounds how many control groups are looked at.
const maxDepth = 32

// memoryCgroups reads /proc/self/cgroup (cgroups(7)): the process's group and
// those above it, of version 2 (memory.max), or of version 1's memory controller
// (memory.limit_in_bytes).
func memoryCgroups(text string) []memoryCgroup {
	groups := []memoryCgroup{}
	for line := range strings.Lines(text) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 || !strings.HasPrefix(parts[2], "/") {
			continue
		}
		switch {
		case parts[0] == "0" && parts[1] == "":
			groups = append(groups, above("sys/fs/cgroup", parts[2], func(dir string) memoryCgroup {
				return memoryCgroup{dir + "/memory.max", dir + "/memory.current", dir + "/memory.stat", "inactive_file"}
			})...)
		case parts[1] == "memory":
			groups = append(groups, above("sys/fs/cgroup/memory", parts[2], func(dir string) memoryCgroup {
				return memoryCgroup{dir + "/memory.limit_in_bytes", dir + "/memory.usage_in_bytes", dir + "/memory.stat", "total_inactive_file"}
			})...)
		}
	}
	return groups
}

// above lists a group and all that it is in, up to the root of the hierarchy. In a
// container without a cgroup namespace the group's own name does not exist, but
// the root is the container's.
func above(mount, group string, files func(dir string) memoryCgroup) []memoryCgroup {
	var groups []memoryCgroup
	group = path.Clean(group)
	for range maxDepth {
		if group == "/" {
			return append(groups, files(mount))
		}
		groups = append(groups, files(mount+group))
		group = path.Dir(group)
	}
	return append(groups, files(mount))
}
