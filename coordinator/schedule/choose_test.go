package schedule

import (
	"fmt"
	"maps"
	"math"
	"testing"

	"pgregory.net/rapid"
)

func TestChoose(t *testing.T) {
	t.Parallel()
	const arm, amd = "linux/arm64", "linux/amd64"
	tests := []struct {
		name    string
		workers []Worker
		demand  Demand
		warm    string
		want    string // the worker; "" for none
		why     string
	}{
		{
			"the warm worker, although it is more loaded",
			[]Worker{worker("a", 4, 0, arm), worker("b", 4, 3, arm)},
			Demand{Platform: platform(arm)}, "b", "b", "warm: last built this project",
		},
		{
			"another one when the warm one is full",
			[]Worker{worker("a", 4, 1, arm), worker("b", 4, 4, arm)},
			Demand{Platform: platform(arm)}, "b", "a", "least loaded: 1 of 4 slots used",
		},
		{
			"warmth does not make a worker native",
			[]Worker{worker("a", 4, 1, arm), worker("b", 4, 0, amd)},
			Demand{Platform: platform(arm)}, "b", "a", "least loaded: 1 of 4 slots used",
		},
		{
			"the share of slots in use counts, not their number",
			[]Worker{worker("a", 2, 1, arm), worker("b", 8, 3, arm)},
			Demand{Platform: platform(arm)}, "", "b", "least loaded: 3 of 8 slots used",
		},
		{
			"equal shares: most free slots",
			[]Worker{worker("a", 2, 1, arm), worker("b", 8, 4, arm)},
			Demand{Platform: platform(arm)}, "", "b", "least loaded: 4 of 8 slots used",
		},
		{
			"draining and unavailable workers take nothing",
			[]Worker{worker("a", 4, 0, arm).in(Draining, ""), worker("b", 4, 0, arm).in(Unavailable, "sick"), worker("c", 4, 3, arm)},
			Demand{Platform: platform(arm)}, "a", "c", "least loaded: 3 of 4 slots used",
		},
		{"linux/arm64 does not imply linux/arm/v7", []Worker{worker("a", 4, 0, arm)}, Demand{Platform: platform("linux/arm/v7")}, "", "", ""},
		{"linux/amd64 does not imply linux/amd64/v3", []Worker{worker("a", 4, 0, amd)}, Demand{Platform: platform("linux/amd64/v3")}, "", "", ""},
		{"the operating system counts", []Worker{worker("a", 4, 0, "windows/amd64")}, Demand{Platform: platform(amd)}, "", "", ""},
		{
			"anywhere",
			[]Worker{worker("a", 4, 2, arm), worker("b", 4, 1, amd)},
			Demand{Platform: platform("linux/s390x"), Anywhere: true}, "", "b", "least loaded: 1 of 4 slots used",
		},
		{
			"on one worker only, although another is warm and free",
			[]Worker{worker("a", 4, 0, arm), worker("b", 4, 3, arm)},
			Demand{Platform: platform(arm), On: "b"}, "a", "b", "least loaded: 3 of 4 slots used",
		},
		{"on one worker only, which is full", []Worker{worker("a", 4, 0, arm), worker("b", 4, 4, arm)}, Demand{Platform: platform(arm), On: "b"}, "", "", ""},
		{"on one worker only, where the platform is not native", []Worker{worker("a", 4, 0, arm), worker("b", 4, 0, amd)}, Demand{Platform: platform(arm), On: "b"}, "", "", ""},
		{"anywhere on one worker", []Worker{worker("a", 4, 0, arm), worker("b", 4, 1, amd)}, Demand{Anywhere: true, On: "b"}, "", "b", "least loaded: 1 of 4 slots used"},
		{"full", []Worker{worker("a", 2, 2, arm)}, Demand{Platform: platform(arm)}, "a", "", ""},
		{"more used than there are slots", []Worker{worker("a", 2, 3, arm)}, Demand{Platform: platform(arm)}, "", "", ""},
		{"no slots", []Worker{worker("a", 0, 0, arm)}, Demand{Platform: platform(arm)}, "", "", ""},
		{
			"absurd numbers of slots do not overflow",
			[]Worker{worker("a", math.MaxInt32, math.MaxInt32-1, arm), worker("b", 4, 1, arm)},
			Demand{Platform: platform(arm)}, "", "b", "least loaded: 1 of 4 slots used",
		},
		{"an empty fleet", nil, Demand{Platform: platform(arm)}, "", "", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			got, ok := Choose(test.workers, test.demand, test.warm)
			if ok != (test.want != "") || got.Worker != test.want || got.Why != test.why || got.Warm != (ok && test.want == test.warm) {
				t.Errorf("got %+v, %v; want %q, %q", got, ok, test.want, test.why)
			}
		})
	}
}

func TestChoose_DoesNotDependOnTheOrderOfWorkers(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var fleet []Worker
		for i := range rapid.IntRange(1, 12).Draw(t, "workers") {
			slots := rapid.IntRange(0, 3).Draw(t, "slots")
			fleet = append(fleet, worker(fmt.Sprintf("w%d", i), slots, rapid.IntRange(0, 3).Draw(t, "used"), "linux/arm64"))
		}
		d := Demand{Platform: platform("linux/arm64"), Key: rapid.StringN(0, 3, -1).Draw(t, "key")}
		a, okA := Choose(fleet, d, "")
		b, okB := Choose(rapid.Permutation(fleet).Draw(t, "shuffled"), d, "")
		if a != b || okA != okB {
			t.Fatalf("got %+v, %v and %+v, %v", a, okA, b, okB)
		}
	})
}

