package job

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/store"
)

func TestPlan(t *testing.T) {
	t.Parallel()
	leg := func(platform string, s store.State) store.Leg {
		return store.Leg{Platform: platform, State: s, Error: map[bool]string{true: "broken"}[s == store.Failed]}
	}
	for _, tc := range []struct {
		scenario string
		job      store.Job
		want     next
	}{
		{"new", store.Job{State: store.Queued, Legs: []store.Leg{leg(amd64, store.Queued), leg(arm64, store.Queued)}}, next{do: doBuild, legs: []int{0, 1}}},
		{"one built", store.Job{State: store.Running, Legs: []store.Leg{leg(amd64, store.Succeeded), leg(arm64, store.Running)}}, next{do: doBuild, legs: []int{1}}},
		{"one failed, one open", store.Job{State: store.Running, Legs: []store.Leg{leg(amd64, store.Failed), leg(arm64, store.Queued)}}, next{do: doBuild, legs: []int{1}}},
		{"one failed", store.Job{State: store.Running, Legs: []store.Leg{leg(amd64, store.Failed), leg(arm64, store.Succeeded)}}, next{do: doEnd, state: store.Failed, err: amd64 + ": broken"}},
		{"built", store.Job{State: store.Running, Tags: []string{"a"}, Legs: []store.Leg{leg(amd64, store.Succeeded)}}, next{do: doPublish}},
		{"built, no tags", store.Job{State: store.Running, Legs: []store.Leg{leg(amd64, store.Succeeded)}}, next{do: doEnd, state: store.Succeeded}},
		{"cancelled", store.Job{State: store.Running, CancelRequested: true, Legs: []store.Leg{leg(amd64, store.Running)}}, next{do: doEnd, state: store.Cancelled}},
		{"publishing", store.Job{State: store.Publishing, Tags: []string{"a"}, Legs: []store.Leg{leg(amd64, store.Succeeded)}}, next{do: doResume}},
		{"ended", store.Job{State: store.Failed, Legs: []store.Leg{leg(amd64, store.Queued)}}, next{do: doRest}},
	} {
		t.Run(tc.scenario, func(t *testing.T) {
			t.Parallel()
			got := plan(tc.job)
			if got.do != tc.want.do || !slices.Equal(got.legs, tc.want.legs) || got.state != tc.want.state || got.err != tc.want.err {
				t.Errorf("plan is %+v, want %+v", got, tc.want)
			}
		})
	}
}

// crash ends a coordinator.
type crash struct{}

// world is what outlives crashes: the store, and the registry. It is driven by the
// same functions as the real work.
type world struct {
	*rapid.T
	job       store.Job // durable
	now       time.Time
	most      int
	crashes   int // left
	published []digest.Digest
	recorded  map[string]int // builds of a leg that were begun after its success was durable
}

func (w *world) step() {
	w.now = w.now.Add(time.Second)
	if w.crashes > 0 && rapid.IntRange(0, 3).Draw(w.T, "crash") == 0 {
		w.crashes--
		panic(crash{})
	}
	if w.job.State != store.Publishing && !w.job.State.Ended() && rapid.IntRange(0, 60).Draw(w.T, "cancel") == 0 {
		w.job.CancelRequested = true
	}
}

// coordinator runs the job until it has ended, or crashes.
func (w *world) coordinator() (crashed bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(crash); !ok {
				panic(r)
			}
			crashed = true
		}
	}()
	for {
		w.step()
		switch n := plan(w.job); n.do {
		case doRest:
			return false
		case doEnd:
			w.end(n.state)
		case doBuild:
			for _, i := range n.legs {
				w.build(i)
			}
		case doPublish:
			w.job.State = store.Publishing
			if w.job.CancelRequested {
				w.end(store.Cancelled)
				continue
			}
			w.publish()
		case doResume:
			if w.job.CancelRequested {
				w.end(store.Cancelled)
				continue
			}
			w.publish()
		}
	}
}

func (w *world) end(s store.State) {
	for _, l := range abandoned(w.job.Legs, "over", w.now) {
		w.set(l)
	}
	w.job.State = s
}

func (w *world) set(l store.Leg) {
	i := slices.IndexFunc(w.job.Legs, func(o store.Leg) bool { return o.Platform == l.Platform })
	w.job.Legs[i] = l
}

