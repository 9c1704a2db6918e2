package dispatch

import (
	"context"
	"maps"
	"slices"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

// Exported is the outcome of a build.
type Exported struct {
	// Response is what the client is told; of an image, its digest is still missing.
	Response map[string]string
	// Legs are the parts of the image, in the order asked, when several legs
	// exported one, and Publication says what to do with their index.
	Legs        []manifest.Leg
	Publication split.Publication
	// Annotations of the index.
	Annotations manifest.Annotations
	// Plain tells that the client returned one reference without a platform: what
	// its leg exported is the image, without an index around it.
	Plain bool
}

// Export lets every leg finish with its part of the result. When one fails, the
// others are stopped and its error is returned; nothing has been tagged by then.
func (b *Build) Export(ctx context.Context, result *gwpb.Result) (*Exported, error) {
	if len(b.running()) == 0 && len(split.Exporters(b.req)) > 0 { // an empty result, to be exported all the same
		if _, err := b.legsOf(ctx, []split.Leg{{}}, false); err != nil {
			return nil, err
		}
	}
	legs := b.running()
	publication, image := b.exports.Publication()
	parts := make([]*exported, len(legs))
	group, groupCtx := errgroup.WithContext(ctx)
	for i, l := range legs {
		group.Go(func() error {
			part, err := split.Part(result, func(key, ref string) bool { return b.owns(l, key, ref) })
			if err != nil {
				return err
			}
			if part == nil { // the client chose not to use this leg
				l.end(nil)
				return nil
			}
			out, err := l.result(groupCtx, part, image)
			if err != nil {
				return err
			}
			parts[i] = &out
			b.ending.Go(func() { l.end(nil) }) // its slot is free while others still run, and its status may lag
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return collect(parts, publication, image, result), nil
}

// collect joins what the legs exported.
func collect(parts []*exported, publication split.Publication, image bool, result *gwpb.Result) *Exported {
	out := &Exported{Response: map[string]string{}}
	for _, part := range slices.Backward(parts) { // what legs disagree on, the first decides
		if part == nil {
			continue
		}
		for k, v := range part.response {
			out.Response[k] = v
		}
		if image {
			out.Legs = append([]manifest.Leg{part.leg}, out.Legs...)
		}
	}
	if image {
		out.Publication = publication
		out.Annotations = indexAnnotations(publication, result.GetMetadata())
		out.Plain = split.Single(result)
	}
	return out
}

// owns tells whether a reference of the client's result is the leg's: by the
// reference, or by the platform where that names an empty image.
func (b *Build) owns(l *leg, key, ref string) bool {
	if ref == "" {
		return key == l.key || len(b.running()) == 1
	}
	owner, err := b.owner(ref)
	return err == nil && owner == l
}

// indexAnnotations joins the client's annotations with those of the frontend's
// result, which win (BuildKit exporter/containerimage/export.go).
func indexAnnotations(p split.Publication, metadata map[string][]byte) manifest.Annotations {
	out := manifest.Annotations{Index: maps.Clone(p.Index), IndexDescriptor: maps.Clone(p.IndexDescriptor)}
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
