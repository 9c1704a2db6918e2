package worker

import (
	"fmt"
	"sync"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// slots is the one place that knows what the worker has room for. All
// coordinators are served from it, so that two of them cannot book one slot.
//
// It also holds the other things that a Report says, so that each report is one
// consistent moment.
type slots struct {
	mu          sync.Mutex
	total, used int
	draining    bool
	unavailable string        // why buildkitd does not answer; empty when it does
	changed     chan struct{} // closed, and replaced, at every change
}

func newSlots(total int) *slots {
	return &slots{total: total, changed: make(chan struct{})}
}

// take occupies a slot until release is called, which may happen more than once.
// If there is none to have, release is nil and the cause says why.
func (s *slots) take() (release func(), cause archfarmv1.Refused_Cause) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.draining:
		return nil, archfarmv1.Refused_CAUSE_DRAINING
	case s.unavailable != "":
		return nil, archfarmv1.Refused_CAUSE_UNAVAILABLE
	case s.used >= s.total:
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

// drain grants no slot from now on.
func (s *slots) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.draining {
		s.draining = true
		s.notify()
	}
}

// setUnavailable notes why buildkitd does not answer; the empty string means
// that it does.
func (s *slots) setUnavailable(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.unavailable != why {
		s.unavailable = why
		s.notify()
	}
}

// report is the present state, and a channel that is closed once it is outdated.
func (s *slots) report() (*archfarmv1.Report, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &archfarmv1.Report{
		Slots: &archfarmv1.Slots{Total: uint32(s.total), Used: uint32(s.used)},
		State: archfarmv1.Worker_STATE_READY,
	}
	switch {
	case s.draining:
		r.State, r.Reason = archfarmv1.Worker_STATE_DRAINING, "the agent is stopping"
	case s.unavailable != "":
		r.State, r.Reason = archfarmv1.Worker_STATE_UNAVAILABLE, s.unavailable
	}
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
