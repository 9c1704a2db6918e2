package schedule

import (
	"slices"
	"testing"
	"time"

	"testing/synctest"
)

func TestForecast(t *testing.T) {
	t.Parallel()
	start := time.Unix(10_000, 0)
	s := func(seconds ...int) (out []time.Time) {
		for _, n := range seconds {
			out = append(out, start.Add(time.Duration(n)*time.Second))
		}
		return out
	}
	any2 := []int{0, 1}
	const never = -1 // in what is wanted: not known
	tests := map[string]struct {
		ends  map[int][]time.Time
		turns []turn
		want  []int
	}{
		"nothing is known":                 {nil, []turn{{eligible: any2}}, []int{never}},
		"the next slot":                    {map[int][]time.Time{0: s(40), 1: s(20)}, []turn{{eligible: any2}}, []int{20}},
		"one worker's is not known":        {map[int][]time.Time{0: s(40)}, []turn{{eligible: any2}}, []int{40}},
		"only its own workers' slots":      {map[int][]time.Time{0: s(40), 1: s(20)}, []turn{{eligible: []int{0}}}, []int{40}},
		"each takes the next":              {map[int][]time.Time{0: s(10, 30), 1: s(20)}, []turn{{eligible: any2}, {eligible: any2}, {eligible: any2}, {eligible: any2}}, []int{10, 20, 30, never}},
		"what is ahead gives back":         {map[int][]time.Time{0: s(10)}, []turn{{[]int{0}, 5 * time.Second}, {[]int{0}, 7 * time.Second}, {eligible: []int{0}}}, []int{10, 15, 22}},
		"what is ahead is new":             {map[int][]time.Time{0: s(10)}, []turn{{eligible: []int{0}}, {eligible: []int{0}}}, []int{10, never}},
		"what is ahead is new, of a few":   {map[int][]time.Time{0: s(10, 50)}, []turn{{eligible: []int{0}}, {eligible: []int{0}}}, []int{10, 50}},
		"a long one ahead, others pass":    {map[int][]time.Time{0: s(10), 1: s(20)}, []turn{{any2, time.Minute}, {any2, time.Second}, {any2, time.Second}}, []int{10, 20, 21}},
		"rivals that may go elsewhere, do": {map[int][]time.Time{0: s(30), 1: s(10)}, []turn{{any2, time.Hour}, {[]int{0}, time.Hour}, {eligible: []int{1}}}, []int{10, 30, 3610}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []int
			for _, at := range forecast(tt.ends, tt.turns) {
				if at.IsZero() {
					got = append(got, never)
					continue
				}
				got = append(got, int(at.Sub(start).Seconds()))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}

func TestPosition_Outdated(t *testing.T) {
	t.Parallel()
	at := func(seconds int) Position {
		return Position{Ahead: 1, Reason: "full", Estimate: time.Duration(seconds) * time.Second}
	}
	tests := map[string]struct {
		told, now Position
		since     time.Duration
		want      bool
	}{
		"nothing new":                   {at(0), at(0), time.Hour, false},
		"another position":              {at(40), Position{Reason: "full", Estimate: 40 * time.Second}, 0, true},
		"another reason":                {at(40), Position{Ahead: 1, Reason: "draining", Estimate: 40 * time.Second}, 0, true},
		"the first estimate":            {at(0), at(40), 0, true},
		"time goes by":                  {at(40), at(10), 30 * time.Second, false},
		"a little later":                {at(40), at(29), 30 * time.Second, false},
		"half as long again":            {at(40), at(30), 30 * time.Second, true},
		"half of it already":            {at(40), at(10), 10 * time.Second, true},
		"seconds are no news":           {at(1), at(2), 0, false},
		"it takes a little longer":      {at(40), at(0), 50 * time.Second, false},
		"it takes longer than was said": {at(40), at(0), 60 * time.Second, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := tt.told.outdated(tt.now, tt.since); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}

// history builds each project once on a farm, which takes it that long.
func history(t *testing.T, s *Scheduler, projects map[string]time.Duration) {
	t.Helper()
	for key, takes := range projects {
		ticket := queueProject(t, s, key)
		wait(t.Context(), ticket, 0)
		time.Sleep(takes)
		ticket.Release(0)
		ticket.Close()
	}
}

func queueProject(t *testing.T, s *Scheduler, key string) *Ticket {
	t.Helper()
	ticket, err := s.Enqueue([]Demand{{Platform: platform(arm64), Key: key}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ticket.Close)
	return ticket
}

// told checks the last of the positions that a wait was told, and how many they were.
func (w *waiting) told(t *testing.T, times int, want Position) {
	t.Helper()
	positions := w.look().positions
	if len(positions) != times || positions[len(positions)-1] != want {
		t.Fatalf("told %+v; want %+v as the last of %d", positions, want, times)
	}
}

func TestScheduler_WhoWaitsIsToldForHowLong(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64))
		history(t, s, map[string]time.Duration{"long": 40 * time.Second, "short": 10 * time.Second})
		running, next, last := queueProject(t, s, "long"), queueProject(t, s, "short"), queueProject(t, s, "new")
		wait(t.Context(), running, 0).on(t, "a")
		w := wait(t.Context(), next, 0)
		w.told(t, 1, Position{Reason: "linux/arm64: 1 full", Estimate: 40 * time.Second})
		wLast := wait(t.Context(), last, 0)
		wLast.told(t, 1, Position{Ahead: 1, Reason: "linux/arm64: 1 full", Estimate: 50 * time.Second})
		if q := s.Queue(); len(q) != 2 || q[1].Estimate != 50*time.Second {
			t.Errorf("the queue says %+v", q)
		}
		if e := last.Explain(0); e.Summary != "waiting 0 s: a frees up in about 40 s; 1 leg comes first, so that it starts in about 50 s" {
			t.Errorf("explained as %q", e.Summary)
		}
		// A newcomer would be behind one that nothing is known of.
		if e := s.Explain(Demand{Platform: platform(arm64)}); e.Summary != "would wait: a frees up in about 40 s; 2 legs come first" {
			t.Errorf("a newcomer is told %q", e.Summary)
		}

		time.Sleep(39 * time.Second)
		s.Update([]Worker{worker("a", 1, 0, arm64), worker("b", 1, 0, amd64)}) // somebody has a look
		synctest.Wait()
		w.told(t, 1, Position{Reason: "linux/arm64: 1 full", Estimate: 40 * time.Second}) // as it was said
		time.Sleep(time.Second)
		running.Release(0)
		synctest.Wait()
		w.on(t, "a")
		time.Sleep(announceEvery)
		wLast.told(t, 2, Position{Reason: "linux/arm64: 1 full", Estimate: 10 * time.Second})
		last.Close()
		next.Close()
	})
}

// TestScheduler_AnEstimateThatProvesWrongIsTakenBack without any event that would wake who waits.
func TestScheduler_AnEstimateThatProvesWrongIsTakenBack(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64))
		history(t, s, map[string]time.Duration{"p": 40 * time.Second})
		wait(t.Context(), queueProject(t, s, "p"), 0).on(t, "a")
		w := wait(t.Context(), queueProject(t, s, "p"), 0)
		time.Sleep(59 * time.Second)
		synctest.Wait()
		w.told(t, 1, Position{Reason: "linux/arm64: 1 full", Estimate: 40 * time.Second})
		time.Sleep(time.Second)
		synctest.Wait()
		w.told(t, 2, Position{Reason: "linux/arm64: 1 full"})
		time.Sleep(time.Hour)
		synctest.Wait()
		w.told(t, 2, Position{Reason: "linux/arm64: 1 full"})
	})
}

