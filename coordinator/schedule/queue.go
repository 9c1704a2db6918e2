package schedule

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/containerd/platforms"
)

// classKey is what makes legs eligible for the same workers.
type classKey struct {
	os, arch, variant string // all empty when anywhere
	anywhere          bool
	on                string
	pools             string // sorted names, each followed by a NUL
	excluded          string // likewise
}

// class is the waiting legs that are eligible for the same workers. Only its first leg
// can be next, which is what keeps a pass over thousands of waiting legs cheap. A class
// exists while legs wait in it.
type class struct {
	key      classKey
	demand   Demand // any leg's: what is in the key counts
	excluded []string
	emulated bool   // no worker is native to it, so that those count that emulate it
	queue    []*leg // in the order of the queue, never empty between events

	eligible []int     // positions in the view, ascending, of ready workers
	gone     time.Time // since when no worker at all could ever serve it; zero: one could

	changed chan struct{} // closed when positions or reasons change; nil: nobody waits
	dry     bool          // in a pass: none of the eligible workers is free

	rivals       []*class // the others with eligible workers in common
	rivalsLayout uint64   // the layout that rivals is of; 0: none

	reason      string
	reasonEpoch uint64 // epoch+1 that reason is of; 0: none

	starts      []time.Time // of its first legs: when each may be expected to get a slot; zero: not known
	startsAt    time.Time   // when that was estimated
	startsEpoch uint64      // epoch+1 that starts are of; 0: none
}

// legState is where a leg is between the queue and its worker.
type legState int

const (
	idle    legState = iota // neither queued nor holding a slot; Wait queues it again
	queued                  // in its class
	granted                 // holds a slot
	closed                  // its ticket is closed
)

// leg is one leg of a build, from Enqueue to Close.
type leg struct {
	ticket   *Ticket
	demand   Demand
	build    uint64 // with index: its place in the queue, for good
	index    int
	excluded []string // sorted

	state      legState
	since      time.Time // when it was queued
	class      *class    // while queued
	assignment Assignment
	began      time.Time     // while granted: since when
	host       *leg          // while granted: the sibling whose slot it shares; nil: its own
	moved      chan struct{} // closed when the state or the class changes; nil: nobody waits
}

// before orders legs as the queue does.
func before(a, b *leg) int {
	return cmp.Or(cmp.Compare(a.build, b.build), cmp.Compare(a.index, b.index))
}

// classKey is the key of the class that the leg belongs to.
func (l *leg) classKey() classKey {
	k := classKey{anywhere: l.demand.Anywhere, on: l.demand.On}
	if !k.anywhere {
		k.os, k.arch, k.variant = l.demand.Platform.OS, l.demand.Platform.Architecture, l.demand.Platform.Variant
	}
	k.pools, k.excluded = joined(l.demand.Pools), joined(l.excluded)
	return k
}

// joined makes names comparable.
func joined(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return strings.Join(names, "\x00") + "\x00"
}

// enter puts a leg into the queue, at the place of its build.
func (s *Scheduler) enter(l *leg, now time.Time) {
	key := l.classKey()
	c := s.classes[key]
	if c == nil {
		c = &class{key: key, demand: l.demand, excluded: slices.Clone(l.excluded)}
		s.classes[key] = c
		s.layout++
		s.qualify(c)
		if !c.gone.IsZero() && s.starting(now) {
			c.gone = s.started // the fleet never had one
		}
	}
	at, _ := slices.BinarySearchFunc(c.queue, l, before)
	if at < len(c.queue) {
		s.dirty = true // those behind it move
	}
	c.queue = slices.Insert(c.queue, at, l)
	l.state, l.class, l.since = queued, c, now
	s.stale = true
	s.signal(&l.moved)
}

// leave takes a leg out of the queue.
func (s *Scheduler) leave(l *leg) {
	c := l.class
	at, found := slices.BinarySearchFunc(c.queue, l, before)
	if found {
		c.queue = slices.Delete(c.queue, at, at+1)
	}
	if len(c.queue) == 0 {
		delete(s.classes, c.key)
		s.layout++
	}
	l.state, l.class = idle, nil
	s.dirty = true
	s.signal(&l.moved)
}

// qualify finds the workers that a class is eligible for.
func (s *Scheduler) qualify(c *class) {
	c.eligible = c.eligible[:0]
	present := false
	c.emulated = !native(s.view, c.demand)
	for i := range s.view {
		w := &s.view[i]
		if !runs(w, c.demand, c.emulated) || slices.Contains(c.excluded, w.Name) {
			continue
		}
		present = true
		if w.State == Ready {
			c.eligible = append(c.eligible, i)
		}
	}
	switch {
	case present:
		c.gone = time.Time{}
	case c.gone.IsZero():
		c.gone = s.clock()
	}
}

// pass goes once through the waiting legs in order, and each takes a free eligible
// worker if there is one. Legs of a class are alike in that, so after its first leg
// found none a class is done with.
func (s *Scheduler) pass() {
	for _, c := range s.classes {
		c.dry = false
	}
	for {
		var next *leg
		for _, c := range s.classes {
			if !c.dry && (next == nil || before(c.queue[0], next) < 0) {
				next = c.queue[0]
			}
		}
		if next == nil {
			s.stale = false
			return
		}
		if !s.grant(next) {
			next.class.dry = true
		}
	}
}

