package schedule

import (
	"strings"
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// of returns the worker in a pool, with what it can emulate there, "!" before those
// that it may.
func (w Worker) of(pool string, emulated ...string) Worker {
	w.Pool = pool
	for _, name := range emulated {
		name, w.AllowEmulation = strings.CutPrefix(name, "!")
		w.Emulated = append(w.Emulated, platform(name))
	}
	return w
}

func TestOutlook_Summary(t *testing.T) {
	t.Parallel()
	now := time.Unix(10_000, 0)
	mac := func(n string, used int) Worker { return worker("mac-"+n, 2, used, arm64).of("office") }
	waiting := outlook{demand: Demand{Platform: platform(arm64)}, state: queued, since: now.Add(-12 * time.Second), now: now}
	tests := map[string]struct {
		workers []Worker
		with    func(*outlook)
		want    string
	}{
		"the warm worker, and what the others do": {
			[]Worker{mac("1", 2).in(Draining, ""), mac("2", 2), mac("3", 0).in(Draining, "")},
			func(o *outlook) { o.warm = "mac-2"; o.frees = map[string]time.Duration{"mac-2": 20 * time.Second} },
			"waiting 12 s: mac-2 is warm and frees up in about 20 s; 2 others are draining",
		},
		"nothing is said of what is not known": {
			[]Worker{mac("1", 2), mac("2", 2)}, func(*outlook) {}, "waiting 12 s: 2 are full",
		},
		"the warm worker, when it is not known when it frees up": {
			[]Worker{mac("1", 2), mac("2", 2)}, func(o *outlook) { o.warm = "mac-1" }, "waiting 12 s: mac-1 is warm and full; 1 other is full",
		},
		"the one that frees up first": {
			[]Worker{mac("1", 2), mac("2", 2), mac("3", 0).in(Cordoned, "disk 96 % full")},
			func(o *outlook) {
				o.frees = map[string]time.Duration{"mac-1": 3 * time.Minute, "mac-2": 91 * time.Second}
				o.ahead = 2
			},
			"waiting 12 s: mac-2 frees up in about 2 min; 1 other is full; 1 other is cordoned; 2 legs come first",
		},
		"only workers that are away": {
			[]Worker{mac("1", 0).in(Unavailable, "")}, func(*outlook) {}, "waiting 12 s: 1 is unavailable",
		},
		"no worker at all": {
			[]Worker{worker("amd", 1, 0, amd64).of("cloud")}, func(*outlook) {},
			"waiting 12 s: no native worker for linux/arm64: the farm has linux/amd64 (1)",
		},
		"one that came now": {
			[]Worker{mac("1", 1)}, func(o *outlook) { o.state = idle }, "would run on mac-1 (least loaded: 1 of 2 slots used)",
		},
		"one that would wait": {
			[]Worker{mac("1", 2)}, func(o *outlook) { o.state = idle }, "would wait: 1 is full",
		},
		"one that would be emulated": {
			[]Worker{worker("amd", 1, 0, amd64).of("cloud", "!"+arm64)}, func(o *outlook) { o.state, o.emulated = idle, true },
			"would run on amd (emulated: no native worker)",
		},
		"one that would be refused": {
			[]Worker{worker("amd", 1, 0, amd64).of("cloud", arm64)}, func(o *outlook) { o.state, o.emulated = idle, true },
			"would be refused: no native worker for linux/arm64: the farm has linux/amd64 (1); emulation would be possible on 1 of them, if the coordinator's --allow-emulation named their pool",
		},
		"one that runs": {
			[]Worker{mac("1", 1)}, func(o *outlook) { o.state, o.assignment = granted, Assignment{Worker: "mac-1", Emulated: true} },
			"running on mac-1 for 12 s, emulated",
		},
		"one that has ended": {nil, func(o *outlook) { o.state = closed }, "it has ended"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := waiting
			o.workers = tt.workers
			tt.with(&o)
			if got := o.summary(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestOutlook_Verdict(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		worker   Worker
		with     func(*outlook)
		eligible bool
		want     string
	}{
		"free":                          {worker("w", 2, 1, arm64), nil, true, "least loaded: 1 of 2 slots used"},
		"warm":                          {worker("w", 2, 1, arm64), func(o *outlook) { o.warm = "w" }, true, "warm: last built this project"},
		"full":                          {worker("w", 2, 2, arm64), nil, true, "full: 2 of 2 slots"},
		"full, and for how long":        {worker("w", 2, 2, arm64), func(o *outlook) { o.frees = map[string]time.Duration{"w": 20 * time.Second} }, true, "full: 2 of 2 slots, frees up in about 20 s"},
		"another architecture":          {worker("w", 2, 2, amd64, "linux/amd64/v2", "linux/386"), nil, false, "runs linux/amd64 only"},
		"another pool":                  {worker("w", 2, 2, arm64).of("cloud"), func(o *outlook) { o.demand.Pools = []string{"office"} }, false, "pool cloud"},
		"draining":                      {worker("w", 2, 0, arm64).in(Draining, ""), nil, false, "draining"},
		"cordoned":                      {worker("w", 2, 0, arm64).in(Cordoned, "disk 96 % full"), nil, false, "cordoned: disk 96 % full"},
		"without slots":                 {worker("w", 0, 0, arm64), nil, false, "without slots"},
		"excluded":                      {worker("w", 2, 0, arm64), func(o *outlook) { o.excluded = []string{"w"} }, false, "excluded after an earlier attempt"},
		"linked to another":             {worker("w", 2, 0, arm64), func(o *outlook) { o.demand.On = "x" }, false, "the build goes on where its input is, on x"},
		"could emulate, but must not":   {worker("w", 2, 0, amd64).of("cloud", arm64), func(o *outlook) { o.emulated = true }, false, "runs linux/amd64 only; it could emulate linux/arm64, but its pool does not allow emulation"},
		"emulates":                      {worker("w", 2, 0, amd64).of("cloud", "!"+arm64), func(o *outlook) { o.emulated = true }, true, "emulated: no native worker"},
		"does not, as others need not":  {worker("w", 2, 0, amd64).of("cloud", "!"+arm64), nil, false, "runs linux/amd64 only; it does not emulate what others run natively"},
		"a sick machine's control code": {worker("w", 2, 0, arm64).in(Unavailable, "no\n\x1b[31manswer"), nil, false, "unavailable: no [31manswer"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := outlook{demand: Demand{Platform: platform(arm64)}, workers: []Worker{tt.worker}}
			if tt.with != nil {
				tt.with(&o)
			}
			if got := o.verdict(&tt.worker); got.Eligible != tt.eligible || got.Reason != tt.want {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestLasting(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{
		-time.Second: "0 s", 0: "0 s", 1400 * time.Millisecond: "1 s", 89 * time.Second: "89 s", 90 * time.Second: "2 min",
		89 * time.Minute: "89 min", 100 * time.Minute: "2 h", 50 * time.Hour: "50 h",
	} {
		if got := Lasting(d); got != want {
			t.Errorf("%s: got %q, want %q", d, got, want)
		}
	}
}

func TestScheduler_EstimatesFromHowLongAttemptsTook(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	s := New(func() time.Time { return now })
	now = now.Add(time.Hour)
	s.Update([]Worker{worker("mac-1", 1, 0, arm64), worker("mac-2", 1, 1, arm64).in(Draining, "")})
	build := func() *Ticket {
		t.Helper()
		ticket, err := s.Enqueue([]Demand{{Platform: platform(arm64), Key: "project", Build: "ref", Tenant: "acme"}})
		if err != nil {
			t.Fatal(err)
		}
		return ticket
	}
	for _, took := range []time.Duration{30 * time.Second, 40 * time.Second} { // mean: 33 s
		first := build()
		if e := first.Explain(0); e.Worker != "mac-1" || e.Summary != "running on mac-1 for 0 s" {
			t.Fatalf("%+v", e)
		}
		now = now.Add(took)
		first.Close()
	}
	running, waits := build(), build()
	now = now.Add(12 * time.Second)
	if got, want := waits.Explain(0).Summary, "waiting 12 s: mac-1 is warm and frees up in about 21 s; 1 other is draining"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	queue := s.Queue()
	if len(queue) != 1 || queue[0].Build != "ref" || queue[0].Tenant != "acme" || queue[0].Platform != arm64 || queue[0].Ahead != 0 || !queue[0].Since.Equal(now.Add(-12*time.Second)) || queue[0].Reason != "linux/arm64: 1 full, 1 draining" {
		t.Errorf("%+v", queue)
	}
	if got, want := s.Explain(Demand{Platform: platform(arm64)}).Summary, "would wait: mac-1 frees up in about 21 s; 1 other is draining; 1 leg comes first, so that it starts in about 54 s"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	now = now.Add(time.Minute) // longer than ever: who knows
	if got, want := waits.Explain(0).Summary, "waiting 72 s: mac-1 is warm and full; 1 other is draining"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	running.Close()
	waits.Close()
	if e := waits.Explain(0); e.Summary != "it has ended" {
		t.Errorf("%+v", e)
	}
}

func TestScheduler_ASharedSlotFreesUpWithTheLastOfItsLegs(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	s := New(func() time.Time { return now })
	s.Share = true
	s.Update([]Worker{worker("w", 1, 0, amd64, "linux/386")})
	both := []Demand{{Platform: platform(amd64), Key: "p"}, {Platform: platform("linux/386"), Key: "p"}}
	first, err := s.Enqueue(both)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(10 * time.Second)
	first.Release(0)
	now = now.Add(10 * time.Second)
	first.Close()
	second, err := s.Enqueue(both)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	s.mu.Lock()
	left, known := s.freesUp("w", now)
	s.mu.Unlock()
	if !known || left != 20*time.Second {
		t.Errorf("frees up in %s, known %v", left, known)
	}
	second.Release(0) // its slot is the other's now
	s.mu.Lock()
	left, known = s.freesUp("w", now.Add(time.Second))
	s.mu.Unlock()
	if !known || left != 19*time.Second {
		t.Errorf("then it frees up in %s, known %v", left, known)
	}
}

func TestScheduler_ExplainsOnlyPoolsThatMayBeKnown(t *testing.T) {
	t.Parallel()
	s := old(worker("amd", 1, 0, amd64).of("office"), worker("mac", 1, 0, arm64).of("cloud"))
	d := Demand{Platform: platform(arm64), Pools: []string{"office"}, Known: []string{"office"}}
	e := s.Explain(d)
	if len(e.Workers) != 1 || e.Workers[0].Worker != "amd" || strings.Contains(e.Summary, arm64+" (") {
		t.Errorf("a client of one pool is told %+v", e)
	}
	d.Known = nil
	if e = s.Explain(d); len(e.Workers) != 2 || e.Workers[1].Reason != "pool cloud" || !strings.Contains(e.Summary, "pool office has linux/amd64 (1); other pools have linux/arm64 (1)") {
		t.Errorf("another is told %+v", e)
	}
}

func TestScheduler_EmulatesOnlyWhatNobodyRunsNatively(t *testing.T) {
	t.Parallel()
	emulator := worker("amd", 4, 0, amd64).of("cloud", "!"+arm64)
	d := Demand{Platform: platform(arm64), Key: "p"}
	tests := map[string]struct {
		fleet []Worker
		with  func(*Demand)
		want  bool
	}{
		"no native worker":                  {nil, nil, true},
		"a native one is full":              {[]Worker{worker("mac", 1, 1, arm64)}, nil, false},
		"a native one is draining":          {[]Worker{worker("mac", 1, 0, arm64).in(Draining, "")}, nil, false},
		"a native one is unavailable":       {[]Worker{worker("mac", 1, 0, arm64).in(Unavailable, "")}, nil, false},
		"a native one is in another pool":   {[]Worker{worker("mac", 1, 0, arm64).of("office")}, func(d *Demand) { d.Pools = []string{"cloud"} }, true},
		"the emulator is in another pool":   {nil, func(d *Demand) { d.Pools = []string{"office"} }, false},
		"a linked build insists on another": {nil, func(d *Demand) { d.On = "mac" }, false},
		"native, although elsewhere wanted": {[]Worker{worker("mac", 1, 0, arm64)}, func(d *Demand) { d.On = "amd" }, false},
		"it does not emulate that":          {nil, func(d *Demand) { d.Platform = platform("linux/riscv64") }, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, d := old(append(tt.fleet, emulator)...), d
			if tt.with != nil {
				tt.with(&d)
			}
			if got := s.Emulates(d); got != tt.want {
				t.Errorf("Emulates: %v", got)
			}
			if suits, emulated := s.Suits("amd", d); suits != tt.want || emulated != tt.want {
				t.Errorf("Suits: %v, %v", suits, emulated)
			}
			ticket, err := s.Enqueue([]Demand{d})
			if err != nil {
				return // whom Emulates has not accepted
			}
			defer ticket.Close()
			if l := ticket.legs[0]; tt.want != (l.state == granted && l.assignment.Worker == "amd" && l.assignment.Emulated) {
				t.Errorf("state %d, %+v", l.state, l.assignment)
			}
		})
	}
}

func TestScheduler_ALegThatWaitsForAnEmulatorGetsTheNativeWorkerThatCame(t *testing.T) {
	t.Parallel()
	full := worker("amd", 1, 1, amd64).of("cloud", "!"+arm64)
	s := old(full)
	ticket := enqueue(t, s, arm64)
	if r := s.Queue()[0].Reason; r != "linux/arm64, emulated: 1 full" {
		t.Errorf("reason %q", r)
	}
	s.Update([]Worker{worker("amd", 1, 0, amd64).of("cloud", "!"+arm64), worker("mac", 1, 1, arm64)})
	if l := ticket.legs[0]; l.state != queued {
		t.Fatalf("granted %+v", l.assignment)
	}
	s.Update([]Worker{full, worker("mac", 1, 0, arm64)})
	if a := ticket.legs[0].assignment; a.Worker != "mac" || a.Emulated {
		t.Errorf("granted %+v", a)
	}
}

func TestScheduler_WaitingCountsByPlatformAndPool(t *testing.T) {
	t.Parallel()
	s := old(worker("amd", 1, 1, amd64).of("cloud"))
	for _, pools := range [][]string{nil, nil, {"cloud"}, {"cloud", "office"}} {
		ticket, err := s.Enqueue([]Demand{{Platform: platform(amd64), Pools: pools}})
		if err != nil {
			t.Fatal(err)
		}
		defer ticket.Close()
	}
	got := s.Waiting()
	if len(got) != 3 || got[Place{amd64, "any"}] != 2 || got[Place{amd64, "cloud"}] != 1 || got[Place{amd64, "cloud,office"}] != 1 {
		t.Errorf("%v", got)
	}
}

func TestNoWorker_SaysWhatThePoolHas(t *testing.T) {
	t.Parallel()
	fleet := []Worker{
		worker("a", 1, 0, amd64).of("office", arm64), worker("b", 1, 0, amd64).of("office"), worker("c", 1, 0, arm64).of("cloud"),
	}
	for want, d := range map[string]Demand{
		"no native worker for linux/arm64 in pool office: pool office has linux/amd64 (2); other pools have linux/arm64 (1); emulation would be possible on 1 of them, if the coordinator's --allow-emulation named their pool": {Platform: platform(arm64), Pools: []string{"office"}},
		"no native worker for linux/amd64 in pool lab: pool lab has no workers; other pools have linux/amd64 (2), linux/arm64 (1)":                                                                                              {Platform: platform(amd64), Pools: []string{"lab"}},
		"no native worker for linux/amd64 in pools lab, shed: pools lab, shed have no workers":                                                                                                                                  {Platform: platform(amd64), Pools: []string{"lab", "shed"}, Known: []string{"lab", "shed"}},
		"no native worker for linux/s390x: the farm has linux/amd64 (2), linux/arm64 (1)":                                                                                                                                       {Platform: ocispecs.Platform{OS: "linux", Architecture: "s390x"}},
	} {
		if got := noWorker(fleet, d, nil).Error(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
