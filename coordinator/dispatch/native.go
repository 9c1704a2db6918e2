package dispatch

import (
	"fmt"
	"slices"

	"github.com/containerd/platforms"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/split"
)

// mayExecute refuses definitions that would execute, on this leg's worker, what
// the worker does not run natively: BuildKit would emulate it, or fail oddly. What it
// may emulate passes. When other workers run it, the error is a misplacedError.
func (l *leg) mayExecute(refs []*gwpb.Ref) error {
	var foreign []split.Exec
	for _, ref := range refs {
		execs, err := split.Execs(ref.GetDef())
		if err != nil {
			return err
		}
		for _, e := range execs {
			if e.Platform != nil && !schedule.Runs(l.worker.Platforms, *e.Platform) && !l.emulates(*e.Platform) {
				foreign = append(foreign, e)
			}
		}
	}
	if len(foreign) == 0 {
		return nil
	}
	for _, e := range foreign {
		if !l.build.native(*e.Platform) && !l.build.farm.Scheduler.Emulates(l.build.wish(*e.Platform, "")) {
			return l.refusal(e)
		}
	}
	// What executes on the leg's own platform here may be what may run anywhere
	// ($BUILDPLATFORM), so that all of it is native there.
	return &misplacedError{platform: *foreign[0].Platform, refusal: l.refusal(foreign[0])}
}

// emulates tells whether the leg's worker may emulate a platform for it: what the leg
// was placed there for, or what no worker runs natively. The first time it says so in
// the build's progress.
func (l *leg) emulates(p ocispecs.Platform) bool {
	name := split.Leg{Platform: p}.String()
	if l.emulated && name == (split.Leg{Platform: l.demand.Platform}).String() {
		return true
	}
	d := l.build.wish(p, "")
	d.On = l.worker.Name
	if _, emulated := l.build.farm.Scheduler.Suits(l.worker.Name, d); !emulated {
		return false
	}
	l.build.mu.Lock()
	known := slices.Contains(l.further, name)
	if !known {
		l.further = append(l.further, name)
	}
	l.build.mu.Unlock()
	if !known {
		step := l.build.Progress.Step(progress.StepName(l.String(), fmt.Sprintf("steps for %s on worker %s (emulated: no native worker)", name, l.worker.Name)))
		step.Start()
		step.Done(nil)
		l.build.log.Info("leg emulates", "platform", l.String(), "emulated", name, "worker", l.worker.Name)
		l.build.farm.Metrics.emulates(l.label(), l.worker.Name)
	}
	return true
}

// refusal says why a step cannot execute where its leg is.
func (l *leg) refusal(e split.Exec) error {
	platform := split.Leg{Platform: *e.Platform}.String()
	step := progress.StepName(platform, e.Name)
	if l.build.native(*e.Platform) {
		return status.Errorf(codes.FailedPrecondition,
			"%q executes on %s, but its leg %s has steps for worker %s, which runs %s natively: one leg runs on one worker; write FROM --platform=$BUILDPLATFORM for a stage that may run anywhere",
			step, platform, l, l.worker.Name, platforms.FormatAll(l.worker.Platforms[0]))
	}
	err := l.build.farm.Scheduler.NoWorker(l.build.wish(*e.Platform, ""), step)
	err.Platform = platform
	return err
}
