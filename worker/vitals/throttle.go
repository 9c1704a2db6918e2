package vitals

import (
	"fmt"
	"strings"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// The marks of the throttle, as shares. Between a low and a high mark nothing
// changes.
//
// Pressure of the CPUs does not count: a build that runs as many compilers as
// there are CPUs stalls some of them always, is none the worse for it, and would
// hold back every other. What hurts is memory (the next step is that the kernel
// kills a compiler) and a disk that nothing gets through to. A builder writes
// much, so the disk's mark is high.
const (
	memoryPressureHigh, memoryPressureLow = 0.20, 0.05
	ioPressureHigh, ioPressureLow         = 0.80, 0.40
	memoryLeftEnough, memoryLeftLittle    = 0.10, 0.05 // of what is available
)

const (
	// lowerEvery is the time between two steps down. Pressure is an average over
	// 10 s: sooner, one cause would be answered twice.
	lowerEvery = 10 * time.Second
	// raiseEvery is the time between two steps up, and after the last step down.
	// What made the pressure often comes back with the slot.
	raiseEvery = 30 * time.Second
)

// Throttle lowers the number of slots that a worker offers while its machine is
// under pressure.
//
// The first step down takes the slots that are free, at least one; each further
// one takes one more, at most every 10 s, while a reading is beyond its high mark.
// One slot is always offered: the pressure may have other causes than builds. When
// every reading is beyond its low mark, slots come back one by one, every 30 s.
// Nothing that runs is ended, so that more may be in use than are offered.
//
// The zero value offers all slots.
type Throttle struct {
	withheld int // of the slots that there are
	changed  time.Time
	cause    string
}

// Update looks at the present load and returns how many of total slots to offer,
// 1 to total, and why it is not all of them. The reason changes only when the
// number does.
func (t *Throttle) Update(now time.Time, total, used int, load *archfarmv1.Load) (offered int, reason string) {
	t.withheld = min(t.withheld, total-1)
	offered = total - t.withheld
	high := causes(load)
	switch {
	case len(high) > 0 && offered > 1 && (t.withheld == 0 || now.Sub(t.changed) >= lowerEvery):
		next := offered - 1
		if t.withheld == 0 {
			next = max(1, min(next, used))
		}
		t.withheld, t.changed, t.cause = total-next, now, strings.Join(high, ", ")
	case t.withheld > 0 && calm(load) && now.Sub(t.changed) >= raiseEvery:
		t.withheld, t.changed = t.withheld-1, now
	}
	if t.withheld == 0 {
		return total, ""
	}
	offered = total - t.withheld
	return offered, fmt.Sprintf("%d of %d slots: %s", offered, total, t.cause)
}

// causes are the readings that are beyond their high marks, in words.
func causes(load *archfarmv1.Load) []string {
	var out []string
	if p := load.GetMemoryPressure(); p >= memoryPressureHigh {
		out = append(out, fmt.Sprintf("memory pressure %.0f %%", 100*p))
	}
	if left, known := memoryLeft(load); known && left < memoryLeftLittle {
		out = append(out, fmt.Sprintf("low memory: %s available of %s", Bytes(load.GetMemoryAvailableBytes()), Bytes(load.GetMemoryTotalBytes())))
	}
	if p := load.GetIoPressure(); p >= ioPressureHigh {
		out = append(out, fmt.Sprintf("I/O pressure %.0f %%", 100*p))
	}
	return out
}

// calm tells whether every reading is beyond its low mark.
func calm(load *archfarmv1.Load) bool {
	left, known := memoryLeft(load)
	return load.GetMemoryPressure() < memoryPressureLow && load.GetIoPressure() < ioPressureLow &&
		(!known || left >= memoryLeftEnough)
}

func memoryLeft(load *archfarmv1.Load) (share float64, known bool) {
	if load.GetMemoryTotalBytes() == 0 {
		return 0, false
	}
	return float64(load.GetMemoryAvailableBytes()) / float64(load.GetMemoryTotalBytes()), true
}