func (w *world) build(i int) {
	for {
		l := w.job.Legs[i]
		if tooOften(l) {
			w.set(givenUp(l, "too often", w.now))
			return
		}
		before := len(l.Attempts)
		if l.State == store.Succeeded {
			w.recorded[l.Platform]++
		}
		l, number := begun(l, "c", w.now)
		if len(l.Attempts) != before+1 || slices.ContainsFunc(l.Attempts[:before], func(a store.Attempt) bool { return a.Number >= number || a.Ended.IsZero() }) {
			w.Fatalf("attempts are %+v", l.Attempts)
		}
		w.set(l)
		w.step() // the build runs, and ends
		switch rapid.IntRange(0, 5).Draw(w.T, "outcome") {
		case 0:
			l = failed(l, codes.InvalidArgument, "broken", w.most, w.now)
		case 1, 2:
			l = failed(l, codes.Unavailable, "lost", w.most, w.now)
		default:
			var err error
			if l, err = succeeded(l, ocispecs.Descriptor{Digest: digest.FromString(l.Platform)}, w.now); err != nil {
				w.Fatal(err)
			}
		}
		w.step()
		w.set(l)
		w.step()
		if l.State.Ended() {
			return
		}
	}
}

func (w *world) publish() {
	all := ""
	for _, l := range w.job.Legs {
		d, err := descriptor(l)
		if err != nil || l.State != store.Succeeded || d.Digest == "" {
			w.Fatalf("published while a leg is %+v", l)
		}
		all += d.Digest.String()
	}
	w.step()
	w.published = append(w.published, digest.FromString(all))
	w.step()
	w.end(store.Succeeded)
}

func TestPlan_CrashesLoseNothingAndRepeatNothingNeedlessly(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := &world{
			T: t, now: time.Unix(1e9, 0), most: rapid.IntRange(1, 3).Draw(t, "max attempts"), crashes: rapid.IntRange(0, 30).Draw(t, "crashes"),
			recorded: map[string]int{}, job: store.Job{State: store.Queued, Tags: []string{"a"}},
		}
		for _, platform := range []string{amd64, arm64, "linux/riscv64"}[:rapid.IntRange(1, 3).Draw(t, "legs")] {
			w.job.Legs = append(w.job.Legs, store.Leg{Platform: platform, State: store.Queued})
		}
		for w.coordinator() {
		}
		w.check()
	})
}

func (w *world) check() {
	if len(w.recorded) > 0 {
		w.Errorf("legs were built again after they had succeeded: %v", w.recorded)
	}
	if len(slices.Compact(slices.Clone(w.published))) > 1 {
		w.Errorf("published are %v", w.published)
	}
	failures := 0
	for _, l := range w.job.Legs {
		if !l.State.Ended() || slices.ContainsFunc(l.Attempts, func(a store.Attempt) bool { return a.Ended.IsZero() }) {
			w.Errorf("the job is %s, a leg %+v", w.job.State, l)
		}
		if l.State == store.Failed {
			failures++
		}
		bad := 0
		for _, a := range l.Attempts {
			if a.Error != "" && a.Error != interruption && a.Error != "over" {
				bad++
			}
		}
		if l.Error == "lost" && bad != w.most {
			w.Errorf("it was given up after %d failures, not %d: %+v", bad, w.most, l)
		}
		if bad > w.most || len(l.Attempts) > w.most+maxInterruptions {
			w.Errorf("%d attempts of %d failed, of at most %d", bad, len(l.Attempts), w.most)
		}
	}
	switch w.job.State {
	case store.Succeeded:
		if failures > 0 || len(w.published) == 0 || w.job.CancelRequested {
			w.Errorf("it succeeded with %d failures, %d publications", failures, len(w.published))
		}
	case store.Failed:
		if failures == 0 || len(w.published) > 0 {
			w.Errorf("it failed with %d failures, %d publications", failures, len(w.published))
		}
	case store.Cancelled:
		if !w.job.CancelRequested || len(w.published) > 0 {
			w.Errorf("it was cancelled with %d publications", len(w.published))
		}
	default:
		w.Errorf("it is %s", w.job.State)
	}
}

func TestDescriptor_OfALegThatPushedNothing(t *testing.T) {
	t.Parallel()
	l, err := succeeded(store.Leg{}, ocispecs.Descriptor{}, time.Now())
	if err != nil || l.Descriptor != nil {
		t.Errorf("leg is %+v, %v", l, err)
	}
	raw, _ := json.Marshal(ocispecs.Descriptor{Digest: "sha256:1"})
	if d, err := descriptor(store.Leg{Descriptor: raw}); err != nil || d.Digest != "sha256:1" {
		t.Errorf("descriptor is %v, %v", d, err)
	}
}
