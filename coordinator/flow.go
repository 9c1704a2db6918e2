package coordinator

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/manifest"
)

// Solve is the way of a build: the request comes in; the client's frontend calls
// split it into legs, which are scheduled and dispatched to workers; the legs
// export, by digest only; their descriptors are collected and assembled into an
// index; the index is published. An error before that stops every leg, and no tag
// has moved; one while publishing tells which have.
func (c *coordinator) Solve(ctx context.Context, req *controlapi.SolveRequest) (response *controlapi.SolveResponse, err error) {
	counted := c.farm.Metrics.Begun()
	defer func() { counted(status.Code(err).String()) }()

	b, err := c.builds.Begin(ctx, req)
	if err != nil {
		c.farm.Sessions.Settle(ctx, req.GetSession())
		return nil, err
	}
	defer func() { c.builds.End(b, err) }()

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
	c.history.Add(req.GetRef(), b.Legs())
	if len(exported.Legs) == 0 { // one leg has exported everything itself, or there is no image
		return &controlapi.SolveResponse{ExporterResponse: exported.Response}, nil
	}
	image, err := c.assemble(b, exported)
	if err != nil {
		return nil, err
	}
	if err := c.publish(ctx, b, req.GetSession(), exported, image); err != nil {
		return nil, err
	}
	return answer(exported, image)
}

// assemble makes the legs' images one.
func (c *coordinator) assemble(b *dispatch.Build, exported *dispatch.Exported) (publish.Content, error) {
	if exported.Plain && len(exported.Legs) == 1 {
		return publish.Content{Descriptor: exported.Legs[0].Descriptor, Blob: exported.Legs[0].Blob}, nil
	}
	index, err := manifest.Assemble(exported.Legs, exported.Annotations)
	if err != nil {
		return publish.Content{}, err
	}
	step := b.Progress.Step(fmt.Sprintf("exporting manifest list %s", index.Descriptor.Digest))
	step.Start()
	step.Done(nil)
	return publish.Content{Descriptor: index.Descriptor, Blob: index.Blob}, nil
}

// publish points every name of the image at it, one after the other: when one
// cannot be moved, the error tells which names were.
func (c *coordinator) publish(ctx context.Context, b *dispatch.Build, session string, exported *dispatch.Exported, image publish.Content) error {
	registry := publish.Registry{Sessions: c.farm.Sessions.Manager(), Session: session, Insecure: exported.Publication.Insecure}
	for i, name := range exported.Publication.Names {
		step := b.Progress.Step("pushing manifest for " + name)
		step.Start()
		err := registry.Push(ctx, name, exported.Publication.ByDigest, image)
		step.Done(err)
		if err != nil {
			return publish.Partly(err, exported.Publication.Names[:i])
		}
	}
	return nil
}

// answer is what the client is told of an image that several legs made.
func answer(exported *dispatch.Exported, image publish.Content) (*controlapi.SolveResponse, error) {
	descriptor, err := json.Marshal(image.Descriptor)
	if err != nil {
		return nil, err
	}
	out := maps.Clone(exported.Response)
	delete(out, exptypes.ExporterImageConfigDigestKey) // an index has no configuration
	out[exptypes.ExporterImageDigestKey] = image.Descriptor.Digest.String()
	out[exptypes.ExporterImageDescriptorKey] = base64.StdEncoding.EncodeToString(descriptor)
	if exported.Publication.Name != "" {
		out[exptypes.ExporterImageNameKey] = exported.Publication.Name
	}
	return &controlapi.SolveResponse{ExporterResponse: out}, nil
}
