package schedule

import (
	"container/list"
	"strings"
	"time"
)

// warmKeys bounds how many projects' last workers are remembered: about 2 MB.
const warmKeys = 10_000

// warmKey is a project on one platform, in some pools.
type warmKey struct {
	project           string
	os, arch, variant string
	pools             string
}

func warmKeyOf(d Demand) warmKey {
	p := d.Platform
	return warmKey{project: d.Key, os: p.OS, arch: p.Architecture, variant: p.Variant, pools: strings.Join(d.Pools, ",")}
}

// latest is the weight of the latest attempt in the mean of how long attempts take:
// the mean follows a project that grows within some five builds, and one cancelled
// build does not spoil it.
const latest = 0.3

// warmth remembers which worker last built what, and how long that takes; the projects
// built least recently are forgotten. It is not safe for concurrent use.
type warmth struct {
	limit   int
	recent  *list.List // of *warmEntry, the latest first
	entries map[warmKey]*list.Element
	homes   map[string]int // worker → how many projects it last built
}

type warmEntry struct {
	key    warmKey
	worker string
	mean   time.Duration // that attempts held their slots for; 0: none has ended yet
}

func newWarmth(limit int) *warmth {
	return &warmth{limit: limit, recent: list.New(), entries: map[warmKey]*list.Element{}, homes: map[string]int{}}
}

func (m *warmth) entry(d Demand) *warmEntry {
	if e, ok := m.entries[warmKeyOf(d)]; ok {
		return e.Value.(*warmEntry)
	}
	return nil
}

// worker returns the one that last built this, or "".
func (m *warmth) worker(d Demand) string {
	if e := m.entry(d); e != nil {
		return e.worker
	}
	return ""
}

// record notes that the worker builds this now. Without a key there is nothing to note.
func (m *warmth) record(d Demand, worker string) {
	if d.Key == "" {
		return
	}
	k := warmKeyOf(d)
	m.homes[worker]++
	if e, ok := m.entries[k]; ok {
		entry := e.Value.(*warmEntry)
		m.moved(entry.worker)
		entry.worker = worker
		m.recent.MoveToFront(e)
		return
	}
	m.entries[k] = m.recent.PushFront(&warmEntry{key: k, worker: worker})
	if m.recent.Len() > m.limit {
		oldest := m.recent.Remove(m.recent.Back()).(*warmEntry)
		delete(m.entries, oldest.key)
		m.moved(oldest.worker)
	}
}

// moved notes that a project is at home on the worker no more.
func (m *warmth) moved(worker string) {
	if m.homes[worker]--; m.homes[worker] == 0 {
		delete(m.homes, worker)
	}
}

// took notes for how long an attempt held its slot.
func (m *warmth) took(d Demand, t time.Duration) {
	e := m.entry(d)
	switch {
	case e == nil:
	case e.mean == 0:
		e.mean = t
	default:
		e.mean += time.Duration(latest * float64(t-e.mean))
	}
}

// takes is for how long an attempt may be expected to hold its slot; 0: not known.
func (m *warmth) takes(d Demand) time.Duration {
	if e := m.entry(d); e != nil {
		return e.mean
	}
	return 0
}
