package main

import (
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

// filesPerWorker are its connections to the coordinator and to BuildKit, both ends of the latter, and what it reads of the
// machine now and then; spareFiles are the program's own.
const filesPerWorker, spareFiles = 5, 200

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
	return measurement{pid: pid, since: time.Now(), usage: usage{coordinator: load.CPUTime(t, pid), agents: load.CPUTime(t, os.Getpid())}}
}

func (m measurement) end(t farmtest.T) usage {
	t.Helper()
	return usage{
		took: time.Since(m.since), coordinator: load.CPUTime(t, m.pid) - m.coordinator, agents: load.CPUTime(t, os.Getpid()) - m.agents,
	}
}

// percent is how much of one CPU a time of use was.
func (u usage) percent(used time.Duration) float64 { return 100 * used.Seconds() / u.took.Seconds() }
