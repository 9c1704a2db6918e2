package dispatch

import (
	"github.com/containerd/platforms"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// mayExecute refuses a definition that would execute, on this leg's worker, what
// the worker does not run natively: BuildKit would emulate it, or fail oddly.
func (l *leg) mayExecute(def *pb.Definition) error {
	execs, err := split.Execs(def)
	if err != nil {
		return err
	}
	for _, e := range execs {
		if e.Platform != nil && !schedule.Runs(l.worker.Platforms, *e.Platform) {
			return l.refusal(e)
		}
	}
	return nil
}

// refusal says why a step cannot execute where its leg is.
func (l *leg) refusal(e split.Exec) error {
	farm := l.build.farm
	platform := split.Leg{Platform: *e.Platform}.String()
	step := progress.StepName(platform, e.Name)
	if farm.Scheduler.Native(*e.Platform) {
		return status.Errorf(codes.FailedPrecondition,
			"%q executes on %s, but its leg %s is on worker %s, which runs %s natively: this version of archfarm does not move legs; write FROM --platform=$BUILDPLATFORM for a stage that may run anywhere",
			step, platform, l, l.worker.Name, platforms.FormatAll(l.worker.Platforms[0]))
	}
	return &build.NoWorkerError{Platform: platform, Step: step, Fleet: schedule.Fleet(farm.Scheduler.Snapshot())}
}
