package schedule

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// QueuedLeg is a leg that waits for a worker.
type QueuedLeg struct {
	// Build and Tenant are its demand's.
	Build, Tenant string
	// Platform that it needs, formatted; "any" where any worker will do.
	Platform string
	// Pools that it may run in; empty: any.
	Pools []string
	// Since is when it was queued.
	Since time.Time
	Position
}

// Explanation says where one leg stands.
type Explanation struct {
	// Platform that it needs, formatted; "any" where any worker will do.
	Platform string
	// Worker where it runs; empty while it waits.
	Worker string
	// Summary is one line for people: "waiting 12 s: mac-2 is warm and frees up in
	// about 20 s; 2 others are draining".
	Summary string
	// Workers holds a verdict on each worker of the pools that the demand's owner may
	// know of, by name.
	Workers []Verdict
}

// Verdict says whether a worker takes a leg.
type Verdict struct {
	Worker string
	// Eligible says that it takes the leg as soon as it has a free slot.
	Eligible bool
	// Reason is one line: "draining", "runs linux/amd64 only",
	// "full: 2 of 2 slots, frees up in about 20 s".
	Reason string
}

// Queue returns the legs that wait, in the order of the queue.
func (s *Scheduler) Queue() []QueuedLeg {
	s.mu.Lock()
	defer s.mu.Unlock()
	var legs []*leg
	for _, c := range s.classes {
		legs = append(legs, c.queue...)
	}
	slices.SortFunc(legs, before)
	out := make([]QueuedLeg, len(legs))
	for i, l := range legs {
		out[i] = QueuedLeg{
			Build: l.demand.Build, Tenant: l.demand.Tenant, Platform: l.demand.name(), Pools: l.demand.Pools,
			Since: l.since, Position: s.position(l),
		}
	}
	return out
}

// Explain says where a leg that came now would run, or what it would wait for.
func (s *Scheduler) Explain(d Demand) Explanation {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.outlook(d, nil)
	for _, c := range s.classes {
		if overlap(c.eligible, o.ready()) {
			o.ahead += len(c.queue)
		}
	}
	o.estimate = s.estimateNew(d)
	return o.explain()
}

// Explain says where leg i stands.
func (t *Ticket) Explain(i int) Explanation {
	s, l := t.scheduler, t.legs[i]
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.outlook(l.demand, l.excluded)
	switch l.state {
	case queued:
		at := s.position(l)
		o.state, o.since, o.ahead, o.estimate = queued, l.since, at.Ahead, at.Estimate
	case granted:
		o.state, o.since, o.assignment = granted, l.began, l.assignment
	case closed:
		o.state = closed
	case idle: // on its way between two attempts
	}
	return o.explain()
}

// outlook is what an explanation is made of. The methods are pure.
type outlook struct {
	workers  []Worker
	demand   Demand
	excluded []string
	warm     string
	homes    map[string]int
	frees    map[string]time.Duration // name → until a slot may be expected to become free, where that is known
	emulated bool
	ahead    int           // waiting legs that come first
	estimate time.Duration // until it gets a slot; 0: not known

	state      legState
	since      time.Time // the state is as it is
	now        time.Time
	assignment Assignment
}

// outlook gathers what there is to say of a demand.
func (s *Scheduler) outlook(d Demand, excluded []string) outlook {
	o := outlook{
		workers: s.view, demand: d, excluded: excluded, warm: s.warm.worker(d), homes: maps.Clone(s.warm.homes), frees: map[string]time.Duration{},
		emulated: !native(s.view, d), now: s.clock(),
	}
	for i := range s.view {
		if left, known := s.freesUp(s.view[i].Name, o.now); known {
			o.frees[s.view[i].Name] = left
		}
	}
	return o
}

// freesUp is when the first of the worker's attempts may be expected to end. Those
// that take longer than they usually do say nothing.
func (s *Scheduler) freesUp(worker string, now time.Time) (left time.Duration, known bool) {
	for _, holder := range s.holders[worker] {
		end, ok := s.expectedEnd(holder)
		if until := end.Sub(now); ok && until > 0 && (!known || until < left) {
			left, known = until, true
		}
	}
	return left, known
}

// expectedEnd is when a slot may be expected to be given back, by the leg that holds
// it and those that share it.
func (s *Scheduler) expectedEnd(holder *leg) (end time.Time, known bool) {
	for _, l := range holder.ticket.legs {
		if l != holder && l.host != holder {
			continue
		}
		takes := s.warm.takes(l.demand)
		if takes == 0 {
			return time.Time{}, false
		}
		if own := l.began.Add(takes); own.After(end) {
			end = own
		}
	}
	return end, true
}

// ready lists the workers that may run what is demanded as soon as they have a free
// slot, ascending.
func (o outlook) ready() []int {
	var out []int
	for i := range o.workers {
		w := &o.workers[i]
		if w.State == Ready && runs(w, o.demand, o.emulated) && !slices.Contains(o.excluded, w.Name) {
			out = append(out, i)
		}
	}
	return out
}

func (o outlook) explain() Explanation {
	e := Explanation{Platform: o.demand.name(), Summary: o.summary()}
	if o.state == granted {
		e.Worker = o.assignment.Worker
	}
	for i := range o.workers {
		if w := &o.workers[i]; InPool(o.demand.Known, w.Pool) {
			e.Workers = append(e.Workers, o.verdict(w))
		}
	}
	return e
}