// grant gives the leg a slot if one is free.
func (s *Scheduler) grant(l *leg) bool {
	warm := s.warm.worker(l.demand)
	i := pick(s.view, l.class.eligible, l.demand.Key, warm, s.warm.homes)
	if i >= 0 {
		s.settle(l, assign(s.view[i], warm, l.class.emulated), nil)
		s.hold(l.assignment.Worker, 1)
		return true
	}
	if host := s.host(l); host != nil {
		why := fmt.Sprintf("shares the slot of leg %d of this build: no other is free", host.index)
		if l.class.emulated {
			why = whyEmulated + "; " + why
		}
		s.settle(l, Assignment{
			Worker: host.assignment.Worker, Warm: host.assignment.Worker == warm, Why: why,
			Emulated: l.class.emulated, Shared: true, With: host.index,
		}, host)
		return true
	}
	return false
}

// settle takes the leg out of the queue with what it was assigned.
func (s *Scheduler) settle(l *leg, a Assignment, host *leg) {
	a.Waited = max(s.clock().Sub(l.since), 0)
	s.warm.record(l.demand, a.Worker)
	s.leave(l)
	l.state, l.assignment, l.host, l.began = granted, a, host, s.clock()
	if host == nil {
		s.holders[a.Worker] = append(s.holders[a.Worker], l)
	}
}

// host returns a sibling with a slot that the leg may share, or nil.
func (s *Scheduler) host(l *leg) *leg {
	if !s.Share {
		return nil
	}
	for _, sibling := range l.ticket.legs {
		if sibling == nil || sibling.state != granted || sibling.host != nil {
			continue
		}
		i, attached := s.index[sibling.assignment.Worker]
		if _, refused := s.refused[sibling.assignment.Worker]; refused || !attached {
			continue // the slot may be the refused one
		}
		if _, eligible := slices.BinarySearch(l.class.eligible, i); eligible {
			return sibling
		}
	}
	return nil
}

// yield takes the slot of a leg back, if it holds one. One that siblings share stays
// granted, in the name of one of them.
func (s *Scheduler) yield(l *leg) bool {
	if l.state != granted {
		return false
	}
	l.state = idle
	s.signal(&l.moved)
	if l.host != nil {
		l.host = nil
		return true
	}
	var heir *leg
	for _, sibling := range l.ticket.legs {
		if sibling.host != l {
			continue
		}
		sibling.host = heir
		if heir == nil {
			heir = sibling
		}
	}
	s.succeed(l, heir)
	if heir == nil {
		s.hold(l.assignment.Worker, -1)
	}
	return true
}

// succeed makes the heir, if there is one, hold the leg's slot.
func (s *Scheduler) succeed(l, heir *leg) {
	name := l.assignment.Worker
	holders := s.holders[name]
	at := slices.Index(holders, l)
	if heir != nil {
		holders[at] = heir
		return
	}
	if holders = slices.Delete(holders, at, at+1); len(holders) == 0 {
		delete(s.holders, name)
		return
	}
	s.holders[name] = holders
}

// position tells where a queued leg stands.
func (s *Scheduler) position(l *leg) Position {
	c := l.class
	ahead, _ := slices.BinarySearchFunc(c.queue, l, before)
	for _, r := range s.rivalsOf(c) {
		n, _ := slices.BinarySearchFunc(r.queue, l, before)
		ahead += n
	}
	return Position{Ahead: ahead, Reason: s.reasonOf(c), Estimate: s.estimate(l, ahead)}
}

// rivalsOf returns the other classes that have eligible workers in common with c.
func (s *Scheduler) rivalsOf(c *class) []*class {
	if c.rivalsLayout == s.layout {
		return c.rivals
	}
	c.rivals, c.rivalsLayout = nil, s.layout
	for _, other := range s.classes {
		if other != c && overlap(c.eligible, other.eligible) {
			c.rivals = append(c.rivals, other)
		}
	}
	return c.rivals
}

// overlap reports whether two ascending lists have an element in common.
func overlap(a, b []int) bool {
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0] == b[0]:
			return true
		case a[0] < b[0]:
			a = a[1:]
		default:
			b = b[1:]
		}
	}
	return false
}

// reasonOf says why no worker is free for a class.
func (s *Scheduler) reasonOf(c *class) string {
	if c.reasonEpoch == s.epoch+1 {
		return c.reason
	}
	subject := "any worker"
	if !c.demand.Anywhere {
		subject = platforms.Format(c.demand.Platform)
	}
	if c.emulated && len(c.eligible) > 0 {
		subject += ", emulated"
	}
	if len(c.demand.Pools) > 0 {
		subject += " in " + build.Pools(c.demand.Pools)
	}
	why := explain(s.view, c.demand, c.excluded)
	if why == "" {
		why = "no worker attached"
	}
	c.reason, c.reasonEpoch = subject+": "+why, s.epoch+1
	return c.reason
}

// Place is what a waiting leg is counted by: its platform, formatted, and its pools,
// joined by commas. Both are "any" where the leg does not mind.
type Place struct{ Platform, Pool string }

// Waiting returns how many legs wait, and for what.
func (s *Scheduler) Waiting() map[Place]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[Place]int{}
	for _, c := range s.classes {
		at := Place{Platform: c.demand.name(), Pool: "any"}
		if len(c.demand.Pools) > 0 {
			at.Pool = strings.Join(c.demand.Pools, ",")
		}
		out[at] += len(c.queue)
	}
	return out
}

// name is the platform that is demanded, formatted; "any" where any worker will do.
func (d Demand) name() string {
	if d.Anywhere {
		return "any"
	}
	return platforms.FormatAll(d.Platform)
}
