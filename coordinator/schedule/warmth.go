package schedule

import "container/list"

// warmKeys bounds how many projects' last workers are remembered: about 2 MB.
const warmKeys = 10_000

// warmKey is a project on one platform.
type warmKey struct {
	project           string
	os, arch, variant string
}

func warmKeyOf(d Demand) warmKey {
	p := d.Platform
	return warmKey{project: d.Key, os: p.OS, arch: p.Architecture, variant: p.Variant}
}

// warmth remembers which worker last built what; the projects built least recently are
// forgotten. It is not safe for concurrent use.
type warmth struct {
	limit   int
	recent  *list.List // of warmEntry, the latest first
	entries map[warmKey]*list.Element
}

type warmEntry struct {
	key    warmKey
	worker string
}

func newWarmth(limit int) *warmth {
	return &warmth{limit: limit, recent: list.New(), entries: map[warmKey]*list.Element{}}
}

// worker returns the one that last built this, or "".
func (m *warmth) worker(d Demand) string {
	if e, ok := m.entries[warmKeyOf(d)]; ok {
		return e.Value.(warmEntry).worker
	}
	return ""
}

// record notes that the worker builds this now. Without a key there is nothing to note.
func (m *warmth) record(d Demand, worker string) {
	if d.Key == "" {
		return
	}
	k := warmKeyOf(d)
	if e, ok := m.entries[k]; ok {
		e.Value = warmEntry{k, worker}
		m.recent.MoveToFront(e)
		return
	}
	m.entries[k] = m.recent.PushFront(warmEntry{k, worker})
	if m.recent.Len() > m.limit {
		oldest := m.recent.Remove(m.recent.Back()).(warmEntry)
		delete(m.entries, oldest.key)
	}
}
