package split

import (
	"maps"
	"slices"
	"strconv"

	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/manifest"
)

// Attributes of cache exporters (BuildKit, cache/remotecache/registry and local).
const (
	attrRef           = "ref"
	attrDest          = "dest"
	attrImageManifest = "image-manifest"
	attrOCIMediatypes = "oci-mediatypes"
	attrInsecure      = "registry.insecure"
	attrIgnoreError   = "ignore-error"
)

// What BuildKit calls exports of caches that have a manifest.
const (
	exportToRegistry = "exporting cache to registry"
	exportToClient   = "exporting cache to client directory"
)

// ExportsCache tells whether a step of this name exports a cache that has a manifest.
func ExportsCache(step string) bool { return step == exportToRegistry || step == exportToClient }

// untagged stands for a digest that no cache has. A reference with it makes BuildKit's
// exporter push by digest only: the manifest that it writes is another one
// (containerd core/remotes/docker/pusher.go, getManifestPath).
var untagged = digest.FromString("the cache of one leg has no tag")

// CacheExport is a cache that several legs export, and of which the client gets one.
type CacheExport struct {
	// Ref is where it belongs in a registry, with a tag; empty for a client's folder.
	Ref string
	// Store is the content store of the client's session that it belongs to, else.
	Store string
	// Insecure allows plain HTTP and unknown certificates.
	Insecure bool
	// IgnoreError: the build does not fail when this does.
	IgnoreError bool
	Format      manifest.CacheFormat
	// Step is what BuildKit calls the export in its progress, and Nth which of the
	// request's exports of this name it is, from 0.
	Step string
	Nth  int
}

// CachePlan is how several legs export the caches that a client asked for: to registries
// by digest only, and to the client's folders without being listed there; then they are
// merged. Where that is not possible, platforms have names of their own.
type CachePlan struct {
	options *controlapi.CacheOptions
	exports []*controlapi.CacheOptionsEntry
	merged  map[int]CacheExport // by their places among exports
}

// PlanCaches plans the exports of several legs. What makes no sense is left as it is:
// each leg refuses it, in buildkitd's words.
func PlanCaches(c *controlapi.CacheOptions) *CachePlan {
	plan := &CachePlan{options: c, exports: cacheExports(c), merged: map[int]CacheExport{}}
	nth := map[string]int{}
	for i, e := range plan.exports {
		if out, ok := planCache(e); ok {
			out.Nth = nth[e.GetType()]
			plan.merged[i] = out
		}
		nth[e.GetType()]++
	}
	return plan
}

// cacheExports are a request's in today's form.
func cacheExports(c *controlapi.CacheOptions) []*controlapi.CacheOptionsEntry {
	ref := c.GetExportRefDeprecated() // clients before BuildKit 0.4 send it
	if ref == "" {
		return c.GetExports()
	}
	attrs := maps.Clone(c.GetExportAttrsDeprecated())
	if attrs == nil {
		attrs = map[string]string{}
	}
	attrs[attrRef] = ref
	return append(slices.Clone(c.GetExports()), &controlapi.CacheOptionsEntry{Type: typeRegistry, Attrs: attrs})
}

func planCache(e *controlapi.CacheOptionsEntry) (out CacheExport, ok bool) {
	attrs := e.GetAttrs()
	switch e.GetType() {
	case typeRegistry:
		out.Step = exportToRegistry
		named, err := reference.ParseNormalizedNamed(attrs[attrRef])
		if err != nil {
			return out, false
		}
		if _, digested := named.(reference.Digested); digested { // BuildKit pushes it by digest already
			return out, false
		}
		out.Ref = reference.TagNameOnly(named).String()
	case typeLocal:
		if attrs[attrDest] == "" {
			return out, false
		}
		out.Store, out.Step = "local:"+attrs[attrDest], exportToClient
	default:
		return out, false
	}
	oci, ociOK := setting(attrs, attrOCIMediatypes, true)
	image, imageOK := setting(attrs, attrImageManifest, oci)
	insecure, insecureOK := setting(attrs, attrInsecure, false)
	out.Format = manifest.CacheFormat{Image: image, Docker: !oci}
	out.Insecure = insecure && out.Ref != ""
	out.IgnoreError, _ = setting(attrs, attrIgnoreError, false) // what is none, BuildKit passes over
	return out, ociOK && imageOK && (insecureOK || out.Ref == "")
}

// setting reads an attribute; not ok when it is no flag.
func setting(attrs map[string]string, key string, unset bool) (value, ok bool) {
	text, set := attrs[key]
	if !set {
		return unset, true
	}
	value, err := strconv.ParseBool(text)
	return value, err == nil
}

// Leg returns what one leg is told of the caches.
func (p *CachePlan) Leg(l Leg) *controlapi.CacheOptions {
	if p.options == nil {
		return nil
	}
	out := &controlapi.CacheOptions{Imports: p.options.GetImports(), ImportRefsDeprecated: p.options.GetImportRefsDeprecated()}
	for i, e := range p.exports {
		attrs := l.apartAttrs(e.GetType(), e.GetAttrs())
		if ref := p.merged[i].Ref; ref != "" {
			attrs = maps.Clone(attrs)
			attrs[attrRef] = ref + "@" + untagged.String()
		}
		out.Exports = append(out.Exports, &controlapi.CacheOptionsEntry{Type: e.GetType(), Attrs: attrs})
	}
	return out
}

// Merged are the exports of which the legs make one cache each, in the order asked.
func (p *CachePlan) Merged() []CacheExport {
	if p == nil {
		return nil
	}
	var out []CacheExport
	for i := range p.exports {
		if e, ok := p.merged[i]; ok {
			out = append(out, e)
		}
	}
	return out
}

// Several tells whether a leg exports more than one cache that has a manifest: its answer
// names only the last one.
func (p *CachePlan) Several() bool {
	n := 0
	for _, e := range p.exports {
		if e.GetType() == typeRegistry || e.GetType() == typeLocal {
			n++
		}
	}
	return n > 1
}
