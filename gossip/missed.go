package gossip

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

const (
	// maxMissed bounds how many lost members are remembered.
	maxMissed = 64
	// missedFor is how long a lost coordinator is tried again, and missedWorkerFor a
	// worker: machines that scale with the work come and go, and a farm has
	// coordinators on both sides of a cut, or seeds that lead there.
	missedFor       = 7 * 24 * time.Hour
	missedWorkerFor = 24 * time.Hour
	// missedAtOnce bounds how many are tried at a time: one that is cut off takes as
	// long as its connection takes to fail.
	missedAtOnce = 2
	// maxMissedWait is the longest wait between two tries of one member.
	maxMissedWait = 2 * time.Minute
)

// missed are members that were living and are no more, by name. memberlist does
// not tell who left from who was lost, so both are here.
type missed map[string]absence

// absence is what there is to know of one.
type absence struct {
	gossip      netip.AddrPort
	coordinator bool
	since, next time.Time // when it was lost, and when it is to be tried
	wait        time.Duration
}

// remember adds a member that is gone. When there are too many, one that is no
// coordinator goes, the longest lost first.
func (m missed) remember(name string, member known, now time.Time) {
	if !member.gossip.IsValid() {
		return
	}
	m[name] = absence{gossip: member.gossip, coordinator: member.coordinator != "", since: now, next: now}
	if len(m) <= maxMissed {
		return
	}
	var worst string
	for name, a := range m {
		if w, ok := m[worst]; !ok || a.lessUsefulThan(w) {
			worst = name
		}
	}
	delete(m, worst)
}

func (a absence) lessUsefulThan(b absence) bool {
	if a.coordinator != b.coordinator {
		return !a.coordinator
	}
	return a.since.Before(b.since)
}

// due returns the members to try now, coordinators first, each of them later and
// later, beginning with interval.
func (m missed) due(now time.Time, interval time.Duration) []netip.AddrPort {
	var names []string
	for name, a := range m {
		switch {
		case now.Sub(a.since) > a.patience():
			delete(m, name)
		case !now.Before(a.next):
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(x, y string) int {
		a, b := m[x], m[y]
		switch {
		case a.coordinator == b.coordinator:
			return a.next.Compare(b.next)
		case a.coordinator:
			return -1
		}
		return 1
	})
	var out []netip.AddrPort
	for _, name := range names[:min(len(names), missedAtOnce)] {
		a := m[name]
		a.wait = min(max(2*a.wait, interval), max(maxMissedWait, interval))
		a.next = now.Add(a.wait)
		m[name] = a
		out = append(out, a.gossip)
	}
	return out
}

// forget lets go of whoever was at an address, as somebody answers there.
func (m missed) forget(at netip.AddrPort) {
	maps.DeleteFunc(m, func(_ string, a absence) bool { return a.gossip == at })
}

func (a absence) patience() time.Duration {
	if a.coordinator {
		return missedFor
	}
	return missedWorkerFor
}
