package history

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// gather copies what the record's results consist of: indexes, manifests,
// configurations, attestations. Layers stay with their workers, and so does what
// cannot be copied. It returns the extent of the record.
func (r *Recorder) gather(ctx context.Context) extent {
	ctx, cancel := context.WithTimeout(ctx, copyTimeout)
	defer cancel()
	g := &gathering{recorder: r, seen: map[digest.Digest]bool{}}
	for _, l := range r.outcome.legs {
		if slices.ContainsFunc(g.sources, func(s source) bool { return s.worker == l.Worker }) {
			continue
		}
		if conn, err := r.h.options.Workers.BuildKit(ctx, l.Worker); err == nil {
			g.sources = append(g.sources, source{worker: l.Worker, Provider: proxy.NewContentStore(contentapi.NewContentClient(conn))})
		}
	}
	g.extent.Legs = r.outcome.legs
	homes := g.homes(ctx)
	for _, d := range named(r.record) {
		g.take(ctx, Descriptor(d), homes, 0)
	}
	return g.extent
}

// homes tells which worker has which parts of what the legs exported: the image
// that was made of them names the parts, not the worker.
func (g *gathering) homes(ctx context.Context) map[digest.Digest]source {
	homes := map[digest.Digest]source{}
	for _, l := range g.recorder.legs {
		i := slices.IndexFunc(g.sources, func(s source) bool { return s.worker == l.Worker })
		if i < 0 || l.record == nil {
			continue
		}
		for _, info := range infos(l.record) {
			for _, d := range append(slices.Collect(maps.Values(info.GetResults())), info.GetAttestations()...) {
				desc := Descriptor(d)
				homes[desc.Digest] = g.sources[i]
				for _, child := range g.children(ctx, g.sources[i], desc).Manifests {
					homes[child.Digest] = g.sources[i]
				}
			}
		}
	}
	return homes
}

// parts are what an index or a manifest names.
type parts struct {
	Manifests []ocispecs.Descriptor `json:"manifests"`
	Config    ocispecs.Descriptor   `json:"config"`
	Layers    []ocispecs.Descriptor `json:"layers"`
}

// children returns what a blob names; nothing when it cannot be read.
func (g *gathering) children(ctx context.Context, from content.Provider, desc ocispecs.Descriptor) (p parts) {
	if !images.IsIndexType(desc.MediaType) && !images.IsManifestType(desc.MediaType) {
		return p
	}
	if raw, err := read(ctx, from, desc, maxJSON); err == nil && json.Unmarshal(raw, &p) != nil { // the exporter's business
		return parts{}
	}
	return p
}

// source is a worker that may have a blob.
type source struct {
	worker string
	content.Provider
}

type gathering struct {
	recorder *Recorder
	sources  []source
	seen     map[digest.Digest]bool
	extent   extent
}

// maxDepth bounds indexes of indexes.
const maxDepth = 4

// take copies a blob, and what it names in turn. Homes tells where to look.
func (g *gathering) take(ctx context.Context, desc ocispecs.Descriptor, homes map[digest.Digest]source, depth int) {
	if g.seen[desc.Digest] || desc.Digest.Validate() != nil {
		return
	}
	g.seen[desc.Digest] = true
	sources := g.sources
	if home, ok := homes[desc.Digest]; ok {
		sources = []source{home}
	}
	own := g.recorder.hold // from now on: the record that named it may go
	size, err := own.find(ctx, desc.Digest)
	if err != nil && g.fetch(ctx, desc, sources) {
		size, err = own.find(ctx, desc.Digest)
	}
	if err != nil {
		return
	}
	g.extent.Blobs = append(g.extent.Blobs, blob{Digest: desc.Digest, Size: size})
	if depth == maxDepth {
		return
	}
	named := g.children(ctx, own.blobs, desc)
	for _, child := range named.Manifests {
		g.take(ctx, child, homes, depth+1)
	}
	for _, part := range append(named.Layers, named.Config) {
		if len(sources) == 1 {
			homes[part.Digest] = sources[0]
		}
		if part.Digest == named.Config.Digest || strings.HasPrefix(part.MediaType, "application/vnd.in-toto") {
			g.take(ctx, part, homes, depth+1)
		} else {
			g.leave(ctx, part, sources)
		}
	}
}

// fetch copies a blob from the first worker that has it. What cannot be copied is
// left where it is.
func (g *gathering) fetch(ctx context.Context, desc ocispecs.Descriptor, sources []source) bool {
	if desc.Size <= maxCopy && len(g.extent.Blobs) < maxBlobs {
		for _, s := range sources {
			if g.recorder.copy(ctx, s, desc) == nil {
				return true
			}
		}
	}
	g.leave(ctx, desc, sources)
	return false
}

// leave notes which worker has a blob.
func (g *gathering) leave(ctx context.Context, desc ocispecs.Descriptor, sources []source) {
	if desc.Digest.Validate() != nil || len(g.extent.Places) >= 10*maxBlobs {
		return
	}
	for _, s := range sources {
		if len(sources) == 1 || has(ctx, s, desc) {
			g.extent.Places = append(g.extent.Places, place{Digest: desc.Digest, Worker: s.worker})
		}
	}
}

func has(ctx context.Context, s source, desc ocispecs.Descriptor) bool {
	ra, err := s.ReaderAt(ctx, desc)
	if err != nil {
		return false
	}
	_ = ra.Close()
	return true
}
