package schedule

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// NoWorkers is what Fleet says of an empty fleet.
const NoWorkers = "no workers"

// Choose picks a worker with a free slot for a demand: warm, the name of the worker
// that last built this project, if it is one of them, else the least loaded one by the
// share of its slots in use; among equals the one with most free slots, then (of a
// Scheduler) the one that the fewest projects were last built on, then by rendezvous
// hashing of the demand's key, so that projects spread and stay. It reports
// false when no eligible worker is free.
func Choose(workers []Worker, d Demand, warm string) (Assignment, bool) {
	var eligible []int
	emulated := !native(workers, d)
	for i := range workers {
		if workers[i].State == Ready && runs(&workers[i], d, emulated) {
			eligible = append(eligible, i)
		}
	}
	i := pick(workers, eligible, d.Key, warm, nil)
	if i < 0 {
		return Assignment{}, false
	}
	return assign(workers[i], warm, emulated), true
}

// assign describes the choice of w.
func assign(w Worker, warm string, emulated bool) Assignment {
	a := Assignment{Worker: w.Name, Warm: w.Name == warm, Emulated: emulated}
	switch {
	case emulated:
		a.Why = whyEmulated
	case a.Warm:
		a.Why = "warm: last built this project"
	default:
		a.Why = "least loaded: " + strconv.Itoa(w.Used) + " of " + strconv.Itoa(w.Slots) + " slots used"
	}
	return a
}

// whyEmulated is why a leg runs where its platform is not native.
const whyEmulated = "emulated: no native worker"

// pick returns the best free one of the eligible workers, or -1. Homes counts the
// projects that each was last to build: those of a monorepo do not pile up where hashing
// happens to put them.
func pick(workers []Worker, eligible []int, key, warm string, homes map[string]int) int {
	best := -1
	var bestHash uint64 // 0: not computed yet; only ties need it
	for _, i := range eligible {
		w := &workers[i]
		if w.free() <= 0 {
			continue
		}
		if warm != "" && w.Name == warm {
			return i
		}
		if best < 0 {
			best = i
			continue
		}
		b := &workers[best]
		order := cmp.Or(lighter(w, b), cmp.Compare(homes[w.Name], homes[b.Name]))
		if order == 0 {
			if bestHash == 0 {
				bestHash = rendezvous(key, b.Name)
			}
			hash := rendezvous(key, w.Name)
			order = cmp.Or(cmp.Compare(bestHash, hash), cmp.Compare(w.Name, b.Name))
			if order < 0 {
				best, bestHash = i, hash
			}
			continue
		}
		if order < 0 {
			best, bestHash = i, 0
		}
	}
	return best
}

// lighter orders workers by load, the least loaded first.
func lighter(a, b *Worker) int {
	// a.Used/a.Slots against b.Used/b.Slots, without rounding.
	share := cmp.Compare(int64(a.Used)*int64(b.Slots), int64(b.Used)*int64(a.Slots))
	return cmp.Or(share, cmp.Compare(b.free(), a.free()))
}

// free is the number of free slots; none where more are used than there are.
func (w *Worker) free() int { return max(w.Slots-w.Used, 0) }

// rendezvous is the weight of a worker for a key: FNV-1a, then murmur3's finaliser,
// because FNV alone hardly mixes the last characters, in which names of workers differ.
// It is the same in every coordinator and after every restart.
func rendezvous(key, worker string) uint64 {
	f := fnv.New64a()
	_, _ = io.WriteString(f, key)
	_, _ = f.Write([]byte{0})
	_, _ = io.WriteString(f, worker)
	h := f.Sum64()
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	h ^= h >> 33
	return max(h, 1)
}

// same reports whether two normalised platforms are one to the hardware.
func same(a, b ocispecs.Platform) bool {
	return a.Architecture == b.Architecture && a.OS == b.OS && a.Variant == b.Variant
}

// InPool reports whether pool is one of those; if there are none any will do.
func InPool(pools []string, pool string) bool {
	return len(pools) == 0 || slices.Contains(pools, pool)
}

// native reports whether a worker in the demand's pools, whatever its state and
// whichever the demand insists on, runs its platform natively. Where none does it may
// be emulated.
func native(workers []Worker, d Demand) bool {
	return d.Anywhere || slices.ContainsFunc(workers, func(w Worker) bool { return InPool(d.Pools, w.Pool) && Runs(w.Platforms, d.Platform) })
}

// runs reports whether a worker, whatever its state, may run what is demanded:
// natively, or else by emulation.
func runs(w *Worker, d Demand, emulated bool) bool {
	switch {
	case d.On != "" && d.On != w.Name, !InPool(d.Pools, w.Pool):
		return false
	case d.Anywhere:
		return true
	case emulated:
		return w.AllowEmulation && Runs(w.Emulated, d.Platform)
	}
	return Runs(w.Platforms, d.Platform)
}

// Runs reports whether a platform is among those that a machine runs natively, all
// of them normalised: exactly this one, since workers list every variant and hardware
// knows no "compatible".
func Runs(native []ocispecs.Platform, p ocispecs.Platform) bool {
	return slices.ContainsFunc(native, func(n ocispecs.Platform) bool { return same(n, p) })
}

