package progress

import (
	"slices"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
)

// compact makes the log smaller, to three quarters of the limit if it can, by
// dropping what is missed least:
//
//  1. progress of a status line that has newer progress,
//  2. logs, the oldest first,
//  3. status lines, the oldest first,
//  4. warnings, the oldest first,
//  5. states of a vertex's run that have newer ones.
//
// The last state of every run of a vertex stays, whatever the limit, and so does
// the newest message as it is. Vertices come last because what is left of a
// vertex stands later in the log than what was dropped: a log or a status before
// it would be about a vertex that its reader does not know. s.mu is held.
func (s *Stream) compact() {
	last := len(s.log) - 1
	older, newest := s.log[:last], s.log[last].status
	target := s.limit - s.limit/4

	lines := make(map[lineKey]bool)
	unseen(newest.Statuses, lines, keyOfLine)
	for i := range slices.Backward(older) {
		s.replace(&older[i], withoutOldProgress(older[i].status, lines))
	}
	for _, without := range []func(*controlapi.StatusResponse) *controlapi.StatusResponse{
		withoutLogs, withoutStatuses, withoutWarnings,
	} {
		for i := 0; i < len(older) && s.size > target; i++ {
			s.replace(&older[i], without(older[i].status))
		}
	}
	if s.size > target {
		runs := make(map[runKey]bool)
		unseen(newest.Vertexes, runs, keyOfRun)
		for i := range slices.Backward(older) {
			s.replace(&older[i], withoutOldStates(older[i].status, runs))
		}
	}

	s.log = slices.DeleteFunc(s.log, func(e entry) bool { return isEmpty(e.status) })
	// Where the vertices alone are over the target, the next time is when a
	// quarter more has come in: the cost stays in proportion to what comes.
	s.compactAt = max(s.limit, s.size+s.size/4)
}

// replace puts r in the place of an entry's message.
func (s *Stream) replace(e *entry, r *controlapi.StatusResponse) {
	if r == e.status {
		return
	}
	left := newEntry(r)
	left.seq = e.seq
	s.size -= e.memory - left.memory
	*e = left
}

// The without functions return r itself if there is nothing to leave out, and
// do not change it: it may be on its way to a subscriber.

func withoutLogs(r *controlapi.StatusResponse) *controlapi.StatusResponse {
	if len(r.Logs) == 0 {
		return r
	}
	return &controlapi.StatusResponse{Vertexes: r.Vertexes, Statuses: r.Statuses, Warnings: r.Warnings}
}

func withoutStatuses(r *controlapi.StatusResponse) *controlapi.StatusResponse {
	if len(r.Statuses) == 0 {
		return r
	}
	return &controlapi.StatusResponse{Vertexes: r.Vertexes, Logs: r.Logs, Warnings: r.Warnings}
}

func withoutWarnings(r *controlapi.StatusResponse) *controlapi.StatusResponse {
	if len(r.Warnings) == 0 {
		return r
	}
	return &controlapi.StatusResponse{Vertexes: r.Vertexes, Statuses: r.Statuses, Logs: r.Logs}
}

func withoutOldProgress(r *controlapi.StatusResponse, newer map[lineKey]bool) *controlapi.StatusResponse {
	kept := unseen(r.Statuses, newer, keyOfLine)
	if len(kept) == len(r.Statuses) {
		return r
	}
	return &controlapi.StatusResponse{Vertexes: r.Vertexes, Statuses: kept, Logs: r.Logs, Warnings: r.Warnings}
}

func withoutOldStates(r *controlapi.StatusResponse, newer map[runKey]bool) *controlapi.StatusResponse {
	kept := unseen(r.Vertexes, newer, keyOfRun)
	if len(kept) == len(r.Vertexes) {
		return r
	}
	return &controlapi.StatusResponse{Vertexes: kept, Statuses: r.Statuses, Logs: r.Logs, Warnings: r.Warnings}
}

// lineKey names a status line.
type lineKey struct{ vertex, id string }

func keyOfLine(v *controlapi.VertexStatus) lineKey { return lineKey{v.Vertex, v.ID} }

// runKey names one run of a vertex: BuildKit may run it again, with a new start,
// and clients show a vertex as open until each of its runs has completed.
type runKey struct {
	vertex  string
	started time.Time // zero for the states before the start
}

func keyOfRun(v *controlapi.Vertex) runKey {
	k := runKey{vertex: v.Digest}
	if v.Started != nil {
		k.started = v.Started.AsTime()
	}
	return k
}

// unseen returns the last item of each key that is not in seen, and marks it
// there. It does not change items.
func unseen[T any, K comparable](items []*T, seen map[K]bool, key func(*T) K) []*T {
	if len(items) == 0 {
		return nil
	}
	kept := make([]*T, 0, len(items))
	for _, item := range slices.Backward(items) {
		if k := key(item); !seen[k] {
			seen[k] = true
			kept = append(kept, item)
		}
	}
	slices.Reverse(kept)
	return kept
}
