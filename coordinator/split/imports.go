package split

import (
	"encoding/json"
	"maps"
	"slices"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// ImportedCache is a cache in a registry that a frontend request imports: one that was
// exported there, or an image that has it inline.
type ImportedCache struct {
	Ref      string // as the client wrote it
	Insecure bool
}

// ImportedCaches lists them, each once. Errors are InvalidArgument.
func ImportedCaches(req *gwpb.SolveRequest) ([]ImportedCache, error) {
	listed, err := parseCacheImports(req.GetFrontendOpt()[optCacheImports])
	if err != nil {
		return nil, err
	}
	var out []ImportedCache
	for _, e := range slices.Concat(listed, req.GetCacheImports()) {
		insecure, ok := setting(e.GetAttrs(), attrInsecure, false)
		c := ImportedCache{Ref: e.GetAttrs()[attrRef], Insecure: insecure}
		if e.GetType() == typeRegistry && ok && !slices.Contains(out, c) {
			out = append(out, c)
		}
	}
	return out, nil
}

// Importing returns a frontend request of the leg with the caches by the names that they
// have for it: its own, of those that are kept per platform; and of images with inline
// caches, given their indexes, the platform's. Of an index, BuildKit imports every
// platform's cache as one of its own, and of those loses parts of one where they have a
// step in common. The request itself where nothing changes. Errors are InvalidArgument.
func (l Leg) Importing(req *gwpb.SolveRequest, images map[ImportedCache]ocispecs.Index) (*gwpb.SolveRequest, error) {
	listed, err := parseCacheImports(req.GetFrontendOpt()[optCacheImports])
	if err != nil {
		return nil, err
	}
	beside, changedBeside := l.imports(req.GetCacheImports(), images)
	listed, changed := l.imports(listed, images)
	if !changed && !changedBeside {
		return req, nil
	}
	out := Clone(req)
	out.CacheImports = beside
	if !changed {
		return out, nil
	}
	list, err := json.Marshal(listed)
	if err != nil {
		return nil, err
	}
	out.FrontendOpt[optCacheImports] = string(list)
	return out, nil
}

func (l Leg) imports(list []*gwpb.CacheOptionsEntry, images map[ImportedCache]ocispecs.Index) (out []*gwpb.CacheOptionsEntry, changed bool) {
	for _, e := range list {
		attrs := l.apartAttrs(e.GetType(), e.GetAttrs())
		if e.GetType() == typeRegistry {
			attrs = l.imageAttrs(attrs, images)
		}
		changed = changed || !maps.Equal(attrs, e.GetAttrs())
		out = append(out, &gwpb.CacheOptionsEntry{Type: e.GetType(), Attrs: attrs})
	}
	return out, changed
}

// imageAttrs are the attributes of the platform's image of an index.
func (l Leg) imageAttrs(attrs map[string]string, images map[ImportedCache]ocispecs.Index) map[string]string {
	insecure, _ := setting(attrs, attrInsecure, false)
	named, err := reference.ParseNormalizedNamed(attrs[attrRef])
	if err != nil || l.Unnamed() {
		return attrs
	}
	for _, d := range images[ImportedCache{attrs[attrRef], insecure}].Manifests {
		if d.Platform == nil || platforms.FormatAll(platforms.Normalize(*d.Platform)) != l.String() {
			continue
		}
		pinned, err := reference.WithDigest(reference.TrimNamed(named), d.Digest)
		if err != nil {
			return attrs
		}
		attrs = maps.Clone(attrs)
		attrs[attrRef] = pinned.String()
		return attrs
	}
	return attrs
}
