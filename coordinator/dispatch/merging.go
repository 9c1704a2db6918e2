package dispatch

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	bksession "github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	sessionexporter "github.com/moby/buildkit/session/exporter"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/split"
)

// sessionTimeout is how long BuildKit's exporters wait for the client's session, too.
const sessionTimeout = 5 * time.Second

// prepareMerging makes the build capture what its legs export, where that is
// needed, and what they ask the client's session about exporters.
func (b *Build) prepareMerging(plan *split.ExportPlan) {
	if plan != nil && b.merge == nil && (plan.Captures() || b.req.GetEnableSessionExporter()) {
		b.merge = export.New(b.ctx, b.farm.Spool)
	}
}

// sessionExporters asks the client which further exporters it has for the result,
// once for all legs, and plans them, too. It returns the client's session, nil
// where no leg's exports are captured, and how many exporters there are more.
func (b *Build) sessionExporters(ctx context.Context, result *gwpb.Result) (bksession.Caller, int, error) {
	if b.merge == nil {
		return nil, 0, nil
	}
	client, err := b.session(ctx)
	if err != nil || !b.req.GetEnableSessionExporter() {
		return client, 0, err
	}
	var refs []string
	for _, ref := range split.RefsByKey(result) {
		if ref.GetId() != "" {
			refs = append(refs, ref.GetId())
		}
	}
	resp, err := sessionexporter.NewExporterClient(client.Conn()).FindExporters(client.Context(ctx), &sessionexporter.FindExportersRequest{Metadata: result.GetMetadata(), Refs: refs})
	if err != nil && !servesNone(err) {
		return nil, 0, err
	}
	all := slices.Clone(split.Exporters(b.req))
	for _, e := range resp.GetExporters() {
		all = append(all, &controlapi.Exporter{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	var legs []split.Leg
	for _, l := range b.running() {
		legs = append(legs, l.Leg)
	}
	b.exports, err = split.PlanExports(all, legs)
	return client, len(resp.GetExporters()), err
}

// session is the client's session that the exports go to.
func (b *Build) session(ctx context.Context) (bksession.Caller, error) {
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	client, err := b.farm.Sessions.Manager().Get(ctx, b.req.GetSession(), false)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return client, nil
}

// ClientStore is a content store of the client's session.
func (b *Build) ClientStore(ctx context.Context, name string) (content.Store, error) {
	client, err := b.session(ctx)
	if err != nil {
		return nil, err
	}
	return sessioncontent.NewCallerStore(client, name), nil
}

// servesNone tells whether a session has no exporters (BuildKit solver/llbsolver/export.go).
func servesNone(err error) bool {
	code := grpcerrors.Code(err)
	return code == codes.Unavailable || code == codes.Unimplemented
}

// beginMerging prepares for what the legs' workers send. Of the exporters, so many
// were found in the client's session, where the workers will ask for them.
func (b *Build) beginMerging(client bksession.Caller, found int, shares []share) {
	if b.merge == nil {
		return
	}
	begin := export.Beginning{Client: client, Exports: b.exports.Exports()}
	for _, s := range shares {
		part := export.Part{Leg: s.leg.index, Key: s.keys[0]}
		exporters := b.exports.Leg(s.leg.Leg)
		for _, e := range exporters[len(exporters)-found:] {
			part.Found = append(part.Found, &sessionexporter.ExporterRequest{Type: e.GetType(), Attrs: e.GetAttrs()})
		}
		begin.Parts = append(begin.Parts, part)
	}
	b.merge.Begin(begin)
}

// endMerging lets go of what was captured, once no leg runs any more.
func (b *Build) endMerging() {
	if b.merge == nil {
		return
	}
	if err := b.merge.Close(); err != nil {
		b.log.Warn("removing what was spooled of an export", "error", err)
	}
}

// blame finds out why the build failed, given the first error of a leg.
func (b *Build) blame(err error) error {
	if b.merge != nil {
		if fault := b.merge.Fault(); fault != nil {
			return fault
		}
	}
	return err
}

// Send gives the client an image that was merged from those of several legs.
func (b *Build) Send(ctx context.Context, a export.Archive) error { return b.merge.Send(ctx, a) }

// Finish tells the client's session what the build is answered, where the session
// has a say in the exports of several legs. Of one leg, its worker does that.
func (b *Build) Finish(ctx context.Context, response map[string]string) error {
	if b.merge == nil || !b.req.GetEnableSessionExporter() {
		return nil
	}
	client, err := b.session(ctx)
	if err != nil {
		return err
	}
	_, err = sessionexporter.NewExporterClient(client.Conn()).FinalizeExport(client.Context(ctx), &sessionexporter.FinalizeExportRequest{ExporterResponse: response})
	if err != nil && servesNone(err) {
		return nil
	}
	return err
}
