package managed

import (
	"fmt"
	"strings"

	"github.com/archfarm/archfarm/worker/vitals"
)

const configFile = "buildkitd.toml"

// space is how much of a disk BuildKit's cache may take, in bytes.
type space struct {
	reserved uint64 // the cache always keeps
	used     uint64 // it never exceeds
	free     uint64 // on the disk, however little remains for it
	scratch  uint64 // of what is quickly made again
}

// spaceOn is the rule for a disk that mostly serves builds, which is what a worker
// has: up to 75 % of it for the cache, but 15 % of the disk, at most 100 GB, stay
// free, above the mark at which the worker is cordoned; 10 %, at most 50 GB, are
// kept even when something else fills the disk. BuildKit's own defaults are 20 %
// free and 100 GB at most, made for machines that do other things too.
func spaceOn(disk uint64) space {
	return space{
		reserved: min(disk/10, 50e9),
		used:     disk / 4 * 3,
		free:     min(disk/20*3, 100e9),
		scratch:  max(disk/20, min(disk/10, 512e6)),
	}
}

// config is what buildkitd reads (docs/buildkitd.toml.md in BuildKit). Its
// garbage collection goes through four policies, as BuildKit's default does: what
// is quickly made again and has not been used for two days, what has not been used
// for 60 days, any cache, and BuildKit's own data too. Where the size of the disk
// is not known, the default itself applies.
func (d *Daemon) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by archfarm at every start.\nroot = %q\n\n", d.Root())
	fmt.Fprintf(&b, "[log]\n  format = \"json\"\n\n[grpc]\n  address = [%q]\n\n", d.Addr().String())
	fmt.Fprintf(&b, "[otel]\n  socketPath = %q\n\n", d.path("otel.sock"))
	b.WriteString("[worker.containerd]\n  enabled = false\n\n[worker.oci]\n  enabled = true\n  gc = true\n")
	disk := vitals.DiskOf(d.Root()).Total
	if disk == 0 {
		return b.String()
	}
	s := spaceOn(disk)
	limits := fmt.Sprintf("  reservedSpace = \"%d\"\n  maxUsedSpace = \"%d\"\n  minFreeSpace = \"%d\"\n", s.reserved, s.used, s.free)
	for _, policy := range []string{
		"  filters = [\"type==source.local\", \"type==exec.cachemount\", \"type==source.git.checkout\"]\n" +
			"  keepDuration = \"48h\"\n" + fmt.Sprintf("  maxUsedSpace = \"%d\"\n", s.scratch),
		"  keepDuration = \"1440h\"\n" + limits,
		limits,
		"  all = true\n" + limits,
	} {
		b.WriteString("\n[[worker.oci.gcpolicy]]\n" + policy)
	}
	return b.String()
}