// TestScheduler_LegsFarBehindAreNotTold, since an estimate of a hundred estimates is none.
func TestScheduler_LegsFarBehindAreNotTold(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 1, 0, arm64), worker("b", 1, 1, amd64))
		history(t, s, map[string]time.Duration{"p": time.Minute})
		for range foreseen + 2 {
			queueProject(t, s, "p")
		}
		enqueue(t, s, amd64) // which does not compete
		q := s.Queue()
		for i, l := range q[:foreseen] {
			if want := time.Duration(i+1) * time.Minute; l.Estimate != want || l.Ahead != i {
				t.Fatalf("leg %d, with %d ahead: %s, want %s", i, l.Ahead, l.Estimate, want)
			}
		}
		if q[foreseen].Estimate != 0 || q[foreseen+1].Estimate != 0 {
			t.Errorf("estimated %s, %s", q[foreseen].Estimate, q[foreseen+1].Estimate)
		}
	})
}

// TestScheduler_SlotsThatAreNoMoreFreeNobodys: a worker that takes fewer attempts than it runs.
func TestScheduler_SlotsThatAreNoMoreFreeNobodys(t *testing.T) {
	bubble(t, func(t *testing.T) {
		s := old(worker("a", 2, 0, arm64))
		history(t, s, map[string]time.Duration{"p": time.Minute})
		first := queueProject(t, s, "p")
		wait(t.Context(), first, 0).on(t, "a")
		time.Sleep(20 * time.Second)
		wait(t.Context(), queueProject(t, s, "p"), 0).on(t, "a")
		s.Update([]Worker{worker("a", 1, 2, arm64)})
		wait(t.Context(), queueProject(t, s, "p"), 0).told(t, 1, Position{Reason: "linux/arm64: 1 full", Estimate: time.Minute})
	})
}

func TestPosition_String(t *testing.T) {
	t.Parallel()
	for want, p := range map[string]Position{
		"position 1 in the queue: linux/arm64: 1 full":                         {Reason: "linux/arm64: 1 full"},
		"position 3 in the queue, starts in about 40 s: linux/arm64: 2 full":   {Ahead: 2, Reason: "linux/arm64: 2 full", Estimate: 40 * time.Second},
		"position 12 in the queue, starts in about 2 min: linux/arm64: 2 full": {Ahead: 11, Reason: "linux/arm64: 2 full", Estimate: 2 * time.Minute},
	} {
		if got := p.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
