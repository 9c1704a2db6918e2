package dispatch_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
)

// legError checks that err says which worker was lost and for which leg.
func legError(t *testing.T, what string, err error, platform, worker string) {
	t.Helper()
	var leg *build.LegError
	var lost *build.LostError
	if !errors.As(err, &leg) || !errors.As(err, &lost) || leg.Platform != platform || leg.Worker != worker || status.Code(err) != codes.Unavailable {
		t.Errorf("%s: got %v (%v)", what, err, status.Code(err))
	}
}

func TestBuild_AWorkerThatIsLostIsNamedWithItsLeg(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		b, end := f.begin(t.Context(), t, request("b", both, ""))
		must(b.Solve(t.Context(), frontend(both)))(t)
		result := beside(func() error { _, err := b.Result(t.Context()); return err })
		synctest.Wait()
		arm.Cut()
		err := result(t)
		legError(t, "the build", err, arm64, "arm")
		_, callErr := b.Solve(t.Context(), frontend(both))
		legError(t, "a later call", callErr, arm64, "arm")
		end(err)
		f.idle(t, amd, arm)
	})
}

func TestBuild_AWorkerThatIsLostWhileItExportsIsNamedWithItsLeg(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		arm.Export = func(ctx context.Context) error { arm.Kill(); <-ctx.Done(); return ctx.Err() }
		b, end := f.begin(t.Context(), t, request("b", both, "registry/x:1"))
		_, err := b.Export(t.Context(), built(t, b))
		legError(t, "the build", err, arm64, "arm")
		end(err)
		f.idle(t, amd, arm)
	})
}
