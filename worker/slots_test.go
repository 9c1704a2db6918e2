package worker

import (
	"sync"
	"testing"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"pgregory.net/rapid"
)

// model is what the slots have to be like.
type model struct {
	total, offered       int
	held, done           []func()
	stopping, down, full bool
	order                order
	changed              <-chan struct{}
	s                    *slots
}

// state is the first of the things that keep a worker from taking attempts.
func (m *model) state() archfarmv1.Worker_State {
	switch {
	case m.stopping || m.order.Action == drainOrder:
		return draining
	case m.order.Action == cordonOrder:
		return cordoned
	case m.down:
		return unavailable
	case m.full:
		return cordoned
	}
	return ready
}

// check compares the slots with the model, and whether they told of a change.
func (m *model) check(r *rapid.T, changed bool) {
	select {
	case <-m.changed:
		if !changed {
			r.Fatal("told of a change that was none")
		}
	default:
		if changed {
			r.Fatal("not told of a change")
		}
	}
	var report *archfarmv1.Report
	report, m.changed = m.s.report()
	total, used := int(report.GetSlots().GetTotal()), int(report.GetSlots().GetUsed())
	if used != len(m.held) || total != max(m.offered, used) || total < 1 || total > m.total {
		r.Fatalf("reported %v, holding %d of %d, %d offered", report, len(m.held), m.total, m.offered)
	}
	if state := m.state(); report.GetState() != state {
		r.Fatalf("reported %s, want %s", report.GetState(), state)
	}
	if unexplained := report.GetReason() == ""; unexplained != (m.state() == ready && m.offered == m.total) {
		r.Fatalf("the reason is %q with %d of %d offered", report.GetReason(), m.offered, m.total)
	}
	if idle, _ := m.s.idle(); idle != (len(m.held) == 0) {
		r.Fatalf("idle %v, holding %d", idle, len(m.held))
	}
}

func (m *model) take(r *rapid.T) {
	release, cause := m.s.take()
	may := m.state() == ready && len(m.held) < m.offered
	if (release != nil) != may {
		r.Fatalf("took %v (%s), want %v", release != nil, cause, may)
	}
	if may {
		m.held = append(m.held, release)
	}
	m.check(r, may)
}

func (m *model) release(r *rapid.T) {
	if len(m.held) == 0 {
		r.Skip()
	}
	i := rapid.IntRange(0, len(m.held)-1).Draw(r, "which")
	m.held[i]()
	m.done = append(m.done, m.held[i])
	m.held = append(m.held[:i], m.held[i+1:]...)
	m.check(r, true)
}

func word(b bool) string {
	if b {
		return "because"
	}
	return ""
}

func TestSlots_AreGivenOnlyWhileNothingKeepsTheWorkerFromIt(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		m := &model{total: rapid.IntRange(1, 4).Draw(r, "total")}
		m.offered, m.s = m.total, newSlots(m.total)
		_, m.changed = m.s.report()
		orders := []order{{}, {Action: drainOrder}, {Action: cordonOrder, Reason: "disk swap"}}
		r.Repeat(map[string]func(*rapid.T){
			"take":    m.take,
			"release": m.release,
			"release again": func(r *rapid.T) {
				if len(m.done) == 0 {
					r.Skip()
				}
				rapid.SampledFrom(m.done).Draw(r, "which")()
				m.check(r, false)
			},
			"stop": func(r *rapid.T) {
				if rapid.IntRange(0, 9).Draw(r, "seldom") > 0 {
					r.Skip()
				}
				m.s.drain()
				before := m.stopping
				m.stopping = true
				m.check(r, !before)
			},
			"order": func(r *rapid.T) {
				next := rapid.SampledFrom(orders).Draw(r, "order")
				m.s.obey(next)
				before := m.order
				m.order = next
				m.check(r, next != before)
			},
			"health": func(r *rapid.T) {
				next := rapid.Bool().Draw(r, "down")
				m.s.setUnavailable(word(next))
				before := m.down
				m.down = next
				m.check(r, next != before)
			},
			"disk": func(r *rapid.T) {
				next := rapid.Bool().Draw(r, "full")
				m.s.setDiskFull(word(next))
				before := m.full
				m.full = next
				m.check(r, next != before)
			},
			"pressure": func(r *rapid.T) {
				next := rapid.IntRange(1, m.total).Draw(r, "offered")
				m.s.offer(next, word(next < m.total))
				before := m.offered
				m.offered = next
				m.check(r, next != before)
			},
			"readings": func(r *rapid.T) {
				m.s.setLoad(&archfarmv1.Load{})
				m.check(r, false)
			},
		})
	})
}

func TestSlots_NoTwoTakersGetTheLastOne(t *testing.T) {
	t.Parallel()
	const total, takers = 3, 50
	s := newSlots(total)
	var wg sync.WaitGroup
	got := make(chan struct{}, takers)
	for range takers {
		wg.Go(func() {
			if release, _ := s.take(); release != nil {
				got <- struct{}{}
			}
		})
	}
	wg.Wait()
	if len(got) != total {
		t.Errorf("%d took one of %d slots", len(got), total)
	}
}
