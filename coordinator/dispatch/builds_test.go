package dispatch_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestBuilds_FindWaitsForABuildThatIsAboutToBegin(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		found := func(patience time.Duration) func(t *testing.T) error {
			return beside(func() error {
				b, err := f.builds.Find(t.Context(), "b", patience)
				if err == nil && b == nil {
					return errors.New("found nothing")
				}
				return err
			})
		}
		status6, status3 := found(6*time.Second), found(3*time.Second)
		time.Sleep(2 * time.Second)
		b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t)
		for _, done := range []func(*testing.T) error{status6, status3, found(0)} {
			if err := done(t); err != nil {
				t.Error(err)
			}
		}
		f.builds.End(b, nil)
	})
}

func TestBuilds_FindGivesUp(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		begun := time.Now()
		if _, err := f.builds.Find(t.Context(), "b", 3*time.Second); status.Code(err) != codes.NotFound || time.Since(begun) != 3*time.Second {
			t.Errorf("got %v after %v", err, time.Since(begun))
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := f.builds.Find(ctx, "b", time.Hour); err == nil {
			t.Error("found what is not there")
		}
	})
}

// The patience of one who asks does not end with that of another.
func TestBuilds_FindIsToldAlsoWhenAnotherHasGivenUp(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		_ = beside(func() error { _, err := f.builds.Find(t.Context(), "b", 3*time.Second); return err })
		patient := beside(func() error { _, err := f.builds.Find(t.Context(), "b", 6*time.Second); return err })
		time.Sleep(4 * time.Second)
		b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t)
		if err := patient(t); err != nil {
			t.Error(err)
		}
		f.builds.End(b, nil)
	})
}

func TestBuilds_AReferenceIsTakenUntilItsBuildHasEnded(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		if _, err := f.builds.Begin(t.Context(), request("", amd64, "")); status.Code(err) != codes.InvalidArgument {
			t.Errorf("without a reference: %v", err)
		}
		for range 3 {
			b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t)
			if _, err := f.builds.Begin(t.Context(), request("b", amd64, "")); status.Code(err) != codes.AlreadyExists {
				t.Errorf("a second one: %v", err)
			}
			if got := must(f.builds.Find(t.Context(), "b", 0))(t); got != b {
				t.Error("the second one has replaced the first")
			}
			f.builds.End(b, nil)
			synctest.Wait()
			if got := must(f.builds.Find(t.Context(), "b", 0))(t); got != b {
				t.Error("it cannot be asked for its progress any more")
			}
		}
		time.Sleep(5 * time.Second)
		b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t)
		time.Sleep(time.Minute) // those before are forgotten, this is not
		if got := must(f.builds.Find(t.Context(), "b", 0))(t); got != b {
			t.Error("found another")
		}
		f.builds.End(b, nil)
		synctest.Wait()
		time.Sleep(time.Minute)
		if _, err := f.builds.Find(t.Context(), "b", 0); status.Code(err) != codes.NotFound {
			t.Errorf("a minute after its end: %v", err)
		}
	})
}

func TestBuilds_TheProgressOfABuildThatWasRefusedEnds(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		follow := beside(func() error {
			b, err := f.builds.Find(t.Context(), "b", 6*time.Second)
			if err != nil {
				return err
			}
			return b.Progress.Follow(t.Context(), func(s *controlapi.StatusResponse) error { return fmt.Errorf("progress: %v", s) })
		})
		if _, err := f.builds.Begin(t.Context(), request("b", "!", "")); status.Code(err) != codes.InvalidArgument {
			t.Errorf("got %v", err)
		}
		if err := follow(t); err != nil {
			t.Error(err)
		}
		b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t) // better this time
		f.builds.End(b, nil)
	})
}

func TestBuilds_NoMoreRunThanTheLimit(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.builds.Limit = 2
		a := must(f.builds.Begin(t.Context(), request("a", amd64, "")))(t)
		b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t)
		if _, err := f.builds.Begin(t.Context(), request("c", amd64, "")); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a third: %v", err)
		}
		if _, err := f.builds.Begin(t.Context(), request("b", amd64, "")); status.Code(err) != codes.AlreadyExists {
			t.Errorf("one that runs: %v", err)
		}
		f.builds.End(a, nil)
		c := must(f.builds.Begin(t.Context(), request("c", amd64, "")))(t)
		f.builds.End(b, nil)
		f.builds.End(c, nil)
	})
}

func TestBuilds_DrainTakesNothingNewAndWaitsForWhatRuns(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "amd", 1, amd64)
		b := must(f.builds.Begin(t.Context(), request("b", amd64, "")))(t)
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		enough := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		impatient := beside(func() error { return f.builds.Drain(ctx) })
		drained := beside(func() error { return f.builds.Drain(t.Context()) })
		synctest.Wait()
		if _, err := f.builds.Begin(t.Context(), request("c", amd64, "")); status.Code(err) != codes.Unavailable || !f.builds.Draining() {
			t.Errorf("a new build: %v", err)
		}
		must(b.Solve(t.Context(), frontend(amd64)))(t) // what runs goes on
		cancel(enough)
		if err := impatient(t); !errors.Is(err, enough) {
			t.Errorf("got %v", err)
		}
		f.builds.End(b, nil)
		if err := drained(t); err != nil {
			t.Error(err)
		}
	})
}

// End answers at once, whatever the build still has to say.
func TestBuilds_EndDoesNotWait(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		ctx, cancel := context.WithCancel(t.Context())
		b := must(f.builds.Begin(ctx, request("b", amd64, "")))(t)
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		begun := time.Now()
		f.builds.End(b, nil)
		cancel() // the request has its answer
		if d := time.Since(begun); d != 0 {
			t.Errorf("it took %v", d)
		}
		if err := f.builds.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		f.idle(t, d)
	})
}
