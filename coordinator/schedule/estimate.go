package schedule

import (
	"fmt"
	"slices"
	"time"
)

const (
	// foreseen is how many legs of a queue it is estimated for when they get their
	// slots: errors add up, and what it costs does not grow with the queue.
	foreseen = 100
	// foresight is for how long such estimates are kept while nothing changes: holders
	// may turn out to take longer than they usually do.
	foresight = time.Second
	// sameEstimate is by how much an estimate may always be off before it is told again.
	sameEstimate = 2 * time.Second
)

// turn is a waiting leg as far as its estimate is concerned.
type turn struct {
	eligible []int         // workers that it may take a slot of
	takes    time.Duration // for how long it is expected to hold it; 0: not known
}

// forecast tells when legs, in the order of the queue, may be expected to get a slot;
// zero: not known. Ends are, by worker, the times at which slots that are in use may be
// expected to become free, ascending; those of which it is not known are left out, so
// that a forecast is rather too late than too early. It uses ends up.
func forecast(ends map[int][]time.Time, turns []turn) []time.Time {
	starts := make([]time.Time, len(turns))
	for n, t := range turns {
		first := -1
		for _, i := range t.eligible {
			if len(ends[i]) > 0 && (first < 0 || ends[i][0].Before(ends[first][0])) {
				first = i
			}
		}
		if first < 0 {
			continue
		}
		starts[n] = ends[first][0]
		rest := ends[first][1:]
		if t.takes > 0 {
			end := starts[n].Add(t.takes)
			at, _ := slices.BinarySearchFunc(rest, end, time.Time.Compare)
			rest = slices.Insert(rest, at, end)
		}
		ends[first] = rest
	}
	return starts
}

// expectedEnds are the times at which slots of a worker may be expected to become free
// for others, ascending. Attempts that take longer than they usually do say nothing.
func (s *Scheduler) expectedEnds(w *Worker, now time.Time) []time.Time {
	var ends []time.Time
	for _, holder := range s.holders[w.Name] {
		if end, known := s.expectedEnd(holder); known && end.After(now) {
			ends = append(ends, end)
		}
	}
	slices.SortFunc(ends, time.Time.Compare)
	return ends[min(max(w.Used-w.Slots, 0), len(ends)):] // slots that are no more, free nobody's
}

// foresee forecasts for those of the legs that are of the class; they and their rivals
// come in any order.
func (s *Scheduler) foresee(c *class, legs []*leg, now time.Time) []time.Time {
	slices.SortFunc(legs, before)
	legs = legs[:min(len(legs), foreseen)]
	ends, turns := map[int][]time.Time{}, make([]turn, len(legs))
	for n, l := range legs {
		turns[n] = turn{eligible: l.class.eligible, takes: s.warm.takes(l.demand)}
		for _, i := range l.class.eligible {
			if _, known := ends[i]; !known {
				ends[i] = s.expectedEnds(&s.view[i], now)
			}
		}
	}
	starts := forecast(ends, turns)
	var own []time.Time
	for n, l := range legs {
		if l.class == c {
			own = append(own, starts[n])
		}
	}
	return own
}

// crowd are the first legs of a class and its rivals, in any order.
func (s *Scheduler) crowd(c *class, rivals []*class) []*leg {
	legs := slices.Clone(c.queue[:min(len(c.queue), foreseen)])
	for _, r := range rivals {
		legs = append(legs, r.queue[:min(len(r.queue), foreseen)]...)
	}
	return legs
}

// estimate is for how long a waiting leg, which has others ahead, may be expected to go
// on waiting; 0: not known.
func (s *Scheduler) estimate(l *leg, ahead int) time.Duration {
	c, now := l.class, s.clock()
	if ahead >= foreseen {
		return 0
	}
	at, _ := slices.BinarySearchFunc(c.queue, l, before)
	if s.dirty || c.startsEpoch != s.epoch+1 || now.Sub(c.startsAt) >= foresight || at >= len(c.starts) {
		c.starts, c.startsAt, c.startsEpoch = s.foresee(c, s.crowd(c, s.rivalsOf(c)), now), now, s.epoch+1
	}
	if at >= len(c.starts) {
		return 0
	}
	return max(c.starts[at].Sub(now), 0)
}

// estimateNew is estimate for a leg that came now.
func (s *Scheduler) estimateNew(d Demand) time.Duration {
	l := &leg{demand: d, build: s.builds + 1}
	l.class = &class{demand: d}
	s.qualify(l.class)
	var rivals []*class
	ahead := 0
	for _, other := range s.classes {
		if overlap(l.class.eligible, other.eligible) {
			rivals = append(rivals, other)
			ahead += len(other.queue)
		}
	}
	if ahead >= foreseen {
		return 0
	}
	l.class.queue = []*leg{l}
	now := s.clock()
	starts := s.foresee(l.class, s.crowd(l.class, rivals), now)
	return max(starts[0].Sub(now), 0)
}

// outdated reports whether a waiting leg that was told where it stands, and since then
// has waited for as long, is to be told anew: an estimate that merely gets shorter as
// time goes by is no news.
func (p Position) outdated(now Position, since time.Duration) bool {
	if p.Ahead != now.Ahead || p.Reason != now.Reason {
		return true
	}
	left := p.Estimate - since
	switch {
	case p.Estimate == 0:
		return now.Estimate > 0
	case now.Estimate == 0: // it takes longer than that
		return since >= p.doubtful()
	}
	return (now.Estimate - left).Abs() >= p.tolerance()
}

// tolerance is by how much the estimate may be off.
func (p Position) tolerance() time.Duration { return max(p.Estimate/2, sameEstimate) }

// doubtful is after how long an estimate has proved to be wrong.
func (p Position) doubtful() time.Duration { return p.Estimate + p.tolerance() }

// String is where the leg stands, as people read it: "position 3 in the queue, starts
// in about 40 s: linux/arm64: 2 full".
func (p Position) String() string {
	estimate := ""
	if p.Estimate > 0 {
		estimate = ", starts in about " + Lasting(p.Estimate)
	}
	return fmt.Sprintf("position %d in the queue%s: %s", p.Ahead+1, estimate, p.Reason)
}
