package progress

import (
	"context"
	"slices"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
)

const (
	// DefaultLimit is the history, in bytes, that a Stream keeps if not told
	// otherwise.
	DefaultLimit = 32 << 20
	// maxMessage is the size, in bytes, up to which messages are joined and
	// above which they are split. BuildKit splits logs at the same size; gRPC
	// here stops at 16 MiB.
	maxMessage = 1 << 20
)

// Stream is the status stream of a build: what is published is kept, in order,
// for every subscriber.
//
// There is one log, shared by all. A subscriber has no queue, only a place in
// the log, so a slow one costs nothing and holds up nobody. The log is bounded
// instead: see compact. What a subscriber has not read when it is compacted away
// it misses, which is never the last state of a vertex.
type Stream struct {
	// Now is the clock for Steps. Set it before the first use.
	Now func() time.Time

	limit int

	mu        sync.Mutex
	log       []entry // in the order of seq, with gaps where it was compacted
	size      int     // of log, in bytes
	compactAt int     // the size at which to compact
	seq       uint64  // of the next entry
	steps     uint64  // made so far
	closed    bool
	wake      chan struct{} // closed when something happens; nil if nobody waits
}

// entry is one message of the log. What it points to does not change.
type entry struct {
	seq    uint64
	status *controlapi.StatusResponse
	wire   int // size when sent, in bytes
	memory int // size when kept, in bytes, roughly
}

// NewStream returns a Stream that keeps about limit bytes of history, or
// DefaultLimit if that is not positive. The vertices count, but stay even where
// they alone are more. Half a kilobyte of memory per vertex is usual.
func NewStream(limit int) *Stream {
	if limit <= 0 {
		limit = DefaultLimit
	}
	return &Stream{Now: time.Now, limit: limit, compactAt: limit}
}

// Publish adds r to the stream, which keeps it: r must not be changed any more.
// It waits for no subscriber. An empty message is left out, and so is anything
// after Close.
func (s *Stream) Publish(r *controlapi.StatusResponse) {
	parts := split(r)
	if len(parts) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for _, e := range parts {
		e.seq = s.seq
		s.seq++
		s.size += e.memory
		s.log = append(s.log, e)
	}
	if s.size > s.compactAt {
		s.compact()
	}
	s.signal()
}

// Close ends the stream. Subscribers get what is left and return. Closing again
// does nothing.
func (s *Stream) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	s.signal()
}

// Follow passes everything published so far to send, then what follows, in
// order and from this goroutine. It returns nil after the last message of a
// closed stream, the cause if ctx ends before, and the error of send as it is. A
// message that was waiting may be joined with those after it, up to 1 MiB. The
// messages are shared with other subscribers: send must not change them.
func (s *Stream) Follow(ctx context.Context, send func(*controlapi.StatusResponse) error) error {
	var place uint64
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		batch, next, wake := s.read(place)
		if len(batch) > 0 {
			if err := send(join(batch)); err != nil {
				return err
			}
			place = next
			continue
		}
		if wake == nil {
			return nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
		}
	}
}

// read returns the messages at a place in the log, as many as go into one, and
// the place after them. If there are none yet, it returns a channel that is
// closed when that changes; at the end of the stream it returns nothing.
func (s *Stream) read(place uint64) (batch []*controlapi.StatusResponse, next uint64, wake <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	first, _ := slices.BinarySearchFunc(s.log, place, func(e entry, place uint64) int {
		switch {
		case e.seq < place:
			return -1
		case e.seq > place:
			return 1
		}
		return 0
	})
	size := 0
	for _, e := range s.log[first:] {
		if len(batch) > 0 && size+e.wire > maxMessage {
			break
		}
		size += e.wire
		batch, next = append(batch, e.status), e.seq+1
	}
	if len(batch) > 0 || s.closed {
		return batch, next, nil
	}
	if s.wake == nil {
		s.wake = make(chan struct{})
	}
	return nil, place, s.wake
}

// signal wakes the subscribers that wait. s.mu is held.
func (s *Stream) signal() {
	if s.wake != nil {
		close(s.wake)
		s.wake = nil
	}
}
