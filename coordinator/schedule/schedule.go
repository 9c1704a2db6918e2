// Package schedule chooses workers for the legs of builds, and lets legs queue when
// none is free.
//
// The choice itself (Choose, Explain, Fleet) is pure: workers in, answer out. The
// Scheduler around it keeps the fleet as it was last told, the slots it has handed out
// and the queue, under one lock that is never held across a callback or an RPC.
//
// Nouns: a Demand is what one leg asks for. A Ticket stands for all legs of one build,
// which enter the queue at once; its place in the queue never changes. An Assignment is
// one slot of one worker, granted to one leg until the leg's attempt ends.
//
// The queue is strictly first come, first served among builds: a leg never takes a slot
// that an earlier waiting leg could have used. Because legs of a build enter together,
// that also excludes that two builds each hold a slot the other one waits for: the
// earliest unfinished build waits only for slots of builds that were complete before it.
// What that does not exclude is that a build waits for a slot of its own, when its legs
// need more slots at a time than there are; see Scheduler.Share.
package schedule

import (
	"cmp"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/archfarm/archfarm/coordinator/build"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// DefaultGrace is how long a platform may be without any worker before those who need
// it are refused. A worker that restarts is back well within it.
const DefaultGrace = 30 * time.Second

// maxSlots bounds what an agent's word can do to arithmetic.
const maxSlots = 1 << 20

// State says whether a worker takes new attempts.
type State int

// The states of an attached worker.
const (
	// Ready workers take attempts.
	Ready State = iota
	// Draining workers finish what runs and take nothing new.
	Draining
	// Unavailable workers are attached but unhealthy, and take nothing for now.
	Unavailable
	// Cordoned workers take nothing new until they are uncordoned.
	Cordoned
)

// String is the state's name as users see it.
func (s State) String() string {
	switch s {
	case Ready:
		return "ready"
	case Draining:
		return "draining"
	case Unavailable:
		return "unavailable"
	case Cordoned:
		return "cordoned"
	default:
		return "unknown"
	}
}

// Worker is an attached worker as far as scheduling is concerned. A lost worker is not
// in the fleet at all.
type Worker struct {
	// Name is unique in the fleet.
	Name string
	// Platforms that the worker runs natively, normalised, best first, every variant
	// listed: linux/arm64 does not imply linux/arm/v7. Not modified after Update.
	Platforms []ocispecs.Platform
	// Pool that the worker belongs to.
	Pool string
	// Emulated are platforms, normalised, that the worker can only emulate. They count
	// where AllowEmulation says so, and only for what no worker runs natively. Not
	// modified after Update.
	Emulated       []ocispecs.Platform
	AllowEmulation bool
	// Slots is how many attempts the worker takes at a time.
	Slots int
	// Used is how many slots were taken when the agent last reported: by this
	// coordinator or by others. It lags. In a Snapshot it is what the scheduler
	// reckons with: at least what it has granted itself.
	Used int
	// State and, where it is not Ready, the reason for it.
	State  State
	Reason string
	// Reported tells the agent's reports apart: when the one behind Used arrived.
	// A refused slot (Ticket.Refused) counts until a newer report; where Reported is
	// left zero, until the next Update.
	Reported time.Time
}

// Demand is what one leg asks for.
type Demand struct {
	// Platform the leg must run natively, normalised.
	Platform ocispecs.Platform
	// Anywhere says that any worker will do: the platform is native nowhere, and the
	// leg may execute nothing.
	Anywhere bool
	// On is the only worker that will do, by its name; empty for no such wish.
	On string
	// Pools that the leg may run in, sorted; empty: any.
	Pools []string
	// Known are the pools that whoever asks may be told about, sorted; empty: all.
	// They decide nothing.
	Known []string
	// Key identifies the project, for warmth; empty for none.
	Key string
	// Build and Tenant name who asks, for those who look at the queue.
	Build, Tenant string
	// Patience is for how long it waits while no worker at all could ever serve it;
	// 0: the Scheduler's Grace, and Enqueue refuses it at once.
	Patience time.Duration
}

// Position is where a waiting leg stands.
type Position struct {
	// Ahead counts the waiting legs before this one that compete for the same workers.
	Ahead int
	// Reason says why no worker is free: "linux/arm64: 2 full, 1 draining".
	Reason string
	// Estimate is for how long it may be expected to wait, judged by how long the attempts
	// of those that hold slots, and of those ahead, took before; 0: not known.
	Estimate time.Duration
}

// Assignment is one slot of a worker, granted to a leg.
type Assignment struct {
	// Worker is its name.
	Worker string
	// Warm says that the worker was chosen because it last built this project.
	Warm bool
	// Waited is the time in the queue.
	Waited time.Duration
	// Why is one line: "warm: last built this project" or
	// "least loaded: 1 of 4 slots used".
	Why string
	// Emulated says that no worker runs the platform natively, and this one emulates it.
	Emulated bool
	// Shared says that there is no slot for this leg alone: it runs in the one that leg
	// With of the same build holds on this worker, which has to be kept until both have
	// ended. Only where Scheduler.Share is set.
	Shared bool
	With   int
}

// Scheduler hands out the slots of a fleet. Its methods, and those of its tickets, are
// safe for concurrent use. It starts no goroutines and needs no closing.
type Scheduler struct {
	// Grace is how long a platform may be without any worker (and, after New, how long
	// workers may take to attach) before legs that need it are refused. Set it before
	// first use.
	Grace time.Duration
	// Share lets a leg that finds no free slot run in a slot that its own build holds
	// already, on a worker that is native to both, as BuildKit itself would run them.
	// Without it a build whose legs must all have begun before any can end waits for
	// ever if there are fewer slots than legs: linux/amd64 and linux/386 on a farm of
	// one slot. Set it before first use.
	Share bool

	clock   func() time.Time
	started time.Time

	mu      sync.Mutex
	fleet   []Worker          // as last reported, sorted by name
	view    []Worker          // fleet, with Used as the scheduler reckons; same order
	index   map[string]int    // name → position in fleet and view
	granted map[string]int    // name → slots that tickets hold, also of lost workers
	holders map[string][]*leg // name → the legs that hold those slots in their own name
	refused map[string]time.Time
	warm    *warmth
	// expected are workers that attached to a former coordinator.
	expected []Worker

	classes map[classKey]*class
	builds  uint64 // tickets so far: the order of the queue

	stale  bool            // this event may let a waiting leg have a slot
	dirty  bool            // this event may have moved positions or reasons
	epoch  uint64          // counts such events: what is cached from one is stale in the next
	layout uint64          // counts changes of the set of classes or of who is eligible
	wake   []chan struct{} // to close once the lock is released
}

// New returns a scheduler of an empty fleet. The clock is time.Now when nil.
func New(clock func() time.Time) *Scheduler {
	if clock == nil {
		clock = time.Now
	}
	return &Scheduler{
		Grace:   DefaultGrace,
		clock:   clock,
		started: clock(),
		index:   map[string]int{},
		granted: map[string]int{},
		holders: map[string][]*leg{},
		refused: map[string]time.Time{},
		warm:    newWarmth(warmKeys),
		classes: map[classKey]*class{},
	}
}

// event applies one change, lets the queue move, and wakes whom it concerns after the
// lock is released, so that nobody wakes up only to wait for it.
func (s *Scheduler) event(change func()) {
	s.mu.Lock()
	defer func() {
		wake := s.wake
		s.wake = nil
		s.mu.Unlock()
		for _, c := range wake {
			close(c)
		}
	}()
	change()
	if s.stale {
		s.pass()
	}
	if s.dirty {
		s.dirty = false
		s.epoch++
		for _, c := range s.classes {
			s.signal(&c.changed)
		}
	}
}

// signal has the channel closed after the event, and forgets it: who waits next makes
// a new one.
func (s *Scheduler) signal(c *chan struct{}) {
	if *c != nil {
		s.wake = append(s.wake, *c)
		*c = nil
	}
}

// Update tells the fleet as it is now. Workers that are not named any more are lost;
// slots of theirs that tickets hold count again, until released, should they come back.
// Of several workers with one name the first counts.
func (s *Scheduler) Update(workers []Worker) {
	next := slices.Clone(workers)
	byName := func(a, b Worker) int { return cmp.Compare(a.Name, b.Name) }
	if !slices.IsSortedFunc(next, byName) {
		slices.SortStableFunc(next, byName)
	}
	next = slices.CompactFunc(next, func(a, b Worker) bool { return a.Name == b.Name })
	for i := range next {
		next[i].Slots = min(max(next[i].Slots, 0), maxSlots)
		next[i].Used = min(max(next[i].Used, 0), maxSlots)
	}
	s.event(func() { s.replace(next) })
}

// replace makes next the fleet.
func (s *Scheduler) replace(next []Worker) {
	reshaped := !slices.EqualFunc(s.fleet, next, sameShape)
	s.fleet = next
	if reshaped {
		s.view = make([]Worker, len(next))
		s.index = make(map[string]int, len(next))
		for i := range next {
			s.index[next[i].Name] = i
		}
	}
	for name, at := range s.refused {
		i, attached := s.index[name]
		if !attached || next[i].Reported.IsZero() || !next[i].Reported.Equal(at) {
			delete(s.refused, name)
			s.stale = true // even where its load is the same: slots there may be shared again
		}
	}
	for i := range next {
		s.reckon(i)
	}
	if reshaped {
		s.stale, s.dirty = true, true
		s.layout++
		for _, c := range s.classes {
			s.qualify(c)
		}
	}
}

// sameShape reports whether a worker is eligible for the same legs as before.
func sameShape(a, b Worker) bool {
	return a.Name == b.Name && a.State == b.State && a.Pool == b.Pool && a.AllowEmulation == b.AllowEmulation &&
		equal(a.Platforms, b.Platforms) && equal(a.Emulated, b.Emulated)
}

// equal reports whether two lists hold the same platforms: quickly where they are one.
func equal(a, b []ocispecs.Platform) bool {
	if len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) {
		return true
	}
	return slices.EqualFunc(a, b, same)
}

