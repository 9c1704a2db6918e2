package worker

import (
	"fmt"
	"net"
	"testing"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"pgregory.net/rapid"
)

// rival is one of the coordinators that share a worker.
type rival struct {
	*attached
	held []net.Conn // connections with a slot
}

// answer is what an Open was answered with: a connection, or nil for a refusal.
func (v *rival) answer(r *rapid.T, id string) net.Conn {
	late := time.After(patience)
	for {
		select {
		case conn := <-v.tunnels:
			v.held = append(v.held, conn)
			return conn
		case m := <-v.messages:
			refused := m.GetRefused()
			if refused == nil {
				continue // a report
			}
			if refused.GetConnectionId() != id || refused.GetCause() != archfarmv1.Refused_CAUSE_NO_SLOT {
				r.Fatalf("asked for %s, and was refused %v", id, refused)
			}
			return nil
		case <-late:
			r.Fatalf("no answer to %s", id)
		}
	}
}

// contest is a worker between two coordinators.
type contest struct {
	slots  int // as configured
	total  int // as last reported: fewer where this machine is under pressure
	rivals [2]*rival
	asked  int
}

func (c *contest) held() int { return len(c.rivals[0].held) + len(c.rivals[1].held) }

func (c *contest) ask(v *rival) (id string) {
	c.asked++
	id = fmt.Sprint("connection-", c.asked)
	v.attached.ask(id, true)
	return id
}

// settle waits until the worker tells both of as many slots as are held. It may never tell of more than there are, nor
// of fewer than are held.
func (c *contest) settle(r *rapid.T) {
	for _, v := range c.rivals {
		for begun := time.Now(); ; {
			slots := c.look(v)
			used := int(slots.GetUsed())
			c.total = int(slots.GetTotal())
			if used > c.total || c.total > c.slots || used < c.held() {
				r.Fatalf("%d of %d slots are said to be used, %d of %d are held", used, c.total, c.held(), c.slots)
			}
			if used == c.held() {
				break
			}
			if time.Since(begun) > patience {
				r.Fatalf("%d slots are said to be used for %s, %d are held", used, patience, c.held())
			}
		}
	}
}

// look has the worker report to one coordinator.
func (c *contest) look(v *rival) *archfarmv1.Slots {
	c.asked++
	report, failure := v.direct(&archfarmv1.Directive{
		Id: fmt.Sprint("look-", c.asked), Action: &archfarmv1.Directive_ReportNow{ReportNow: &archfarmv1.ReportNow{}},
	})
	if failure != "" {
		v.t.Fatalf("asking for a report: %s", failure)
	}
	return report.GetSlots()
}

// clear lets go of everything, whatever has gone wrong.
func (c *contest) clear() {
	c.rivals[0].endAll()
	c.rivals[1].endAll()
	for begun := time.Now(); c.look(c.rivals[0]).GetUsed() > 0 && time.Since(begun) < patience; {
	}
}

// one lets one coordinator ask: it gets a slot exactly if there is one.
func (c *contest) one(r *rapid.T) {
	v := rapid.SampledFrom(c.rivals[:]).Draw(r, "who")
	free := c.total - c.held()
	if got := v.answer(r, c.ask(v)) != nil; got != (free > 0) {
		r.Fatalf("a slot was given: %v, with %d free", got, free)
	}
}

// both lets them ask at the same moment: one slot is given to one of them.
func (c *contest) both(r *rapid.T) {
	free, got := c.total-c.held(), 0
	first, second := c.ask(c.rivals[0]), c.ask(c.rivals[1])
	for i, id := range []string{first, second} {
		if c.rivals[i].answer(r, id) != nil {
			got++
		}
	}
	if want := min(2, free); got != want {
		r.Fatalf("%d slots were given, want %d of %d free", got, want, free)
	}
}

// release closes one connection, sometimes as a kernel does for a killed process.
func (c *contest) release(r *rapid.T) {
	v := rapid.SampledFrom(c.rivals[:]).Draw(r, "who")
	if len(v.held) == 0 {
		r.Skip()
	}
	i := rapid.IntRange(0, len(v.held)-1).Draw(r, "which")
	v.end(i, rapid.Bool().Draw(r, "abruptly"))
	c.settle(r)
}

// die closes all connections of one coordinator.
func (c *contest) die(r *rapid.T) {
	rapid.SampledFrom(c.rivals[:]).Draw(r, "who").endAll()
	c.settle(r)
}

func (v *rival) end(i int, abruptly bool) {
	conn := v.held[i]
	v.held = append(v.held[:i], v.held[i+1:]...)
	if abruptly {
		reset(v.t, conn)
		return
	}
	_ = conn.Close() // the other end sees it either way
}

func (v *rival) endAll() {
	for len(v.held) > 0 {
		v.end(0, true)
	}
}

// TestGrants_TwoCoordinatorsNeverHoldMoreThanThereIs has two coordinators take and leave the slots of one agent.
func TestGrants_TwoCoordinatorsNeverHoldMoreThanThereIs(t *testing.T) {
	t.Parallel()
	const slots = 2
	timing := hasty
	timing.lookEvery = time.Hour // then what is offered changes only when a report is asked for
	b, c1, c2 := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback()), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c1.addr.String(), c2.addr.String()}, Slots: slots}, timing)
	c := &contest{slots: slots, rivals: [2]*rival{{attached: c1.attach(t)}, {attached: c2.attach(t)}}}
	rapid.Check(t, func(r *rapid.T) {
		defer c.clear() // the next run begins with all of them
		c.settle(r)
		r.Repeat(map[string]func(*rapid.T){"one asks": c.one, "both ask": c.both, "release": c.release, "die": c.die})
	})
}
