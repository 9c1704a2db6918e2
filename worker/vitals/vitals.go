// Package vitals reads how busy the machine is that the agent runs on, and has
// the rules by which the worker takes less when it is too busy.
//
// The parsers and the rules are pure. What a machine does not tell is absent:
// the rules act only on what is there.
package vitals

import (
	"io/fs"
	"sync"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"google.golang.org/protobuf/proto"
)

// cpuOver is the least time that a share of the CPUs is taken over: the kernel
// counts in ticks of 10 ms.
const cpuOver = 500 * time.Millisecond

// Machine is the machine that the agent runs on. It may be used from several
// goroutines.
type Machine struct {
	files fs.FS  // the root folder, of which /proc and /sys are read
	disk  string // a folder on the disk that counts; empty: none does

	mu     sync.Mutex
	cpu    cpuTimes
	cpuAt  time.Time
	busy   *float64
	cgroup []memoryCgroup // nil until the first reading
}

// New returns the machine that this process runs on. disk is a folder on the disk
// that holds BuildKit's state, which need not exist yet; empty when that is not
// known, or on another machine.
func New(disk string) *Machine { return newMachine(rootFS(), disk) }

func newMachine(files fs.FS, disk string) *Machine {
	m := &Machine{files: files, disk: disk}
	m.cpuShare(time.Now()) // the first reading has something to compare with
	return m
}

// Read takes all readings. The share of the CPUs is that since the reading
// before, or an older one if that was less than half a second ago.
func (m *Machine) Read(now time.Time) (*archfarmv1.Load, Disk) {
	m.mu.Lock()
	defer m.mu.Unlock()
	load := &archfarmv1.Load{
		Cpu:            m.cpuShare(now),
		CpuPressure:    m.pressure("cpu"),
		MemoryPressure: m.pressure("memory"),
		IoPressure:     m.pressure("io"),
		OomKills:       m.oomKills(),
	}
	if total, available, ok := m.memory(); ok {
		load.MemoryTotalBytes, load.MemoryAvailableBytes = total, available
	}
	disk := m.diskSpace()
	load.DiskTotalBytes, load.DiskFreeBytes = disk.Total, disk.Free
	return load, disk
}

func (m *Machine) cpuShare(now time.Time) *float64 {
	if !m.cpuAt.IsZero() && now.Sub(m.cpuAt) < cpuOver {
		return m.busy
	}
	times, ok := parseStat(m.read("proc/stat"))
	if !ok {
		return nil
	}
	if !m.cpuAt.IsZero() {
		m.busy = times.busySince(m.cpu)
	}
	m.cpu, m.cpuAt = times, now
	return m.busy
}

func (m *Machine) pressure(resource string) *float64 {
	share, ok := parsePressure(m.read("proc/pressure/" + resource))
	if !ok {
		return nil
	}
	return proto.Float64(share)
}

func (m *Machine) oomKills() *uint64 {
	n, ok := parseOOMKills(m.read("proc/vmstat"))
	if !ok {
		return nil
	}
	return proto.Uint64(n)
}

// memory is that of the machine, or of a control group that may have less.
func (m *Machine) memory() (total, available uint64, ok bool) {
	total, available, ok = parseMeminfo(m.read("proc/meminfo"))
	if m.cgroup == nil {
		m.cgroup = memoryCgroups(m.read("proc/self/cgroup"))
	}
	for _, c := range m.cgroup {
		limit, left, limited := c.memory(m.read)
		if !limited || ok && limit >= total {
			continue
		}
		total, available = limit, left
		ok = true
	}
	return total, min(available, total), ok
}

// maxFile bounds what is read of a file in /proc, in bytes. /proc/stat has a line
// for each CPU and interrupt, but what counts stands at its beginning.
const maxFile = 256 << 10

// read returns a file's beginning; nothing if it cannot be read.
func (m *Machine) read(name string) string {
	if !fs.ValidPath(name) {
		return ""
	}
	f, err := m.files.Open(name)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }() // it was only read
	return readBounded(f)
}
