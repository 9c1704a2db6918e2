package worker

import (
	"sync"
	"testing"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"pgregory.net/rapid"
)

func TestSlots_CountWhatIsTakenAndTellEveryChange(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		total := rapid.IntRange(1, 4).Draw(r, "total")
		s := newSlots(total)
		var held, done []func()
		draining, down := false, false
		_, changed := s.report()
		check := func(want bool) {
			select {
			case <-changed:
				if !want {
					r.Fatal("told of a change that was none")
				}
			default:
				if want {
					r.Fatal("not told of a change")
				}
			}
			var report *archfarmv1.Report
			report, changed = s.report()
			if int(report.GetSlots().GetUsed()) != len(held) || int(report.GetSlots().GetTotal()) != total {
				r.Fatalf("reported %v, holding %d of %d", report, len(held), total)
			}
			if idle, _ := s.idle(); idle != (len(held) == 0) {
				r.Fatalf("idle %v, holding %d", idle, len(held))
			}
		}
		r.Repeat(map[string]func(*rapid.T){
			"take": func(r *rapid.T) {
				release, cause := s.take()
				may := !draining && !down && len(held) < total
				if (release != nil) != may {
					r.Fatalf("took %v (%s), want %v", release != nil, cause, may)
				}
				if may {
					held = append(held, release)
				}
				check(may)
			},
			"release": func(r *rapid.T) {
				if len(held) == 0 {
					r.Skip()
				}
				i := rapid.IntRange(0, len(held)-1).Draw(r, "which")
				held[i]()
				done = append(done, held[i])
				held = append(held[:i], held[i+1:]...)
				check(true)
			},
			"release again": func(r *rapid.T) {
				if len(done) == 0 {
					r.Skip()
				}
				rapid.SampledFrom(done).Draw(r, "which")()
				check(false)
			},
			"drain": func(*rapid.T) {
				s.drain()
				check(!draining)
				draining = true
			},
			"health": func(r *rapid.T) {
				next := rapid.Bool().Draw(r, "down")
				why := ""
				if next {
					why = "gone"
				}
				s.setUnavailable(why)
				check(next != down)
				down = next
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
