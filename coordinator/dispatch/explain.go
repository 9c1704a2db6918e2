package dispatch

import (
	"context"
	"slices"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/identity"
)

// Explain says where the legs of a running build stand, in the order asked; none
// while its frontend has not said which there are. NotFound when no such build
// runs, or it is of a tenant whose builds the caller may not see.
func (bs *Builds) Explain(ctx context.Context, ref string) ([]schedule.Explanation, error) {
	bs.mu.Lock()
	b, ok := bs.builds[ref]
	ok = ok && !b.forgotten
	bs.mu.Unlock()
	if !ok || !identity.FromContext(ctx).MaySee(b.who.Tenant) {
		return nil, status.Errorf(codes.NotFound, "explaining build %s: no such build is running", ref)
	}
	return b.explain(), nil
}

// show makes legs, which have their tickets or a host, those that Explain tells of.
func (b *Build) show(legs ...*leg) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, l := range legs {
		if missing := l.index + 1 - len(b.shown); missing > 0 {
			b.shown = slices.Concat(b.shown, make([]*leg, missing))
		}
		b.shown[l.index] = l
	}
}

func (b *Build) explain() []schedule.Explanation {
	b.mu.Lock()
	legs := slices.Clone(b.shown)
	b.mu.Unlock()
	var out []schedule.Explanation
	for _, l := range legs {
		if l != nil {
			out = append(out, l.explain())
		}
	}
	return out
}

// explain says where the leg stands. What it runs in, when that is no slot of its own,
// the scheduler does not know.
func (l *leg) explain() schedule.Explanation {
	var e schedule.Explanation
	if l.ticket != nil {
		e = l.ticket.Explain(l.seat)
	}
	e.Platform = l.String()
	l.build.mu.Lock()
	begun := l.begun
	l.build.mu.Unlock()
	switch {
	case l.ending.Load():
		e.Worker, e.Summary = "", "it has ended"
	case !begun.IsZero():
		e.Worker = l.worker.Name
		e.Summary = "running on " + e.Worker + " for " + schedule.Lasting(time.Since(begun))
		if l.emulated {
			e.Summary += ", emulated"
		}
	case e.Worker != "":
		e.Summary = "starting on " + e.Worker
	}
	return e
}
