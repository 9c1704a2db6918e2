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
	typeRegistry    = "registry"
	typeLocal       = "local"
	// maxCacheImports bounds the caches that a build imports, and maxCacheBytes their list.
	maxCacheImports = 1000
	maxCacheBytes   = 1 << 20
	// maxTag is what the distribution specification allows.
	maxTag = 128
	// defaultCacheName is what BuildKit calls a cache in a store of several
	// (cache/remotecache: gha's scope, s3's and azblob's name).
	defaultCacheName = "buildkit"
	// plainPlatform is whose caches keep the client's name.
	plainPlatform = "linux/amd64"
)

// apartNames are the types whose caches are kept per platform, since nobody but the
// workers can read and write them; and the attribute that tells caches of a type apart.
var apartNames = map[string]string{"gha": "scope", "s3": "name", "azblob": "name"}

var notInTags = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

// suffix of the leg's own names.
func (l Leg) suffix() string {
	return "-" + strings.Trim(notInTags.ReplaceAllString(l.String(), "-"), "-")
}

// apartAttrs are the attributes of a cache by the name that it has for this leg: the
// client's with the platform appended, except for linux/amd64, whose caches one gets who
// does not know of all this. A leg asks for no other name: of two caches that a build
// imports, BuildKit loses parts of one where they have a step in common.
func (l Leg) apartAttrs(kind string, attrs map[string]string) map[string]string {
	key, ok := apartNames[kind]
	if !ok || l.Unnamed() || l.String() == plainPlatform {
		return attrs
	}
	out := maps.Clone(attrs)
	if out == nil {
		out = map[string]string{}
	}
	name := out[key]
	if name == "" {
		name = defaultCacheName
	}
	names := strings.Split(name, ";") // s3 takes several
	for i := range names {
		names[i] += l.suffix()
	}
	out[key] = strings.Join(names, ";")
	return out
}

// CacheExports returns where the only leg of a build exports its caches to.
func (l Leg) CacheExports(c *controlapi.CacheOptions) *controlapi.CacheOptions {
	exports := c.GetExports()
	if !slices.ContainsFunc(exports, func(e *controlapi.CacheOptionsEntry) bool { return apartNames[e.GetType()] != "" }) {
		return c
	}
	out := &controlapi.CacheOptions{
		Imports: c.GetImports(), ImportRefsDeprecated: c.GetImportRefsDeprecated(),
		ExportRefDeprecated: c.GetExportRefDeprecated(), ExportAttrsDeprecated: c.GetExportAttrsDeprecated(),
	}
	for _, e := range exports {
		out.Exports = append(out.Exports, &controlapi.CacheOptionsEntry{Type: e.GetType(), Attrs: l.apartAttrs(e.GetType(), e.GetAttrs())})
	}
	return out
}

// CacheRef is where a leg that is built on its own puts its share of a cache in a registry:
// the cache's reference with the platform appended to the tag. What is no tag, such as a
// malformed reference, stays: BuildKit says what it thinks of it.
func (l Leg) CacheRef(ref string) string { return withTagSuffix(ref, l.suffix()) }

func withTagSuffix(ref, suffix string) string {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return ref
	}
	tagged, ok := reference.TagNameOnly(named).(reference.NamedTagged)
	if !ok {
		return ref
	}
	out, err := reference.WithTag(reference.TrimNamed(named), withTagLimit(tagged.Tag()+suffix))
	if err != nil {
		return ref
	}
	return out.String()
}

// withTagLimit makes what is too long for a tag fit, by the hash of it.
func withTagLimit(tag string) string {
	if len(tag) <= maxTag {
		return tag
	}
	sum := digest.FromString(tag).Encoded()[:12]
	return tag[:maxTag-len(sum)-1] + "-" + sum
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
func (l Leg) FrontendRequest(req *gwpb.SolveRequest) *gwpb.SolveRequest {
	out := Clone(req)
	out.FrontendOpt = l.FrontendOpt(req.GetFrontendOpt())
	return out
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
