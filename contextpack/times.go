package contextpack

import (
	"encoding/binary"
	"errors"
)

const (
	// timesKind marks the entry with the modification times, one of those that
	// POSIX leaves to vendors. No file of a context can be taken for it.
	timesKind = 'T'
	timesName = ".archfarm.times"
	// maxTime is in the year 2255, up to which all file systems that matter agree.
	maxTime = 9_000_000_000
)

// timesOf makes the entry with the times of all others, in their order, each as the
// difference to the one before.
func timesOf(entries []entry) entry {
	var b []byte
	last := int64(0)
	for _, e := range entries {
		t := clampTime(e.mtime)
		b = binary.AppendVarint(b, t-last)
		last = t
	}
	return entry{name: timesName, kind: timesKind, mode: 0o444, size: int64(len(b)), content: inMemory(b)}
}

// times reads them back, one by one.
type times struct {
	rest []byte
	last int64
}

var errTimes = errors.New("the times of the context's files are malformed")

func (t *times) next() (int64, error) {
	d, n := binary.Varint(t.rest)
	if n <= 0 || d > maxTime || d < -maxTime {
		return 0, errTimes
	}
	t.rest = t.rest[n:]
	t.last = clampTime(t.last + d)
	return t.last, nil
}

func clampTime(t int64) int64 { return min(max(t, 0), maxTime) }
