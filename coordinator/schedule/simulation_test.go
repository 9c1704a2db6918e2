package schedule

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/containerd/platforms"
	"pgregory.net/rapid"
)

// farm drives a Scheduler with random events, single-threaded, and knows what has to
// hold after each. Where slots are shared its builds are of the worst kind: each keeps
// every slot it has got until all of its legs have one, and only then finishes. Where
// they are not, a build may need more slots than there are, so each leg ends by itself.
type farm struct {
	s        *Scheduler
	now      time.Time
	machines map[string]*machine
	builds   []*simBuild // unfinished, oldest first
	finished int
	held     map[*leg]string // what was granted before the event: leg → worker
}

// machine is a worker as it really is.
type machine struct {
	worker   Worker // Used is not kept here
	attached bool
	foreign  int // slots that other coordinators hold
}

type simBuild struct {
	ticket *Ticket
}

func newFarm(t *rapid.T) *farm {
	f := &farm{now: time.Unix(1000, 0), machines: map[string]*machine{}, held: map[*leg]string{}}
	f.s = New(func() time.Time { return f.now })
	f.s.Share = rapid.Bool().Draw(t, "share")
	kinds := [][]string{
		{"linux/amd64", "linux/amd64/v2", "linux/386"},
		{"linux/amd64"},
		{"linux/arm64", "linux/arm/v7"},
		{"linux/arm64"},
		{"linux/riscv64"},
	}
	for i := range rapid.IntRange(1, 8).Draw(t, "machines") {
		kind := rapid.SampledFrom(kinds).Draw(t, "kind")
		slots := rapid.IntRange(1, 3).Draw(t, "slots")
		m := &machine{worker: worker(fmt.Sprintf("w%d", i), slots, 0, kind...), attached: rapid.Bool().Draw(t, "attached")}
		m.worker.Pool = rapid.SampledFrom([]string{"cloud", "office"}).Draw(t, "pool")
		m.worker.AllowEmulation = rapid.Bool().Draw(t, "allow emulation")
		m.emulate(t)
		f.machines[m.worker.Name] = m
	}
	f.heartbeat(0)
	if rapid.Bool().Draw(t, "long after the start") {
		f.now = f.now.Add(time.Hour)
	}
	return f
}

// emulate draws what the machine can emulate.
func (m *machine) emulate(t *rapid.T) {
	m.worker.Emulated = nil
	for _, name := range []string{"linux/arm64", "linux/riscv64"} {
		if rapid.Bool().Draw(t, "emulates "+name) {
			m.worker.Emulated = append(m.worker.Emulated, platform(name))
		}
	}
}

// holding is the number of slots that legs hold on a worker.
func (f *farm) holding(name string) int {
	n := 0
	for _, b := range f.builds {
		for _, l := range b.ticket.legs {
			if l.state == granted && l.assignment.Worker == name && l.host == nil {
				n++
			}
		}
	}
	return n
}

// heartbeat tells the scheduler the fleet, the load reported being short of the truth.
func (f *farm) heartbeat(short int) {
	var fleet []Worker
	for _, m := range f.machines {
		if m.attached {
			w := m.worker
			w.Used = max(f.holding(w.Name)+m.foreign-short, 0)
			fleet = append(fleet, w)
		}
	}
	f.s.Update(fleet)
}

func (f *farm) machine(t *rapid.T) *machine {
	names := make([]string, 0, len(f.machines))
	for name := range f.machines {
		names = append(names, name)
	}
	slices.Sort(names)
	return f.machines[rapid.SampledFrom(names).Draw(t, "machine")]
}

// end closes builds for which the condition holds, and forgets them.
func (f *farm) end(which func(*simBuild) bool) {
	f.builds = slices.DeleteFunc(f.builds, func(b *simBuild) bool {
		if !which(b) {
			return false
		}
		b.ticket.Close()
		f.finished++
		return true
	})
}

// finish ends what can end.
func (f *farm) finish() {
	if !f.s.Share {
		for _, b := range f.builds {
			for i := range b.ticket.legs {
				b.ticket.Release(i)
			}
		}
	}
	done := granted
	if !f.s.Share {
		done = idle
	}
	f.end(func(b *simBuild) bool {
		return !slices.ContainsFunc(b.ticket.legs, func(l *leg) bool { return l.state != done })
	})
}

func (f *farm) enqueue(t *rapid.T) {
	names := []string{"linux/amd64", "linux/amd64/v2", "linux/386", "linux/arm64", "linux/arm/v7", "linux/riscv64"}
	demands := make([]Demand, rapid.IntRange(1, 4).Draw(t, "legs"))
	servable := true
	for i := range demands {
		demands[i] = Demand{
			Platform: platform(rapid.SampledFrom(names).Draw(t, "platform")),
			Anywhere: rapid.IntRange(0, 5).Draw(t, "anywhere") == 0,
			Key:      rapid.SampledFrom([]string{"", "a", "b"}).Draw(t, "key"),
			Pools:    rapid.SampledFrom([][]string{nil, nil, {"cloud"}, {"office"}, {"cloud", "office"}, {"nowhere", "office"}}).Draw(t, "pools"),
		}
		found := false
		for _, m := range f.machines {
			found = found || m.attached && f.may(m, demands[i])
		}
		servable = servable && found
	}
	ticket, err := f.s.Enqueue(demands)
	starting := f.now.Sub(f.s.started) < f.s.Grace
	if none := (*build.NoWorkerError)(nil); err != nil && !errors.As(err, &none) {
		t.Fatal(err)
	}
	if accepted, want := err == nil, servable || starting; accepted != want {
		t.Fatalf("accepted %v, want %v: %v", accepted, want, err)
	}
	if err == nil {
		f.builds = append(f.builds, &simBuild{ticket})
	}
}

