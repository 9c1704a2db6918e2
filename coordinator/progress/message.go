package progress

import controlapi "github.com/moby/buildkit/api/services/control"

// What a message and each item in it take in memory beyond their content: the
// Go structures and their timestamps, rounded up.
const (
	messageOverhead = 192
	itemOverhead    = 192
)

// newEntry measures a message. Its seq is still to be set.
func newEntry(r *controlapi.StatusResponse) entry {
	items := len(r.Vertexes) + len(r.Statuses) + len(r.Logs) + len(r.Warnings)
	if items == 0 {
		return entry{status: r}
	}
	wire := r.SizeVT()
	return entry{status: r, wire: wire, memory: wire + messageOverhead + items*itemOverhead}
}

func isEmpty(r *controlapi.StatusResponse) bool {
	return r == nil || len(r.Vertexes)+len(r.Statuses)+len(r.Logs)+len(r.Warnings) == 0
}

// split makes entries of a message: one, or where it is larger than maxMessage
// as many as it takes, in the order in which clients read a message. A single
// item that is larger stays whole.
func split(r *controlapi.StatusResponse) []entry {
	if isEmpty(r) {
		return nil
	}
	if e := newEntry(r); e.wire <= maxMessage {
		return []entry{e}
	}
	var s splitter
	for _, v := range r.Vertexes {
		s.room(v.SizeVT())
		s.part.Vertexes = append(s.part.Vertexes, v)
	}
	for _, v := range r.Statuses {
		s.room(v.SizeVT())
		s.part.Statuses = append(s.part.Statuses, v)
	}
	for _, v := range r.Warnings {
		s.room(v.SizeVT())
		s.part.Warnings = append(s.part.Warnings, v)
	}
	for _, v := range r.Logs {
		s.room(v.SizeVT())
		s.part.Logs = append(s.part.Logs, v)
	}
	return append(s.done, newEntry(s.part))
}

// splitter fills one part after the other.
type splitter struct {
	part *controlapi.StatusResponse
	size int
	done []entry
}

// room makes room for an item of n bytes, in a new part if need be.
func (s *splitter) room(n int) {
	n += 8 // the item's tag and length
	if s.part != nil && s.size+n > maxMessage {
		s.done = append(s.done, newEntry(s.part))
		s.part = nil
	}
	if s.part == nil {
		s.part, s.size = &controlapi.StatusResponse{}, 0
	}
	s.size += n
}

// join makes one message of several.
func join(batch []*controlapi.StatusResponse) *controlapi.StatusResponse {
	if len(batch) == 1 {
		return batch[0]
	}
	out := &controlapi.StatusResponse{}
	for _, r := range batch {
		out.Vertexes = append(out.Vertexes, r.Vertexes...)
		out.Statuses = append(out.Statuses, r.Statuses...)
		out.Logs = append(out.Logs, r.Logs...)
		out.Warnings = append(out.Warnings, r.Warnings...)
	}
	return out
}