// served reports whether a worker may run what is demanded, sooner or later: one that
// drains may come back, or its successor under the same name. Who insists on that very
// worker has to be quicker.
func served(workers []Worker, d Demand, emulated bool) bool {
	for i := range workers {
		if workers[i].State == Draining && d.On != "" {
			continue
		}
		if runs(&workers[i], d, emulated) {
			return true
		}
	}
	return false
}

// Explain counts the workers that run what is demanded, by what they are doing:
// "2 draining, 1 full". It is empty when there are none.
func Explain(workers []Worker, d Demand) string {
	return explain(workers, d, nil)
}

// condition is what keeps a worker that runs what is demanded from taking it now.
type condition int

const (
	full condition = iota
	draining
	unavailable
	cordoned
	slotless
	barred
	idling
	conditions
)

// String is the condition as people read it after a number or "is".
func (c condition) String() string {
	return [conditions]string{"full", "draining", "unavailable", "cordoned", "without slots", "excluded after an earlier attempt", "free"}[c]
}

// conditionOf is the condition of a worker that runs what is demanded.
func conditionOf(w *Worker, excluded []string) condition {
	switch {
	case slices.Contains(excluded, w.Name):
		return barred
	case w.State == Draining:
		return draining
	case w.State == Cordoned:
		return cordoned
	case w.State != Ready:
		return unavailable
	case w.Slots == 0:
		return slotless
	case w.free() == 0:
		return full
	}
	return idling
}

// explain is Explain for a leg that must not run on the excluded workers.
func explain(workers []Worker, d Demand, excluded []string) string {
	var counts [conditions]int
	var reasons [conditions][]string
	emulated := !native(workers, d)
	for i := range workers {
		w := &workers[i]
		if runs(w, d, emulated) {
			c := conditionOf(w, excluded)
			counts[c]++
			reasons[c] = append(reasons[c], w.Reason)
		}
	}
	order := []condition{full, draining, unavailable, cordoned, slotless, barred, idling}
	slices.SortStableFunc(order, func(a, b condition) int { return cmp.Compare(counts[b], counts[a]) })
	var parts []string
	for _, c := range order {
		if counts[c] == 0 {
			continue
		}
		part := strconv.Itoa(counts[c]) + " " + c.String()
		if r := commonReason(reasons[c]); r != "" && (c == unavailable || c == cordoned) {
			part += " (" + r + ")"
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ", ")
}

// commonReason is the reason that all of them give, made fit for one line: it comes
// from a machine that may be sick.
func commonReason(reasons []string) string {
	const longest = 80 // characters
	if len(reasons) == 0 {
		return ""
	}
	for _, r := range reasons[1:] {
		if r != reasons[0] {
			return ""
		}
	}
	line := []rune(strings.Join(strings.Fields(strings.ToValidUTF8(reasons[0], "")), " "))
	line = slices.DeleteFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f })
	if len(line) > longest {
		line = append(line[:longest-1], '…')
	}
	return string(line)
}

// noWorker is the error for a demand that nobody can serve.
func noWorker(workers []Worker, d Demand, excluded []string) *build.NoWorkerError {
	var own, others []Worker
	emulators := 0
	for _, w := range workers {
		switch {
		case InPool(d.Pools, w.Pool):
			own = append(own, w)
			if !w.AllowEmulation && Runs(w.Emulated, d.Platform) {
				emulators++
			}
		case InPool(d.Known, w.Pool):
			others = append(others, w)
		}
	}
	err := &build.NoWorkerError{
		Platform: platforms.Format(d.Platform), Pools: d.Pools, Fleet: Fleet(own), Emulators: emulators,
		Detail: explain(workers, d, excluded),
	}
	if len(others) > 0 {
		err.Others = Fleet(others)
	}
	return err
}

// Fleet lists what a fleet runs, for people: "linux/amd64 (3), linux/arm64 (5)". A
// worker counts under each of its platforms, without those that its others imply:
// variants whose base it has, and linux/386 beside linux/amd64.
func Fleet(workers []Worker) string {
	counts := map[string]int{}
	for i := range workers {
		for _, name := range basePlatforms(workers[i].Platforms) {
			counts[name]++
		}
	}
	if len(workers) == 0 {
		return NoWorkers
	}
	if len(counts) == 0 {
		return "workers without any platform (" + strconv.Itoa(len(workers)) + ")"
	}
	names := make([]string, 0, len(counts))
	for name := range counts {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		names[i] = fmt.Sprintf("%s (%d)", name, counts[name])
	}
	return strings.Join(names, ", ")
}

// basePlatforms formats the platforms that say what a machine is, each once.
func basePlatforms(all []ocispecs.Platform) []string {
	has := func(os, arch, variant string) bool {
		return slices.ContainsFunc(all, func(p ocispecs.Platform) bool {
			return p.OS == os && p.Architecture == arch && p.Variant == variant
		})
	}
	var names []string
	for _, p := range all {
		implied := p.Variant != "" && has(p.OS, p.Architecture, "") ||
			p.Architecture == "386" && has(p.OS, "amd64", "")
		name := platforms.Format(ocispecs.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant})
		if !implied && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// Primary is the platform that a worker is known by: its best.
func Primary(w Worker) string {
	if len(w.Platforms) == 0 {
		return ""
	}
	return platforms.FormatAll(w.Platforms[0])
}

// Base are the platforms that say what a worker is, formatted: its native ones without
// those that they imply.
func Base(w Worker) []string { return basePlatforms(w.Platforms) }