// may reports whether the machine may run what is demanded as things are: emulated
// where its pool allows that and none of the attached machines needs to.
func (f *farm) may(m *machine, d Demand) bool {
	if !m.in(d) || d.Anywhere || m.native(d) {
		return m.in(d)
	}
	for _, other := range f.machines {
		if other.attached && other.in(d) && other.native(d) {
			return false
		}
	}
	return m.worker.AllowEmulation && slices.ContainsFunc(m.worker.Emulated, platforms.OnlyStrict(d.Platform).Match)
}

func (m *machine) in(d Demand) bool { return d.Pools == nil || slices.Contains(d.Pools, m.worker.Pool) }

func (m *machine) native(d Demand) bool {
	return slices.ContainsFunc(m.worker.Platforms, platforms.OnlyStrict(d.Platform).Match)
}

// leg draws one of the legs in a state.
func (f *farm) leg(t *rapid.T, state legState) (*Ticket, int) {
	type place struct {
		ticket *Ticket
		i      int
	}
	var all []place
	for _, b := range f.builds {
		for i, l := range b.ticket.legs {
			if l.state == state {
				all = append(all, place{b.ticket, i})
			}
		}
	}
	if len(all) == 0 {
		t.Skip("no such leg")
	}
	p := rapid.SampledFrom(all).Draw(t, "leg")
	return p.ticket, p.i
}

// actions are the events of a farm's life.
func (f *farm) actions() map[string]func(*rapid.T) {
	return map[string]func(*rapid.T){
		"a build arrives":          f.enqueue,
		"a second build arrives":   f.enqueue, // more often than the rest
		"builds finish":            func(*rapid.T) { f.finish() },
		"the workers report":       func(*rapid.T) { f.heartbeat(0) },
		"the workers report late":  func(t *rapid.T) { f.heartbeat(rapid.IntRange(0, 3).Draw(t, "short")) },
		"another coordinator runs": func(t *rapid.T) { f.machine(t).foreign = rapid.IntRange(0, 3).Draw(t, "foreign"); f.heartbeat(0) },
		"time passes":              func(*rapid.T) { f.now = f.now.Add(10 * time.Second) },
		"an attempt ends": func(t *rapid.T) {
			if f.s.Share {
				t.Skip("these builds end as a whole")
			}
			ticket, i := f.leg(t, granted)
			ticket.Release(i)
		},
		"a client goes away": func(t *rapid.T) {
			ticket, _ := f.leg(t, queued)
			f.end(func(b *simBuild) bool { return b.ticket == ticket })
		},
		"an agent refuses a slot": func(t *rapid.T) {
			ticket, i := f.leg(t, granted)
			refusing := ticket.legs[i].assignment.Worker
			ticket.Refused(i)
			if l := ticket.legs[i]; l.state == granted && l.assignment.Worker == refusing {
				t.Fatalf("%s was granted again before it reported", refusing)
			}
		},
		"a worker changes state": func(t *rapid.T) {
			m := f.machine(t)
			m.worker.State = rapid.SampledFrom([]State{Ready, Draining, Unavailable, Cordoned}).Draw(t, "state")
			f.heartbeat(0)
		},
		"an emulator comes or goes": func(t *rapid.T) {
			m := f.machine(t)
			m.emulate(t)
			m.worker.AllowEmulation = rapid.Bool().Draw(t, "allowed")
			f.heartbeat(0)
		},
		"an operator looks": func(t *rapid.T) { f.look(t) },
		"a worker attaches or is lost": func(t *rapid.T) {
			m := f.machine(t)
			m.attached = !m.attached
			f.heartbeat(0)
			if m.attached {
				return
			}
			f.end(func(b *simBuild) bool { // builds that ran there fail
				return slices.ContainsFunc(b.ticket.legs, func(l *leg) bool {
					return l.state == granted && l.assignment.Worker == m.worker.Name
				})
			})
		},
		"": f.check,
	}
}

