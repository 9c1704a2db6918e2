package dispatch

import (
	"github.com/containerd/platforms"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// mayExecute refuses definitions that would execute, on this leg's worker, what
// the worker does not run natively: BuildKit would emulate it, or fail oddly. When
// other workers run it, the error is a misplacedError.
func (l *leg) mayExecute(refs []*gwpb.Ref) error {
	var foreign []split.Exec
	for _, ref := range refs {
		execs, err := split.Execs(ref.GetDef())
		if err != nil {
			return err
		}
		for _, e := range execs {
			if e.Platform != nil && !schedule.Runs(l.worker.Platforms, *e.Platform) {
				foreign = append(foreign, e)
			}
		}
	}
	if len(foreign) == 0 {
		return nil
	}
	for _, e := range foreign {
		if !l.build.farm.Scheduler.Native(*e.Platform) {
			return l.refusal(e)
		}
	}
	// What executes on the leg's own platform here may be what may run anywhere
	// ($BUILDPLATFORM), so that all of it is native there.
	return &misplacedError{platform: *foreign[0].Platform, refusal: l.refusal(foreign[0])}
}

// refusal says why a step cannot execute where its leg is.
func (l *leg) refusal(e split.Exec) error {
	farm := l.build.farm
	platform := split.Leg{Platform: *e.Platform}.String()
	step := progress.StepName(platform, e.Name)
	if farm.Scheduler.Native(*e.Platform) {
		return status.Errorf(codes.FailedPrecondition,
			"%q executes on %s, but its leg %s has steps for worker %s, which runs %s natively: one leg runs on one worker; write FROM --platform=$BUILDPLATFORM for a stage that may run anywhere",
			step, platform, l, l.worker.Name, platforms.FormatAll(l.worker.Platforms[0]))
	}
	return &build.NoWorkerError{Platform: platform, Step: step, Fleet: schedule.Fleet(farm.Scheduler.Snapshot())}
}
