package split

import (
	"encoding/json"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	optCacheImports = "cache-imports"
	// maxCacheImports bounds the caches that a build imports, and maxCacheBytes their list.
	maxCacheImports = 1000
	maxCacheBytes   = 1 << 20
	// maxTag is what the distribution specification allows.
	maxTag = 128
	// defaultCacheName is what BuildKit calls a cache in a store of several
	// (cache/remotecache: gha's scope, s3's and azblob's name).
	defaultCacheName = "buildkit"
)

// cacheNames are the attributes that tell the caches of a type apart.
var cacheNames = map[string]string{"registry": "ref", "gha": "scope", "s3": "name", "azblob": "name"}

var notInTags = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// Cache returns where one leg of several exports its cache to, so that none
// overwrites another's: the first leg where the client said, the others beside it,
// under the same name with the platform appended. A local cache has but one name,
// and holds the first leg's.
func (l Leg) Cache(c *controlapi.CacheOptions, first bool) *controlapi.CacheOptions {
	if first || c == nil {
		return c
	}
	out := &controlapi.CacheOptions{Imports: c.GetImports(), ImportRefsDeprecated: c.GetImportRefsDeprecated()}
	exports := c.GetExports()
	if ref := c.GetExportRefDeprecated(); ref != "" { // clients before BuildKit 0.4 send it
		attrs := maps.Clone(c.GetExportAttrsDeprecated())
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs["ref"] = ref
		exports = append(slices.Clone(exports), &controlapi.CacheOptionsEntry{Type: "registry", Attrs: attrs})
	}
	for _, e := range exports {
		if e.GetType() != "local" {
			out.Exports = append(out.Exports, &controlapi.CacheOptionsEntry{Type: e.GetType(), Attrs: l.cacheAttrs(e.GetType(), e.GetAttrs())})
		}
	}
	return out
}

// CacheImports adds to the caches that a client names what Cache made of
// their names for this leg.
func (l Leg) CacheImports(imports []*gwpb.CacheOptionsEntry) []*gwpb.CacheOptionsEntry {
	var out []*gwpb.CacheOptionsEntry
	for _, e := range imports {
		if _, ok := cacheNames[e.GetType()]; ok {
			out = append(out, &gwpb.CacheOptionsEntry{Type: e.GetType(), Attrs: l.cacheAttrs(e.GetType(), e.GetAttrs())})
		}
		out = append(out, e)
	}
	return out
}

// cacheAttrs appends the platform to a cache's name.
func (l Leg) cacheAttrs(kind string, attrs map[string]string) map[string]string {
	key, ok := cacheNames[kind]
	if !ok {
		return attrs
	}
	out := maps.Clone(attrs)
	if out == nil {
		out = map[string]string{}
	}
	suffix := "-" + strings.Trim(notInTags.ReplaceAllString(l.String(), "-"), "-")
	if kind == "registry" {
		out[key] = withTagSuffix(out[key], suffix)
		return out
	}
	name := out[key]
	if name == "" {
		name = defaultCacheName
	}
	names := strings.Split(name, ";") // s3 takes several
	for i := range names {
		names[i] += suffix
	}
	out[key] = strings.Join(names, ";")
	return out
}

// withTagSuffix appends to a reference's tag. What is no tag, such as a malformed
// reference, stays: BuildKit says what it thinks of it.
func withTagSuffix(ref, suffix string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	tagged, ok := reference.TagNameOnly(named).(reference.NamedTagged)
	if !ok {
		return ref
	}
	tag := tagged.Tag() + suffix
	if len(tag) > maxTag {
		sum := digest.FromString(tag).Encoded()[:12]
		tag = tag[:maxTag-len(sum)-1] + "-" + sum
	}
	out, err := reference.WithTag(reference.TrimNamed(named), tag)
	if err != nil {
		return ref
	}
	return out.String()
}

// parseCacheImports reads the frontend's option of that name. Errors are
// InvalidArgument.
func parseCacheImports(list string) ([]*gwpb.CacheOptionsEntry, error) {
	if list == "" {
		return nil, nil
	}
	if len(list) > maxCacheBytes {
		return nil, status.Errorf(codes.InvalidArgument, "reading %s: %d bytes, at most %d are possible", optCacheImports, len(list), maxCacheBytes)
	}
	var imports []*gwpb.CacheOptionsEntry
	if err := json.Unmarshal([]byte(list), &imports); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "failed to unmarshal %s (%q): %v", optCacheImports, shorten(list, maxName), err)
	}
	if len(imports) > maxCacheImports {
		return nil, status.Errorf(codes.InvalidArgument, "reading %s: %d caches, at most %d are possible", optCacheImports, len(imports), maxCacheImports)
	}
	return imports, nil
}

// FrontendRequest returns a frontend request as one leg of several sends it.
// Errors are InvalidArgument.
func (l Leg) FrontendRequest(req *gwpb.SolveRequest) (*gwpb.SolveRequest, error) {
	out := Clone(req)
	out.FrontendOpt, out.CacheImports = l.FrontendOpt(req.GetFrontendOpt()), l.CacheImports(req.GetCacheImports())
	imports, err := parseCacheImports(req.GetFrontendOpt()[optCacheImports])
	if err != nil || imports == nil {
		return out, err
	}
	list, err := json.Marshal(l.CacheImports(imports))
	if err != nil {
		return nil, err
	}
	out.FrontendOpt[optCacheImports] = string(list)
	return out, nil
}

// Clone returns a copy of a frontend request of which every field, and every option,
// may be replaced.
func Clone(req *gwpb.SolveRequest) *gwpb.SolveRequest {
	return &gwpb.SolveRequest{
		Definition: req.GetDefinition(), Frontend: req.GetFrontend(), FrontendOpt: maps.Clone(req.GetFrontendOpt()),
		AllowResultReturn: req.GetAllowResultReturn(), AllowResultArrayRef: req.GetAllowResultArrayRef(),
		Final: req.GetFinal(), ExporterAttr: req.GetExporterAttr(), CacheImports: req.GetCacheImports(),
		FrontendInputs: req.GetFrontendInputs(), Evaluate: req.GetEvaluate(), SourcePolicies: req.GetSourcePolicies(),
	}
}
