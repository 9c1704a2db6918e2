package history

import (
	"slices"
	"time"
)

// Limits bound the history. Pinned records count for no limit and stay.
type Limits struct {
	// MaxEntries records are kept whatever their age, and MaxAge says how old
	// further ones may become, as in a buildkitd's configuration.
	MaxEntries int
	MaxAge     time.Duration
	// MaxSize is the size of all records with what they name, in bytes, beyond
	// which the oldest go, whatever MaxEntries and MaxAge say.
	MaxSize int64
}

// WithDefaults fills what is zero.
func (l Limits) WithDefaults() Limits {
	if l.MaxEntries <= 0 {
		l.MaxEntries = DefaultMaxEntries
	}
	if l.MaxAge <= 0 {
		l.MaxAge = DefaultMaxAge
	}
	if l.MaxSize <= 0 {
		l.MaxSize = DefaultMaxSize
	}
	return l
}

// kept is a record as the limits see it.
type kept struct {
	ref       string
	completed time.Time
	pinned    bool
	size      int64 // with its blobs, in bytes; those that records share count for each
}

// overdue returns the references of the records that have to go, the oldest
// first.
func (l Limits) overdue(all []kept, now time.Time) []string {
	var records []kept
	var size int64
	for _, r := range all {
		if !r.pinned {
			records = append(records, r)
			size += r.size
		}
	}
	slices.SortFunc(records, func(a, b kept) int { return a.completed.Compare(b.completed) })
	var out []string
	for i, r := range records {
		aged := len(records)-i > l.MaxEntries && now.Sub(r.completed) > l.MaxAge
		if !aged && size <= l.MaxSize {
			continue
		}
		size -= r.size
		out = append(out, r.ref)
	}
	return out
}
