package dispatch

import (
	"cmp"
	"context"
	"maps"
	"slices"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

// Exported is the outcome of a build.
type Exported struct {
	// Response is what the client is told; of merged images, everything is still missing.
	Response map[string]string
	// Images are what several legs exported, in the order of the exporters.
	Images []Image
	// Caches are what several legs exported as caches, in the order of the exports.
	Caches []Cache
	// Metadata is the result's.
	Metadata map[string][]byte
}

// Image is what the legs made for one exporter.
type Image struct {
	split.Export
	// Legs are its parts, in the order of the result's platforms.
	Legs []manifest.Leg
	// Annotations of the index.
	Annotations manifest.Annotations
	// Plain tells that the client returned one reference without a platform, or that
	// there is one leg only: what that exported is the image, without an index around it.
	Plain bool
	// Config is the digest of a Plain image's configuration, if the leg told it.
	Config string
}

// share is a leg's part of the build's result.
type share struct {
	leg    *leg
	keys   []string // of its platforms
	result *gwpb.Result
}

// Export lets every leg finish with its part of the result. When one fails, the
// others are stopped and its error is returned; nothing has been tagged by then.
func (b *Build) Export(ctx context.Context, result *gwpb.Result) (*Exported, error) {
	if len(b.running()) == 0 && len(split.Exporters(b.req)) > 0 { // an empty result, to be exported all the same
		if _, err := b.legsOf(ctx, []split.Leg{{}}, false); err != nil {
			return nil, err
		}
	}
	if err := b.verify(ctx, result); err != nil {
		return nil, err
	}
	client, found, err := b.sessionExporters(ctx, result)
	if err != nil {
		return nil, err
	}
	shares, err := b.shares(result)
	if err != nil {
		return nil, err
	}
	b.beginMerging(client, found, shares)
	parts := make([]exported, len(shares))
	group, groupCtx := errgroup.WithContext(ctx)
	for i := range shares {
		group.Go(func() (err error) {
			parts[i], err = b.finish(groupCtx, &shares[i])
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, b.blame(err)
	}
	return b.collect(shares, parts, result)
}

// finish lets a leg export its share of the result, on as many workers as it takes.
func (b *Build) finish(ctx context.Context, s *share) (exported, error) {
	for {
		part, err := b.translate(s.leg, s.result)
		if err != nil {
			return exported{}, err
		}
		out, err := s.leg.result(ctx, part, b.exports)
		if err == nil {
			l := s.leg
			b.ending.Go(func() { l.end(nil) }) // its slot is free while others still run, and its status may lag
			return out, nil
		}
		if s.leg, err = b.goOn(ctx, s.leg, err); err != nil {
			return exported{}, err
		}
	}
}

// shares gives each leg its part of the result, in the order of the result's
// platforms. Legs that the client chose not to use are over.
func (b *Build) shares(result *gwpb.Result) ([]share, error) {
	metadata, err := b.exports.Metadata(result.GetMetadata())
	if err != nil {
		return nil, err
	}
	told := &gwpb.Result{Result: result.GetResult(), Metadata: metadata, Attestations: result.GetAttestations()}
	var shares []share
	for _, l := range b.running() {
		part, err := split.Part(told, func(key, ref string) bool { return b.owns(l, key, ref) })
		if err != nil {
			return nil, err
		}
		if part == nil {
			b.ending.Go(func() { l.end(nil) })
			continue
		}
		shares = append(shares, share{leg: l, keys: split.Keys(part), result: part})
	}
	order := split.Keys(result)
	slices.SortStableFunc(shares, func(a, b share) int {
		return cmp.Compare(slices.Index(order, a.keys[0]), slices.Index(order, b.keys[0]))
	})
	return shares, nil
}

// collect joins what the legs exported.
func (b *Build) collect(shares []share, parts []exported, result *gwpb.Result) (*Exported, error) {
	out := &Exported{Response: map[string]string{}, Metadata: result.GetMetadata()}
	for _, part := range slices.Backward(parts) { // what legs disagree on, the first decides
		maps.Copy(out.Response, part.response)
	}
	b.collectCaches(shares, parts, out)
	plain := split.Single(result)
	listed, err := listedPlatforms(result)
	if err != nil {
		return nil, err
	}
	for _, e := range b.exports.Exports() {
		if e.Sole {
			out.addSole(e, parts)
			continue
		}
		if !e.Indexed() || len(shares) == 0 {
			continue
		}
		image := Image{Export: e, Plain: plain, Annotations: indexAnnotations(e, result.GetMetadata())}
		for i, s := range shares {
			made, err := b.made(e, s.leg, parts[i])
			if err != nil {
				return nil, err
			}
			if made.Blob == nil {
				continue
			}
			image.Legs = append(image.Legs, s.image(made, listed))
			if plain {
				image.Config = made.Response[exptypes.ExporterImageConfigDigestKey]
			}
		}
		if len(image.Legs) > 0 {
			out.Images = append(out.Images, image)
		}
	}
	if len(out.Images) > 0 && !plain && !out.Images[0].Sole {
		for _, k := range []string{exptypes.ExporterImageDigestKey, exptypes.ExporterImageConfigDigestKey, exptypes.ExporterImageDescriptorKey, exptypes.ExporterImageNameKey} {
			delete(out.Response, k) // a leg's own
		}
	}
	return out, nil
}

// addSole adds what the only leg exported, if there is more to be done about it.
func (e *Exported) addSole(export split.Export, parts []exported) {
	for _, part := range parts {
		if made, ok := part.images[export.Exporter]; ok {
			e.Images = append(e.Images, Image{
				Export: export, Plain: true, Legs: []manifest.Leg{{Descriptor: made.Descriptor, Blob: made.Blob}},
			})
		}
	}
}

// listedPlatforms are those of a result, in its order; none where it holds a single
// reference.
func listedPlatforms(result *gwpb.Result) ([]exptypes.Platform, error) {
	if split.Single(result) {
		return nil, nil
	}
	listed, err := exptypes.ParsePlatforms(result.GetMetadata())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "reading the platforms of the build's result: %v", err)
	}
	return listed.Platforms, nil
}

// image is what the leg made, as a part of the whole: one image for each of its
// platforms, which need not be the one that it was started for.
func (s share) image(made export.Written, listed []exptypes.Platform) manifest.Leg {
	out := manifest.Leg{Platform: s.leg.Platform, Descriptor: made.Descriptor, Blob: made.Blob}
	for i, p := range listed {
		if !slices.Contains(s.keys, p.ID) {
			continue
		}
		if len(out.Positions) == 0 {
			out.Platform = p.Platform
		} else {
			out.Further = append(out.Further, p.Platform)
		}
		out.Positions = append(out.Positions, i)
	}
	return out
}

// made is what a leg made for an exporter.
func (b *Build) made(e split.Export, l *leg, part exported) (export.Written, error) {
	if e.Kind == split.KindArchive {
		return b.merge.Written(e.Exporter, l.index)
	}
	return part.images[e.Exporter], nil
}

// owns tells whether a reference of the client's result is the leg's: by the
// reference, or by the platform where that names an empty image.
func (b *Build) owns(l *leg, key, ref string) bool {
	if ref == "" {
		return key == l.key || len(b.running()) == 1
	}
	owner, _, err := b.owner(ref)
	return err == nil && owner == l
}

// indexAnnotations joins the client's annotations with those of the frontend's
// result, which win (BuildKit exporter/containerimage/export.go).
func indexAnnotations(e split.Export, metadata map[string][]byte) manifest.Annotations {
	out := manifest.Annotations{Index: maps.Clone(e.Index), IndexDescriptor: maps.Clone(e.IndexDescriptor)}
	for k, v := range metadata {
		a, ok, err := exptypes.ParseAnnotationKey(k)
		if !ok || err != nil { // a malformed one was an error to every leg's exporter already
			continue
		}
		switch a.Type {
		case exptypes.AnnotationIndex:
			out.Index[a.Key] = string(v)
		case exptypes.AnnotationIndexDescriptor:
			out.IndexDescriptor[a.Key] = string(v)
		}
	}
	return out
}

// Created is when the legs of an archive were done, as each of them notes on its
// image; empty when none does.
func (i Image) Created() string {
	var last string
	for _, l := range i.Legs { // RFC 3339, all in UTC
		last = max(last, l.Descriptor.Annotations[ocispecs.AnnotationCreated])
	}
	return last
}
