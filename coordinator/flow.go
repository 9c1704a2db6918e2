package coordinator

import (
	"context"
	"fmt"
	"maps"

	controlapi "github.com/moby/buildkit/api/services/control"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/split"
)

// Solve is the way of a build: the request comes in; the client's frontend calls
// split it into legs, which are scheduled and dispatched to workers; the legs
// export, into registries by digest only; their descriptors are collected and
// assembled into indexes, which go to the client or are published; their caches are merged. An error before
// that stops every leg, and no tag has moved; one while publishing tells which have.
func (c *coordinator) Solve(ctx context.Context, req *controlapi.SolveRequest) (response *controlapi.SolveResponse, err error) {
	counted := c.farm.Metrics.Begun()
	defer func() { counted(status.Code(err).String()) }()

	b, err := c.builds.Begin(ctx, req)
	if err != nil {
		c.farm.Sessions.Settle(ctx, req.GetSession())
		return nil, err
	}
	rec := c.history.Begin(ctx, req, split.Exporters(req), b.Progress)
	defer func() {
		rec.Complete(legsOf(b), asStatus(ctx, err))
		c.builds.End(b, err)
	}()

	result, err := b.Result(ctx)
	if err != nil {
		return nil, err
	}
	exported, err := b.Export(ctx, result)
	if err != nil {
		return nil, err
	}
	if len(b.Legs()) == 0 { // the probe that buildx sends first is over before its session is open
		c.farm.Sessions.Settle(ctx, req.GetSession())
	}
	rec.Built(ctx, legsOf(b), result.GetMetadata())
	if err := c.mergeCaches(ctx, b, req, exported); err != nil {
		return nil, err
	}
	images, err := c.assemble(b, exported)
	if err != nil {
		return nil, err
	}
	for _, i := range images {
		if !i.Sole { // a single leg's own record has it
			rec.Image(i.Exporter, i.Descriptor, i.Blob)
		}
	}
	if err := c.send(ctx, b, images); err != nil {
		return nil, err
	}
	if err := c.publish(ctx, b, req, images); err != nil {
		return nil, err
	}
	response = answer(exported, images)
	if err := b.Finish(ctx, response.GetExporterResponse()); err != nil {
		return nil, err
	}
	return response, nil
}

// assemble makes the legs' images one, for each exporter that several legs had a
// part in.
func (c *coordinator) assemble(b *dispatch.Build, exported *dispatch.Exported) ([]image, error) {
	var images []image
	for _, made := range exported.Images {
		i, err := assemble(made, exported.Metadata)
		if err != nil {
			return nil, err
		}
		if !made.Plain {
			step := b.Progress.Step(fmt.Sprintf("exporting manifest list %s", i.Descriptor.Digest))
			step.Start()
			step.Done(nil)
		}
		images = append(images, i)
	}
	return images, nil
}

// send gives the client the images that it wants as files.
func (c *coordinator) send(ctx context.Context, b *dispatch.Build, images []image) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, i := range images {
		if i.Kind != split.KindArchive {
			continue
		}
		step := b.Progress.Step(i.step())
		group.Go(func() error {
			step.Start()
			err := b.Send(ctx, i.archive())
			step.Done(err)
			return err
		})
	}
	return group.Wait()
}

// publish points every name of the images at them, as the tag policy allows: when one
// cannot be moved, the error tells which names were.
func (c *coordinator) publish(ctx context.Context, b *dispatch.Build, req *controlapi.SolveRequest, images []image) error {
	var done []string
	for _, i := range images {
		if i.Kind == split.KindPushed {
			pushed := c.publication(ctx, req, i)
			pushed.Pushed = true
			c.note(ctx, b, pushed)
			continue
		}
		if i.Kind != split.KindImage || len(i.publication.Names) == 0 {
			continue
		}
		if err := c.publisher.Publish(ctx, c.publication(ctx, req, i), observer{b}); err != nil {
			return publish.Partly(err, done)
		}
		done = append(done, i.publication.Names...)
	}
	return nil
}

// note has the ledger know the tags that a worker has pushed itself, and tells the client
// what the policy would rather not have had. The tags are what they are: the build does
// not fail.
func (c *coordinator) note(ctx context.Context, b *dispatch.Build, pushed publish.Request) {
	if err := c.publisher.Publish(ctx, pushed, asides{b}); err != nil {
		c.log.Warn("noting tags that a worker has pushed", "build", pushed.Build, "names", pushed.Names, "error", err)
		observer{b}.Warn(fmt.Sprintf("the ledger of tags does not know of this push: %s", build.Message(err)))
	}
}

// answer is what the client is told: of several exporters' images, as buildkitd
// does it, the last one's.
func answer(exported *dispatch.Exported, images []image) *controlapi.SolveResponse {
	out := maps.Clone(exported.Response)
	for _, i := range images {
		maps.Copy(out, i.response)
	}
	return &controlapi.SolveResponse{ExporterResponse: out}
}