// verdict says whether a worker would take the leg.
func (o outlook) verdict(w *Worker) Verdict {
	v := Verdict{Worker: w.Name}
	if !runs(w, o.demand, o.emulated) {
		v.Reason = o.unfit(w)
		return v
	}
	switch c := conditionOf(w, o.excluded); c {
	case full:
		v.Eligible = true
		v.Reason = fmt.Sprintf("full: %d of %d slots", w.Used, w.Slots)
		if left, known := o.frees[w.Name]; known {
			v.Reason += ", frees up in about " + Lasting(left)
		}
	case idling:
		v.Eligible = true
		v.Reason = assign(*w, o.warm, o.emulated).Why
	default:
		v.Reason = c.String()
		if r := commonReason([]string{w.Reason}); r != "" && c != slotless && c != barred {
			v.Reason += ": " + r
		}
	}
	return v
}

// unfit says why a worker does not run what is demanded, whatever its state.
func (o outlook) unfit(w *Worker) string {
	d := o.demand
	only := "runs " + strings.Join(basePlatforms(w.Platforms), ", ") + " only"
	switch emulates := Runs(w.Emulated, d.Platform); {
	case !InPool(d.Pools, w.Pool):
		return "pool " + w.Pool
	case d.On != "" && d.On != w.Name:
		return "the build goes on where its input is, on " + d.On
	case emulates && !w.AllowEmulation:
		return only + "; it could emulate " + d.name() + ", but its pool does not allow emulation"
	case emulates && !o.emulated:
		return only + "; it does not emulate what others run natively"
	}
	return only
}

// summary is one line on where the leg stands.
func (o outlook) summary() string {
	switch o.state {
	case granted:
		s := "running on " + o.assignment.Worker + " for " + Lasting(o.now.Sub(o.since))
		if o.assignment.Emulated {
			s += ", emulated"
		}
		return s
	case closed:
		return "it has ended"
	case queued:
		return "waiting " + Lasting(o.now.Sub(o.since)) + ": " + o.obstacle()
	case idle:
	}
	if !served(o.workers, o.demand, o.emulated) {
		return "would be refused: " + noWorker(o.workers, o.demand, o.excluded).Error()
	}
	if i := pick(o.workers, o.ready(), o.demand.Key, o.warm, o.homes); i >= 0 && o.ahead == 0 {
		a := assign(o.workers[i], o.warm, o.emulated)
		return "would run on " + a.Worker + " (" + a.Why + ")"
	}
	return "would wait: " + o.obstacle()
}

// obstacle says what a leg waits for: a worker that will be free, if one is known,
// and what the others are doing.
func (o outlook) obstacle() string {
	var parts []string
	next, first := o.next()
	if first != "" {
		parts = append(parts, first)
	}
	parts = append(parts, o.others(next)...)
	if len(parts) == 0 {
		parts = append(parts, noWorker(o.workers, o.demand, o.excluded).Error())
	}
	if o.ahead > 0 {
		what := count(o.ahead, "leg comes first", "legs come first")
		if o.estimate > 0 {
			what += ", so that it starts in about " + Lasting(o.estimate)
		}
		parts = append(parts, what)
	}
	if o.emulated && len(o.ready()) > 0 {
		parts = append(parts, whyEmulated)
	}
	return strings.Join(parts, "; ")
}

// next is the worker that a leg most likely gets, as far as one can tell: the one that
// is warm, or that is expected to be free first. It returns its name, and what there
// is to say of it; nothing when all are alike.
func (o outlook) next() (name, what string) {
	var soonest time.Duration
	for _, i := range o.ready() {
		w := &o.workers[i]
		left, known := o.frees[w.Name]
		switch {
		case w.free() > 0 || w.Slots == 0:
		case w.Name == o.warm && known:
			return w.Name, w.Name + " is warm and frees up in about " + Lasting(left)
		case w.Name == o.warm:
			return w.Name, w.Name + " is warm and full"
		case known && (name == "" || left < soonest):
			name, soonest = w.Name, left
		}
	}
	if name == "" {
		return "", ""
	}
	return name, name + " frees up in about " + Lasting(soonest)
}

// others tells how many workers besides that one run what is demanded, and what they
// are doing.
func (o outlook) others(but string) []string {
	var counts [conditions]int
	for i := range o.workers {
		if w := &o.workers[i]; w.Name != but && runs(w, o.demand, o.emulated) {
			counts[conditionOf(w, o.excluded)]++
		}
	}
	other, others := "", ""
	if but != "" {
		other, others = "other ", "others "
	}
	var parts []string
	for c, n := range counts {
		if n > 0 {
			parts = append(parts, count(n, other+"is", others+"are")+" "+condition(c).String())
		}
	}
	return parts
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// Lasting is a duration as people say it: "12 s", "3 min", "2 h".
func Lasting(d time.Duration) string {
	switch {
	case d < 90*time.Second:
		return strconv.Itoa(int((max(d, 0)+time.Second/2)/time.Second)) + " s"
	case d < 90*time.Minute:
		return strconv.Itoa(int((d+time.Minute/2)/time.Minute)) + " min"
	}
	return strconv.Itoa(int((d+time.Hour/2)/time.Hour)) + " h"
}
