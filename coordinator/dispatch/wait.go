package dispatch

import (
	"fmt"

	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/schedule"
)

// placing shows a leg's way to its worker as steps of the build: the wait, if
// there is one, and where it ended.
type placing struct {
	leg   *leg
	queue *progress.Step // nil as long as the leg has not waited
	tried []*leg         // that would have lent their slots, in vain
}

func (p *placing) step(name string) *progress.Step {
	s := p.leg.build.Progress.Step(progress.StepName(p.leg.String(), name))
	s.Start()
	return s
}

// queued is called whenever the leg's place in the queue changes.
func (p *placing) queued(at schedule.Position) {
	if p.queue == nil {
		name := "queued for a worker"
		if lost := p.leg.lostOn; len(lost) > 0 {
			name = "worker " + lost[len(lost)-1] + " was lost; " + name
		}
		p.queue = p.step(name)
	}
	p.queue.Log(at.String() + "\n")
	p.leg.build.log.Info("leg queued", "platform", p.leg.String(), "position", at.Ahead+1, "reason", at.Reason, "estimate", at.Estimate)
}

// assigned tells which worker, and why that one. A build of one leg that did not
// have to wait shows nothing that a buildkitd would not, unless it is emulated.
func (p *placing) assigned(a schedule.Assignment) {
	if p.queue != nil {
		p.queue.Done(nil)
	}
	if a.Emulated {
		p.leg.build.farm.Metrics.emulates(p.leg.label(), a.Worker)
	}
	if lost := p.leg.lostOn; len(lost) > 0 {
		p.step(fmt.Sprintf("worker %s was lost; continuing on %s (attempt %d of %d)", lost[len(lost)-1], a.Worker, len(lost)+1, p.leg.build.farm.Attempts)).Done(nil)
	} else if p.queue != nil || p.leg.split || a.Emulated {
		p.step(fmt.Sprintf("assigned to worker %s (%s)", a.Worker, a.Why)).Done(nil)
	}
	p.leg.build.log.Info("leg assigned", "platform", p.leg.String(), "worker", a.Worker, "why", a.Why, "waited", a.Waited)
	p.leg.build.farm.Metrics.waited(p.leg.label(), a.Waited)
}

// failed tells why no worker was found.
func (p *placing) failed(err error) {
	if p.queue == nil {
		p.queue = p.step("choosing a worker")
	}
	p.queue.Done(err)
}