// reckon refreshes the view of one worker.
func (s *Scheduler) reckon(i int) {
	w := s.fleet[i]
	w.Used = max(w.Used, s.granted[w.Name])
	if _, refused := s.refused[w.Name]; refused {
		w.Used = max(w.Used, w.Slots)
	}
	old := &s.view[i]
	if old.Used != w.Used || old.Slots != w.Slots || old.Reason != w.Reason {
		s.stale, s.dirty = true, true
	}
	*old = w
}

// hold adds n (which may be negative) to the slots granted on a worker.
func (s *Scheduler) hold(worker string, n int) {
	s.granted[worker] += n
	if s.granted[worker] <= 0 {
		delete(s.granted, worker)
	}
	if i, attached := s.index[worker]; attached {
		s.reckon(i)
	}
}

// Snapshot returns the fleet sorted by name, Used as the scheduler reckons with it.
func (s *Scheduler) Snapshot() []Worker {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.view)
}

// Native reports whether an attached worker, of those pools if any are named, runs p
// natively.
func (s *Scheduler) Native(p ocispecs.Platform, pools ...string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return served(s.view, Demand{Platform: p, Pools: pools}, false)
}

// Emulates reports whether what is demanded would be emulated: no attached worker of
// its pools is native to it, and one emulates it and is allowed to.
func (s *Scheduler) Emulates(d Demand) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !native(s.view, d) && served(s.view, d, true)
}

