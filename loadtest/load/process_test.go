package load

import (
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
)

func TestProcess_WhatTheKernelTells(t *testing.T) {
	t.Parallel()
	const status = "VmPeak:\t  9 kB\nVmHWM:\t  2048 kB\nVmRSS:\t 1 kB\n"
	for field, want := range map[string]int64{"VmHWM": 2 << 20, "VmRSS": 1 << 10} {
		if got, err := parseMemory(status, field); err != nil || got != want {
			t.Errorf("%s %d, %v", field, got, err)
		}
	}
	if _, err := parseMemory("VmPeak:\t  9 kB\n", "VmHWM"); err == nil {
		t.Error("a peak out of nothing")
	}
	if got, err := parseCPU("7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 9"); err != nil || got != 2*time.Second {
		t.Errorf("CPU time %s, %v", got, err)
	}
	for _, bad := range []string{"", "7 (a) S 1 2", "7 (a) S 1 2 3 4 5 6 7 8 9 10 x 50"} {
		if _, err := parseCPU(bad); err == nil {
			t.Errorf("%q has a CPU time", bad)
		}
	}
	if Peak(t, os.Getpid()) < 1<<20 || Resident(t, os.Getpid()) < 1<<20 || CPUTime(t, os.Getpid()) < 0 {
		t.Error("this process uses no memory")
	}
}

func TestPeak_FallsAfterReset(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: resetting the peak may need root")
	}
	const size = 64 << 20
	pid := os.Getpid()
	hog := make([]byte, size)
	for i := range hog {
		hog[i] = 1
	}
	high := Peak(t, pid)
	if high < size {
		t.Errorf("the peak is %d bytes with %d in use", high, size)
	}
	runtime.KeepAlive(hog)
	debug.FreeOSMemory() // of hog, too; else the process is as large as ever, or a little larger
	ResetPeak(t, pid)
	if after := Peak(t, pid); after <= 0 || after > high {
		t.Errorf("after the reset: %d bytes, was %d", after, high)
	}
}
