package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

// The relays whose CPU time is compared. The bare proxy copies each connection's bytes through its memory, as io.Copy
// does, and knows nothing of them. It runs in this process, which does nothing else meanwhile.
const coordinatorCPU, proxyCPU = "coordinator", "bare TCP proxy"

// relays measure the CPU time that it costs to relay bytes, whichever way they go. What counts are those of the context
// or the image, once for each buildkitd that gets or sends them.
func relays(t farmtest.T, o options) []contest {
	r, s := newRig(t), newSource(t, o.Size)
	r.behind(t, load.NewLink(0))
	dest := filepath.Join(farmtest.Folder(t), "image.tar")
	upload := func(platforms string) func(farmtest.T, string) {
		return func(t farmtest.T, builder string) { r.build(t, builder, platforms, s.dir) }
	}
	export := func(t farmtest.T, builder string) {
		r.build(t, builder, r.native, s.dir, "--provenance=false", "--output", "type=oci,compression=uncompressed,dest="+dest)
		if info, err := os.Stat(dest); err != nil || info.Size() < o.Size {
			t.Fatalf("the archive is too small: %v, %v", info, err)
		}
	}
	anew := func(t farmtest.T) {
		r.forget(t)
		s.change(t)
	}
	known := func(t farmtest.T) { r.build(t, twoNodes, r.native, s.dir) }
	return []contest{
		r.relay("a context, one platform", o.Size, o.Turns, anew, upload(r.native)),
		r.relay("a context, two platforms", 2*o.Size, o.Turns, anew, upload(r.both)),
		r.relay("an OCI archive, one platform", o.Size, o.Turns, known, export),
	}
}

func (r *rig) relay(what string, bytes int64, rounds int, prepare func(farmtest.T), build func(t farmtest.T, builder string)) contest {
	var agents []time.Duration
	return contest{
		name: "CPU time by GB relayed: " + what, sides: []string{coordinatorCPU, proxyCPU}, rounds: rounds, prepare: prepare,
		build: func(t farmtest.T, side string) time.Duration {
			builder, pid := theFarm, r.farm.Coordinator.Pid()
			if side == proxyCPU {
				builder, pid = linkedNodes, os.Getpid()
			}
			before, beside := load.CPUTime(t, pid), r.agentsCPU(t)
			build(t, builder)
			if side == coordinatorCPU {
				agents = append(agents, perGB(r.agentsCPU(t)-beside, bytes))
			}
			return perGB(load.CPUTime(t, pid)-before, bytes)
		},
		note: func() string { return fmt.Sprintf("the workers' agents %s", milliseconds(agents)) },
	}
}

// agentsCPU is the CPU time of all workers' agents together.
func (r *rig) agentsCPU(t farmtest.T) (used time.Duration) {
	t.Helper()
	for _, w := range r.farm.Workers {
		used += load.CPUTime(t, w.Agent.Pid())
	}
	return used
}

// perGB is what 1,000,000,000 bytes take.
func perGB(used time.Duration, bytes int64) time.Duration {
	return time.Duration(float64(used) * 1e9 / float64(bytes))
}