// Suits reports whether an attached worker, whatever its state, may run what is
// demanded, and whether it would have to emulate it.
func (s *Scheduler) Suits(worker string, d Demand) (suits, emulated bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, attached := s.index[worker]
	if !attached {
		return false, false
	}
	emulated = !native(s.view, d)
	suits = runs(&s.view[i], d, emulated)
	return suits, suits && emulated
}

// Enqueue puts all legs of a build into the queue at once, and returns their ticket,
// which the caller must Close. When a demand can be served by nobody who is attached
// the error is a *build.NoWorkerError and nothing is queued; but for the first Grace
// after New, when workers may still be attaching, it is queued.
func (s *Scheduler) Enqueue(demands []Demand) (*Ticket, error) {
	if len(demands) == 0 {
		return nil, errors.New("queueing a build: it has no legs")
	}
	t := &Ticket{scheduler: s, legs: make([]*leg, len(demands))}
	var err error
	s.event(func() {
		now := s.clock()
		if !s.starting(now) {
			for _, d := range demands {
				if d.Patience == 0 && !served(s.view, d, !native(s.view, d)) {
					err = s.noWorker(d, nil)
					return
				}
			}
		}
		s.builds++
		for i, d := range demands {
			t.legs[i] = &leg{ticket: t, demand: d, build: s.builds, index: i}
			s.enter(t.legs[i], now)
		}
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Expect tells which workers the farm had before: for the first Grace after New, builds
// wait for what they run natively.
func (s *Scheduler) Expect(workers []Worker) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.expected = slices.Clone(workers)
}

// Awaits reports whether a worker that is native to a platform, of these pools if any
// are named, is expected to attach.
func (s *Scheduler) Awaits(p ocispecs.Platform, pools ...string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.starting(s.clock()) && served(s.expected, Demand{Platform: p, Pools: pools}, false)
}

// Members are the workers that are attached, and those that are expected.
func (s *Scheduler) Members() []Worker {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := slices.Clone(s.view)
	if s.starting(s.clock()) {
		for _, w := range s.expected {
			if !slices.ContainsFunc(s.view, func(v Worker) bool { return v.Name == w.Name }) {
				out = append(out, w)
			}
		}
	}
	return out
}

// starting reports whether workers may still be attaching for the first time.
func (s *Scheduler) starting(now time.Time) bool {
	return now.Sub(s.started) < s.Grace
}

// NoWorker is the error for a demand that nobody can serve; step names what needs it,
// empty: the whole leg.
func (s *Scheduler) NoWorker(d Demand, step string) *build.NoWorkerError {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.noWorker(d, nil)
	err.Step = step
	return err
}

// noWorker is the error for a demand that nobody can serve.
func (s *Scheduler) noWorker(d Demand, excluded []string) *build.NoWorkerError {
	return noWorker(s.view, d, excluded)
}
