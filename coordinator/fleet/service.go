package fleet

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/edit"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// ListWorkers implements FleetService: a client sees the workers of the pools that
// it may use.
func (f *Fleet) ListWorkers(ctx context.Context, _ *archfarmv1.ListWorkersRequest) (*archfarmv1.ListWorkersResponse, error) {
	who := identity.FromContext(ctx)
	response := &archfarmv1.ListWorkersResponse{}
	for _, w := range f.Workers() {
		if w.VisibleTo(who) {
			response.Workers = append(response.Workers, w.describe())
		}
	}
	return response, nil
}

// ChangeWorker implements FleetService: it has the agent drain, cordon or uncordon
// its worker, which holds for all coordinators.
func (f *Fleet) ChangeWorker(ctx context.Context, req *archfarmv1.ChangeWorkerRequest) (*archfarmv1.ChangeWorkerResponse, error) {
	who, name, change := identity.FromContext(ctx), req.GetName(), req.GetChange()
	if !who.Operates() {
		return nil, status.Errorf(codes.PermissionDenied, "changing worker %s: %s may not take workers out of service; use a certificate for administrators, or the coordinator's own machine", text(name), who)
	}
	verb, known := verbs[change.GetAction()]
	if !known {
		return nil, status.Errorf(codes.InvalidArgument, "changing worker %s: the action must be drain, cordon or uncordon", text(name))
	}
	w, attached := f.Worker(name)
	if !attached {
		return nil, status.Errorf(codes.NotFound, "%s worker %s: no worker of that name is attached%s", verb, text(name), f.hint(name))
	}
	order := &archfarmv1.WorkerChange{Action: change.GetAction(), Reason: text(change.GetReason())}
	if err := w.Direct(ctx, &archfarmv1.Directive{Action: &archfarmv1.Directive_Change{Change: order}}); err != nil {
		return nil, status.Errorf(status.Code(err), "%s worker %s: %s", verb, name, status.Convert(err).Message())
	}
	f.log.Info("worker changed by an operator", "worker", name, "action", verb, "by", who.String(), "reason", order.GetReason())
	return &archfarmv1.ChangeWorkerResponse{Worker: w.describe()}, nil
}

// verbs are what the actions are called in errors.
var verbs = map[archfarmv1.WorkerChange_Action]string{
	archfarmv1.WorkerChange_ACTION_DRAIN: "draining", archfarmv1.WorkerChange_ACTION_CORDON: "cordoning", archfarmv1.WorkerChange_ACTION_UNCORDON: "uncordoning",
}

// VisibleTo tells whether somebody may know of the worker: operators of every one,
// and clients of those in the pools that they may use.
func (w *Worker) VisibleTo(who identity.Identity) bool { return who.Operates() || who.MayUse(w.Pool) }

// describe is the worker as FleetService tells of it.
func (w *Worker) describe() *archfarmv1.Worker {
	now := w.now.Load()
	return &archfarmv1.Worker{
		Name: w.Name, Platforms: w.platformNames, Slots: &archfarmv1.Slots{Total: now.report.GetSlots().GetTotal(), Used: now.report.GetSlots().GetUsed()},
		State: now.report.GetState(), Reason: now.report.GetReason(), Version: w.Version, BuildkitVersion: w.BuildKitVersion,
		Machine: w.Machine, Since: timestamppb.New(w.Since), Pool: w.Pool, Labels: w.Labels, Emulated: formatAll(now.emulated), Load: now.report.GetLoad(),
	}
}

// hint names workers that may have been meant: those called alike, else the first few.
func (f *Fleet) hint(name string) string {
	const most = 3
	type candidate struct {
		name     string
		distance int
	}
	var alike []candidate
	workers := f.Workers()
	for _, w := range workers {
		a, b := strings.ToLower(name[:min(len(name), maxNameLength)]), strings.ToLower(w.Name)
		distance := edit.Distance(a, b)
		if distance <= 2 || a != "" && strings.Contains(b, a) {
			alike = append(alike, candidate{w.Name, distance})
		}
	}
	slices.SortStableFunc(alike, func(a, b candidate) int { return cmp.Compare(a.distance, b.distance) })
	var names []string
	for _, c := range alike[:min(len(alike), most)] {
		names = append(names, c.name)
	}
	switch {
	case len(names) > 0:
		return "; did you mean " + strings.Join(names, " or ") + "?"
	case len(workers) == 0:
		return "; no worker is"
	case len(workers) <= most:
		for _, w := range workers {
			names = append(names, w.Name)
		}
		return "; attached are: " + strings.Join(names, ", ")
	}
	return `; "archfarm workers" lists them`
}
