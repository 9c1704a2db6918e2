package job

import (
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"

	"github.com/archfarm/archfarm/coordinator/store"
)

// The pure part: what a job needs next, given what is durable of it, and how its
// legs change. Nothing here does I/O, so that a crash can be tried between any two
// of these functions.

// action is what to do with a job.
type action int

const (
	doRest    action = iota // it has ended
	doBuild                 // legs
	doPublish               // all legs have succeeded
	doResume                // publishing, which may have begun
	doEnd                   // in a state
)

// next is what a job needs.
type next struct {
	do    action
	legs  []int       // to build
	state store.State // to end in
	err   string      // why
}

// plan decides. A failed leg does not keep the others from being built: a Retry of
// the job will use what they pushed.
func plan(j store.Job) next {
	switch {
	case j.State.Ended():
		return next{do: doRest}
	case j.State == store.Publishing: // too late to cancel
		return next{do: doResume}
	case j.CancelRequested:
		return next{do: doEnd, state: store.Cancelled}
	}
	var open []int
	var failures []string
	for i, l := range j.Legs {
		switch l.State {
		case store.Succeeded:
		case store.Failed:
			failures = append(failures, l.Platform+": "+l.Error)
		default:
			open = append(open, i)
		}
	}
	switch {
	case len(open) > 0:
		return next{do: doBuild, legs: open}
	case len(failures) > 0:
		return next{do: doEnd, state: store.Failed, err: strings.Join(failures, "\n")}
	case len(j.Tags) == 0:
		return next{do: doEnd, state: store.Succeeded}
	}
	return next{do: doPublish}
}

// interruption is the error of an attempt that nobody saw the end of. Such attempts
// are not the leg's fault, and do not count as its failures.
const interruption = "interrupted: its coordinator stopped"

// maxInterruptions of a leg are too many: its build may be what stops coordinators.
const maxInterruptions = 10

// begun is the leg with another attempt, whose number is returned. Attempts that
// have no end, because their coordinator had one, get it.
func begun(l store.Leg, coordinator string, now time.Time) (store.Leg, int) {
	l.Attempts = closed(l.Attempts, interruption, now)
	n := 1
	if last := len(l.Attempts); last > 0 {
		n = l.Attempts[last-1].Number + 1
	}
	l.Attempts = append(l.Attempts, store.Attempt{Number: n, Coordinator: coordinator, Began: now})
	l.State, l.Descriptor, l.Worker, l.Error = store.Running, nil, "", ""
	return l, n
}

// on is the leg with the worker of its attempt.
func on(l store.Leg, worker string) store.Leg {
	l.Attempts = slices.Clone(l.Attempts)
	l.Worker, l.Attempts[len(l.Attempts)-1].Worker = worker, worker
	return l
}

// succeeded is the leg with what its attempt pushed.
func succeeded(l store.Leg, pushed ocispecs.Descriptor, now time.Time) (store.Leg, error) {
	l.Attempts = closed(l.Attempts, "", now)
	l.State, l.Error = store.Succeeded, ""
	if pushed.Digest == "" {
		return l, nil
	}
	raw, err := json.Marshal(pushed)
	l.Descriptor = raw
	return l, err
}

// failed is the leg after an attempt with an error: waiting for another, or Failed.
func failed(l store.Leg, code codes.Code, text string, most int, now time.Time) store.Leg {
	l.Attempts = closed(l.Attempts, text, now)
	l.Error, l.State = text, store.Failed
	if worthAnother(code) && failures(l) < most {
		l.State = store.Queued
	}
	return l
}

// worthAnother tells whether an error is not the build's own.
func worthAnother(code codes.Code) bool {
	return code == codes.Unavailable || code == codes.ResourceExhausted || code == codes.Aborted
}

// failures counts the attempts that failed.
func failures(l store.Leg) (n int) {
	for _, a := range l.Attempts {
		if !a.Ended.IsZero() && a.Error != interruption {
			n++
		}
	}
	return n
}

// tooOften tells whether a leg was interrupted so often that it should not be tried again.
func tooOften(l store.Leg) bool {
	n := 0
	for _, a := range l.Attempts {
		if a.Ended.IsZero() || a.Error == interruption {
			n++
		}
	}
	return n >= maxInterruptions
}

// given up is the leg that is not tried again.
func givenUp(l store.Leg, why string, now time.Time) store.Leg {
	l.Attempts = closed(l.Attempts, interruption, now)
	l.State, l.Error = store.Failed, why
	return l
}

// lost is a leg whose digest is no longer where it was pushed to: to be built again.
func lost(l store.Leg) store.Leg {
	l.State, l.Descriptor = store.Queued, nil
	return l
}

// abandoned are the legs of a job that ends before they have.
func abandoned(legs []store.Leg, why string, now time.Time) []store.Leg {
	var changed []store.Leg
	for _, l := range legs {
		if l.State.Ended() {
			continue
		}
		l.Attempts = closed(l.Attempts, why, now)
		l.State, l.Error = store.Cancelled, why
		changed = append(changed, l)
	}
	return changed
}

// closed are the attempts with an end; the error is of those that had none.
func closed(attempts []store.Attempt, err string, now time.Time) []store.Attempt {
	attempts = slices.Clone(attempts)
	for i := range attempts {
		if a := &attempts[i]; a.Ended.IsZero() {
			a.Error, a.Ended = err, now
		}
	}
	return attempts
}

// descriptor is what a leg pushed; empty for nothing.
func descriptor(l store.Leg) (d ocispecs.Descriptor, err error) {
	if len(l.Descriptor) == 0 {
		return d, nil
	}
	err = json.Unmarshal(l.Descriptor, &d)
	return d, err
}

// backoff is how long to wait after so many failures.
func backoff(base time.Duration, failures int) time.Duration {
	return base << min(max(failures-1, 0), 5)
}

// remaining is what is left of a job's time, of which none passes in the queue.
func remaining(started, now time.Time, timeout time.Duration) time.Duration {
	return cmp.Or(started, now).Add(timeout).Sub(now)
}