func TestChoose_SpreadsProjectsOverEqualWorkers(t *testing.T) {
	t.Parallel()
	const workers, projects = 10, 1000
	var fleet []Worker
	for i := range workers {
		fleet = append(fleet, worker(fmt.Sprintf("mac-mini-%d", i), 4, 0, "linux/arm64"))
	}
	got := map[string]int{}
	for i := range projects {
		a, _ := Choose(fleet, Demand{Platform: platform("linux/arm64"), Key: fmt.Sprintf("team/app-%d", i)}, "")
		got[a.Worker]++
	}
	for _, w := range fleet { // fair is 100; 5 standard deviations are 47
		if n := got[w.Name]; n < 53 || n > 147 {
			t.Errorf("%s got %d of %d projects", w.Name, n, projects)
		}
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	const arm = "linux/arm64"
	d := Demand{Platform: platform(arm)}
	tests := []struct {
		name    string
		workers []Worker
		want    string
	}{
		{"nobody", nil, ""},
		{"nobody of the platform", []Worker{worker("a", 1, 0, "linux/amd64")}, ""},
		{"the most frequent first", []Worker{
			worker("a", 1, 1, arm), worker("b", 1, 1, arm).in(Draining, ""), worker("c", 1, 0, arm).in(Draining, ""), worker("d", 1, 1, "linux/amd64"),
		}, "2 draining, 1 full"},
		{"equally frequent", []Worker{
			worker("a", 1, 0, arm), worker("b", 0, 0, arm), worker("c", 1, 0, arm).in(Draining, ""), worker("d", 1, 1, arm),
		}, "1 full, 1 draining, 1 without slots, 1 free"},
		{"the reason that all unavailable ones share", []Worker{
			worker("a", 1, 0, arm).in(Unavailable, "disk full"), worker("b", 1, 0, arm).in(Unavailable, "disk full"),
		}, "2 unavailable (disk full)"},
		{"different reasons", []Worker{
			worker("a", 1, 0, arm).in(Unavailable, "disk full"), worker("b", 1, 0, arm).in(Unavailable, "no buildkitd"),
		}, "2 unavailable"},
		{"a hostile reason", []Worker{
			worker("a", 1, 0, arm).in(Unavailable, "a\nb\x1b\xff"+fmt.Sprintf("%0100d", 0)),
		}, "1 unavailable (a b" + fmt.Sprintf("%076d", 0) + "…)"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if got := Explain(test.workers, d); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestFleet(t *testing.T) {
	t.Parallel()
	amd := []string{"linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "linux/386"}
	arm := []string{"linux/arm64", "linux/arm/v7", "linux/arm/v6"}
	tests := []struct {
		name    string
		workers []Worker
		want    string
	}{
		{"empty", nil, "no workers"},
		{"base platforms", []Worker{
			worker("a", 1, 0, "linux/arm64"), worker("b", 1, 0, amd...), worker("c", 1, 0, amd...), worker("d", 1, 0, amd[3]),
		}, "linux/386 (1), linux/amd64 (2), linux/arm64 (1)"},
		{"variants without a base", []Worker{worker("a", 1, 0, arm...), worker("b", 1, 0, "linux/amd64/v3")},
			"linux/amd64/v3 (1), linux/arm/v6 (1), linux/arm/v7 (1), linux/arm64 (1)"},
		{"a platform listed twice", []Worker{worker("a", 1, 0, "linux/arm64", "linux/arm64")}, "linux/arm64 (1)"},
		{"nothing native", []Worker{worker("a", 1, 0)}, "workers without any platform (1)"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if got := Fleet(test.workers); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestWarmth_ForgetsWhatWasBuiltLeastRecently(t *testing.T) {
	t.Parallel()
	m := newWarmth(2)
	key := func(s string) Demand { return Demand{Key: s, Platform: platform("linux/arm64")} }
	m.record(key("a"), "w1")
	m.record(key("b"), "w2")
	m.record(key("a"), "w3")
	m.record(key("c"), "w4")
	m.record(key(""), "w5")
	other := key("a")
	other.Platform = platform("linux/amd64")
	for _, test := range []struct {
		demand Demand
		want   string
	}{{key("a"), "w3"}, {key("b"), ""}, {key("c"), "w4"}, {key(""), ""}, {other, ""}} {
		if got := m.worker(test.demand); got != test.want {
			t.Errorf("%v: got %q, want %q", test.demand, got, test.want)
		}
	}
	if want := map[string]int{"w3": 1, "w4": 1}; !maps.Equal(m.homes, want) {
		t.Errorf("workers are at home to %v projects, want %v", m.homes, want)
	}
	if len(m.entries) != 2 || m.recent.Len() != 2 {
		t.Errorf("%d entries, %d in order", len(m.entries), m.recent.Len())
	}
}
