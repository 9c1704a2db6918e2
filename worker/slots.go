package worker

import (
	"fmt"
	"sync"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// slots is the one place that knows what the worker has room for, and whether it
// takes anything at all. All coordinators are served from it, so that two of them
// cannot book one slot.
//
// It also holds the other things that a Report says, so that each report is one
// consistent moment.
type slots struct {
	mu      sync.Mutex
	total   int // as configured
	used    int
	offered int           // of total, 1 at least; fewer under pressure
	why     string        // offered is less than total
	changed chan struct{} // closed, and replaced, at every change but that of readings

	// What keeps the worker from taking anything; the first that there is decides
	// what it shows as.
	stopping    bool   // the agent drains before it ends
	order       order  // an operator's
	unavailable string // why buildkitd does not answer
	diskFull    string // how full the disk is

	emulated []string
	load     *archfarmv1.Load // never modified
}

func newSlots(total int) *slots {
	return &slots{total: total, offered: total, changed: make(chan struct{})}
}

// take occupies a slot until release is called, which may happen more than once.
// If there is none to have, release is nil and the cause says why.
func (s *slots) take() (release func(), cause archfarmv1.Refused_Cause) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state, _ := s.state(); {
	case state == archfarmv1.Worker_STATE_DRAINING || state == archfarmv1.Worker_STATE_CORDONED:
		return nil, archfarmv1.Refused_CAUSE_DRAINING
	case state == archfarmv1.Worker_STATE_UNAVAILABLE:
		return nil, archfarmv1.Refused_CAUSE_UNAVAILABLE
	case s.used >= s.offered:
		return nil, archfarmv1.Refused_CAUSE_NO_SLOT
	}
	s.used++
	s.notify()
	return sync.OnceFunc(s.free), archfarmv1.Refused_CAUSE_UNSPECIFIED
}

func (s *slots) free() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used--
	s.notify()
}

// drain grants no slot from now on, whatever an operator says.
func (s *slots) drain() { s.set(func() { s.stopping = true }) }

// obey does what an operator wants.
func (s *slots) obey(o order) { s.set(func() { s.order = o }) }

// setUnavailable notes why buildkitd does not answer; the empty string means
// that it does.
func (s *slots) setUnavailable(why string) { s.set(func() { s.unavailable = why }) }

// setDiskFull notes that the disk is full and in what words; the empty string
// means that it is not.
func (s *slots) setDiskFull(why string) { s.set(func() { s.diskFull = why }) }

// offer limits what is given to n slots, 1 at least. What runs is not ended.
func (s *slots) offer(n int, why string) {
	s.set(func() { s.offered, s.why = max(1, min(n, s.total)), why })
}

// standing is what set compares: all that a change of is worth a report.
type standing struct {
	offered                    int
	why, unavailable, diskFull string
	stopping                   bool
	order                      order
}

func (s *slots) standing() standing {
	return standing{s.offered, s.why, s.unavailable, s.diskFull, s.stopping, s.order}
}

func (s *slots) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.standing()
	change()
	if s.standing() != before {
		s.notify()
	}
}

// setEmulated notes the platforms that the machine can only emulate.
func (s *slots) setEmulated(platforms []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.emulated = platforms
	s.notify()
}

// setLoad notes readings, which go with the next report, and cause none.
func (s *slots) setLoad(l *archfarmv1.Load) (used int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.load = l
	return s.used
}

// state is what the worker shows as, and why. The agent's end and an operator's
// word come before what passes by itself.
func (s *slots) state() (state archfarmv1.Worker_State, reason string) {
	switch {
	case s.stopping:
		return archfarmv1.Worker_STATE_DRAINING, "the agent is stopping"
	case s.order.state() != archfarmv1.Worker_STATE_READY:
		return s.order.state(), s.order.String()
	case s.unavailable != "":
		return archfarmv1.Worker_STATE_UNAVAILABLE, s.unavailable
	case s.diskFull != "":
		return archfarmv1.Worker_STATE_CORDONED, s.diskFull
	}
	return archfarmv1.Worker_STATE_READY, s.why
}

// report is the present state, and a channel that is closed once it is outdated.
// More slots may be used than are offered; then as many are reported as are used.
func (s *slots) report() (*archfarmv1.Report, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &archfarmv1.Report{
		Slots:    &archfarmv1.Slots{Total: uint32(max(s.offered, s.used)), Used: uint32(s.used)},
		Emulated: s.emulated, Load: s.load,
	}
	r.State, r.Reason = s.state()
	r.Reason = clip(r.Reason)
	return r, s.changed
}

// idle tells whether no slot is taken, and gives the channel that is closed when
// that may have changed.
func (s *slots) idle() (bool, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used == 0, s.changed
}

// cutOffError tells how many attempts ran when the agent ended.
type cutOffError int

func (n cutOffError) Error() string {
	if n == 1 {
		return "stopped while 1 attempt was running"
	}
	return fmt.Sprintf("stopped while %d attempts were running", int(n))
}

// cutOff is the error of ending right now: nil if no slot is taken.
func (s *slots) cutOff() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used == 0 {
		return nil
	}
	return cutOffError(s.used)
}

func (s *slots) notify() {
	close(s.changed)
	s.changed = make(chan struct{})
}