// check is what holds after every event.
func (f *farm) check(t *rapid.T) {
	was := f.held
	f.held = map[*leg]string{}
	var waiting, fresh []*leg
	for _, b := range f.builds {
		for _, l := range b.ticket.legs {
			switch l.state {
			case granted:
				f.held[l] = l.assignment.Worker
				if was[l] != l.assignment.Worker {
					fresh = append(fresh, l)
				}
			case queued:
				waiting = append(waiting, l)
				if !slices.Contains(f.s.classes[l.classKey()].queue, l) {
					t.Fatalf("leg %d/%d waits but is in no queue", l.build, l.index)
				}
			case idle:
				if f.s.Share {
					t.Fatalf("leg %d/%d was lost", l.build, l.index)
				}
			default:
				t.Fatalf("leg %d/%d of an unfinished build was lost: state %d", l.build, l.index, l.state)
			}
		}
	}
	for _, l := range fresh {
		f.checkGrant(t, l, waiting)
	}
	if n := f.waiting(); n != len(waiting) {
		t.Fatalf("%d legs in queues, %d wait", n, len(waiting))
	}
	for name, m := range f.machines {
		if n := f.holding(name); f.s.granted[name] != n || len(f.s.holders[name]) != n {
			t.Fatalf("%s: %d slots granted, %d held", name, f.s.granted[name], f.holding(name))
		}
		i, attached := f.s.index[name]
		if attached && f.s.view[i].free() > 0 && m.worker.State == Ready {
			for _, l := range waiting {
				if f.may(m, l.demand) {
					t.Fatalf("leg %d/%d waits although %s has a free slot", l.build, l.index, name)
				}
			}
		}
	}
}

// checkGrant checks a slot that the last event has granted.
func (f *farm) checkGrant(t *rapid.T, l *leg, waiting []*leg) {
	m := f.machines[l.assignment.Worker]
	if !m.attached || m.worker.State != Ready || !f.may(m, l.demand) || l.assignment.Emulated == (l.demand.Anywhere || m.native(l.demand)) {
		t.Fatalf("leg %d/%d, %s, was granted %+v", l.build, l.index, platforms.Format(l.demand.Platform), m)
	}
	if l.host != nil {
		if h := l.host; h.host != nil || h.state != granted || h.build != l.build || h.assignment.Worker != m.worker.Name {
			t.Fatalf("leg %d/%d shares what leg %d/%d does not have", l.build, l.index, h.build, h.index)
		}
		return // takes no slot
	}
	if n := f.holding(m.worker.Name); n > m.worker.Slots {
		t.Fatalf("%d slots of %s's %d were granted", n, m.worker.Name, m.worker.Slots)
	}
	for _, e := range waiting {
		if before(e, l) < 0 && f.may(m, e.demand) {
			t.Fatalf("leg %d/%d overtook %d/%d on %s", l.build, l.index, e.build, e.index, m.worker.Name)
		}
	}
}

// look checks what an operator is told.
func (f *farm) look(t *rapid.T) {
	q := f.s.Queue()
	if len(q) != f.waiting() {
		t.Fatalf("%d legs are listed, %d wait", len(q), f.waiting())
	}
	for _, b := range f.builds {
		for i, l := range b.ticket.legs {
			e := b.ticket.Explain(i)
			if len(e.Workers) != len(f.s.view) || e.Summary == "" || (e.Worker != "") != (l.state == granted) {
				t.Fatalf("leg %d/%d, state %d: %+v", l.build, l.index, l.state, e)
			}
			for _, v := range e.Workers {
				m := f.machines[v.Worker]
				if want := m.worker.State == Ready && f.may(m, l.demand); v.Eligible != want || v.Reason == "" {
					t.Fatalf("leg %d/%d: %+v, eligible is %v", l.build, l.index, v, want)
				}
			}
		}
	}
}

// settle restores the farm, and checks that then every build finishes.
func (f *farm) settle(t *rapid.T) {
	for _, m := range f.machines {
		m.attached, m.foreign, m.worker.State = true, 0, Ready
	}
	f.heartbeat(0)
	able := func(b *simBuild) bool {
		return !slices.ContainsFunc(b.ticket.legs, func(l *leg) bool {
			for _, m := range f.machines {
				if f.may(m, l.demand) {
					return false
				}
			}
			return true
		})
	}
	// Those accepted before the first workers attached may have asked for what no machine has.
	f.end(func(b *simBuild) bool { return !able(b) })
	f.heartbeat(0)
	for len(f.builds) > 0 {
		f.check(t)
		waited, built := f.waiting(), len(f.builds)
		f.finish()
		f.heartbeat(0)
		if f.waiting() == waited && len(f.builds) == built {
			t.Fatalf("%d builds wait for each other: %s", len(f.builds), f)
		}
	}
	if len(f.s.classes) != 0 || len(f.s.granted) != 0 || len(f.s.holders) != 0 {
		t.Fatalf("left behind: %d queues, grants %v", len(f.s.classes), f.s.granted)
	}
}

// waiting counts the legs in the queue.
func (f *farm) waiting() int {
	n := 0
	for _, c := range f.s.classes {
		n += len(c.queue)
	}
	return n
}

// String is the state of the builds, for a failure's message.
func (f *farm) String() string {
	var b strings.Builder
	for _, sb := range f.builds {
		for _, l := range sb.ticket.legs {
			fmt.Fprintf(&b, "\n%d/%d %s state %d on %q", l.build, l.index, platforms.Format(l.demand.Platform), l.state, l.assignment.Worker)
		}
	}
	return b.String()
}

func TestScheduler_EveryBuildFinishesWhateverHappens(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := newFarm(t)
		t.Repeat(f.actions())
		f.settle(t)
	})
}
