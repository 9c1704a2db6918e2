package vitals

import (
	"math"
	"runtime"
	"testing"
	"testing/fstest"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

var start = time.Unix(1_700_000_000, 0)

func files(m map[string]string) fstest.MapFS {
	out := fstest.MapFS{}
	for name, text := range m {
		out[name] = &fstest.MapFile{Data: []byte(text)}
	}
	return out
}

const gib = 1 << 30

func TestMachine_ReadsWhatThereIs(t *testing.T) {
	t.Parallel()
	root := files(map[string]string{
		"proc/stat":            "cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1\n",
		"proc/meminfo":         "MemTotal:       16777216 kB\nMemFree: 1 kB\nMemAvailable:   8388608 kB\n",
		"proc/pressure/cpu":    "some avg10=55.50 avg60=1.00 avg300=1.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"proc/pressure/memory": "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
		"proc/vmstat":          "nr_free_pages 1\noom_kill 7\noom_kill_other 9\n",
	})
	m := newMachine(root, "")
	m.cpuAt = start // not when the test ran
	root["proc/stat"] = &fstest.MapFile{Data: []byte("cpu  130 0 120 730 120 0 0 0 0 0\n")}
	load, _ := m.Read(start.Add(time.Second))
	want := &archfarmv1.Load{
		Cpu: proto.Float64(0.5), CpuPressure: proto.Float64(0.555), MemoryPressure: proto.Float64(0),
		MemoryTotalBytes: 16 * gib, MemoryAvailableBytes: 8 * gib, OomKills: proto.Uint64(7),
	}
	if !proto.Equal(load, want) {
		t.Errorf("read %v\nwant %v", load, want)
	}
	root["proc/stat"] = &fstest.MapFile{Data: []byte("cpu  131 0 120 730 120 0 0 0 0 0\n")}
	if load, _ = m.Read(start.Add(1100 * time.Millisecond)); load.GetCpu() != 0.5 {
		t.Errorf("a share of a moment: %v", load.GetCpu())
	}
}

func TestMachine_WhatIsNotThereIsAbsent(t *testing.T) {
	t.Parallel()
	if load, disk := newMachine(fstest.MapFS{}, "").Read(start); !proto.Equal(load, &archfarmv1.Load{}) || disk != (Disk{}) {
		t.Errorf("read %v, %v of nothing", load, disk)
	}
}

func TestMachine_TheOneThatThisRunsOn(t *testing.T) {
	t.Parallel()
	load, disk := New(t.TempDir() + "/not/there/yet").Read(time.Now())
	if runtime.GOOS == "linux" && load.GetMemoryTotalBytes() < 1<<20 {
		t.Errorf("read %v", load)
	}
	if disk.Total < 1<<20 || disk.Free > disk.Total {
		t.Errorf("disk %+v", disk)
	}
}

func TestMachine_AControlGroupsLimitCounts(t *testing.T) {
	t.Parallel()
	const meminfo = "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n"
	for name, test := range map[string]struct {
		files            map[string]string
		total, available uint64
	}{
		"version 2, the group above": {map[string]string{
			"proc/self/cgroup":                    "0::/farm/agent\n",
			"sys/fs/cgroup/farm/agent/memory.max": "max\n", "sys/fs/cgroup/farm/memory.max": "4294967296\n",
			"sys/fs/cgroup/farm/memory.current": "3221225472\n", "sys/fs/cgroup/farm/memory.stat": "anon 1\ninactive_file 1073741824\n",
		}, 4 * gib, 2 * gib},
		"version 1, the root of a container": {map[string]string{
			"proc/self/cgroup":                           "5:cpu:/x\n4:memory:/docker/0123\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "2147483648\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "1073741824\n",
		}, 2 * gib, gib},
		"version 1 without a limit": {map[string]string{
			"proc/self/cgroup":                           "4:memory:/\n",
			"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
		}, 16 * gib, 8 * gib},
		"used beyond the limit": {map[string]string{
			"proc/self/cgroup":             "0::/\n",
			"sys/fs/cgroup/memory.max":     "1073741824\n",
			"sys/fs/cgroup/memory.current": "1073741825\n",
		}, gib, 0},
	} {
		test.files["proc/meminfo"] = meminfo
		load, _ := newMachine(files(test.files), "").Read(start)
		if load.GetMemoryTotalBytes() != test.total || load.GetMemoryAvailableBytes() != test.available {
			t.Errorf("%s: %d available of %d, want %d of %d", name, load.GetMemoryAvailableBytes(), load.GetMemoryTotalBytes(), test.available, test.total)
		}
	}
}

func share(p *float64) bool { return p == nil || *p >= 0 && *p <= 1 && !math.IsNaN(*p) }

// FuzzRead feeds every parser with the same text.
func FuzzRead(f *testing.F) {
	f.Add("cpu  100 0 100 700 100 0 0 0 0 0\n", "cpu 1 2 3 4 5\n", "0::/a/../../b\n4:memory:/x\n")
	f.Add("MemTotal: 18014398509481984 kB\nMemAvailable: 2 kB\noom_kill 18446744073709551615\n", "some avg10=NaN\n", "0::/\n")
	f.Add("some avg10=100.00 avg60=1\n", "some avg10=1e300\n", "4294967296")
	f.Fuzz(func(t *testing.T, one, two, group string) {
		root := files(map[string]string{
			"proc/stat": one, "proc/meminfo": one, "proc/vmstat": one, "proc/self/cgroup": group,
			"proc/pressure/cpu": one, "proc/pressure/memory": two, "proc/pressure/io": group,
			"sys/fs/cgroup/memory.max": two, "sys/fs/cgroup/memory.current": one, "sys/fs/cgroup/memory.stat": one,
		})
		m := newMachine(root, "")
		m.cpuAt = start
		root["proc/stat"] = &fstest.MapFile{Data: []byte(two)}
		load, _ := m.Read(start.Add(time.Second))
		if !share(load.Cpu) || !share(load.CpuPressure) || !share(load.MemoryPressure) || !share(load.IoPressure) {
			t.Errorf("shares out of 0 to 1: %v", load)
		}
		if load.GetMemoryAvailableBytes() > load.GetMemoryTotalBytes() {
			t.Errorf("more memory available than there is: %v", load)
		}
		if len(m.cgroup) > 100*(len(group)+1) {
			t.Errorf("%d control groups of %d bytes", len(m.cgroup), len(group))
		}
	})
}

func TestBytes(t *testing.T) {
	t.Parallel()
	for n, want := range map[uint64]string{
		0: "0 B", 999: "999 B", 1000: "1.0 kB", 1_200_000_000: "1.2 GB", 999_999_999: "1.0 GB", math.MaxUint64: "18.4 EB",
	} {
		if got := Bytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	if got, want := (Disk{Total: 30e9, Free: 1.2e9}).String(), "96 % full: 1.2 GB free of 30.0 GB"; got != want {
		t.Errorf("a disk is %q, want %q", got, want)
	}
}

func pressed(memory, io float64) *archfarmv1.Load {
	return &archfarmv1.Load{MemoryPressure: &memory, IoPressure: &io}
}

func TestThrottle_StepsDownAndComesBack(t *testing.T) {
	t.Parallel()
	var th Throttle
	starved := &archfarmv1.Load{MemoryTotalBytes: 64e9, MemoryAvailableBytes: 1e9, MemoryPressure: proto.Float64(0.34)}
	for i, step := range []struct {
		after   time.Duration
		used    int
		load    *archfarmv1.Load
		offered int
		reason  string
	}{
		{0, 2, pressed(0.10, 0), 4, ""},
		{0, 2, starved, 2, "2 of 4 slots: memory pressure 34 %, low memory: 1.0 GB available of 64.0 GB"},
		{9, 2, pressed(0.9, 0), 2, "2 of 4 slots: memory pressure 34 %, low memory: 1.0 GB available of 64.0 GB"},
		{10, 2, pressed(0.5, 0.9), 1, "1 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{60, 2, pressed(0.5, 0.9), 1, "1 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{90, 0, pressed(0.1, 0.9), 1, "1 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{91, 0, pressed(0.1, 0), 1, "1 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{92, 0, pressed(0, 0), 2, "2 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{121, 0, pressed(0, 0), 2, "2 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{122, 0, pressed(0, 0), 3, "3 of 4 slots: memory pressure 50 %, I/O pressure 90 %"},
		{152, 0, nil, 4, ""},
	} {
		offered, reason := th.Update(start.Add(step.after*time.Second), 4, step.used, step.load)
		if offered != step.offered || reason != step.reason {
			t.Fatalf("step %d: %d %q, want %d %q", i, offered, reason, step.offered, step.reason)
		}
	}
}

func TestThrottle_IsWithinItsBoundsAndSlow(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		total := rapid.IntRange(1, 8).Draw(r, "slots")
		var th Throttle
		now, changed, before := start, time.Time{}, total
		for range rapid.IntRange(1, 60).Draw(r, "readings") {
			now = now.Add(time.Duration(rapid.IntRange(0, 40).Draw(r, "seconds")) * time.Second)
			used := rapid.IntRange(0, total).Draw(r, "used")
			load := pressed(rapid.Float64Range(0, 1).Draw(r, "memory"), rapid.Float64Range(0, 1).Draw(r, "io"))
			if rapid.Bool().Draw(r, "calm") {
				load = pressed(0, 0)
			}
			offered, reason := th.Update(now, total, used, load)
			switch {
			case offered < 1 || offered > total || (offered == total) != (reason == ""):
				r.Fatalf("%d of %d offered, %q", offered, total, reason)
			case offered > before && (offered != before+1 || now.Sub(changed) < raiseEvery || !calm(load)):
				r.Fatalf("%d after %d offered in %s at %v", offered, before, now.Sub(changed), load)
			case offered < before && len(causes(load)) == 0:
				r.Fatalf("%d after %d offered without a cause", offered, before)
			case offered < before && before < total && (offered != before-1 || now.Sub(changed) < lowerEvery):
				r.Fatalf("%d after %d offered in %s", offered, before, now.Sub(changed))
			case before == total && len(causes(load)) > 0 && total > 1 && offered == total:
				r.Fatalf("all %d offered under %v", total, causes(load))
			}
			if offered != before {
				changed, before = now, offered
			}
		}
		for range total {
			now = now.Add(raiseEvery)
			before, _ = th.Update(now, total, 0, pressed(0, 0))
		}
		if before != total {
			r.Fatalf("%d of %d offered after a long calm", before, total)
		}
	})
}

func TestFill_HasTwoMarks(t *testing.T) {
	t.Parallel()
	at := func(percent uint64) Disk { return Disk{Total: 1000, Free: 10 * (100 - percent)} }
	f := Fill{High: 0.95, Low: 0.90}
	for i, step := range []struct {
		disk     Disk
		overrule bool
		full     bool
	}{
		{at(94), false, false},
		{at(95), false, true},
		{at(91), false, true},
		{at(89), false, false},
		{at(94), true, false}, // nothing to overrule
		{at(96), false, true},
		{at(96), true, false},
		{at(99), false, false},
		{at(89), false, false},
		{at(99), false, true},
		{Disk{}, false, false},
	} {
		if step.overrule {
			f.Overrule()
		}
		if full := f.Update(step.disk); full != step.full {
			t.Errorf("step %d: %s counts as full: %v", i, step.disk, full)
		}
	}
	if target := f.Target(at(99)); target < 110 || target > 130 {
		t.Errorf("target %d of 1000", target)
	}
}
