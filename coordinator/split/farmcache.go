package split

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
)

const (
	fieldRepository = "{{.Repository}}"
	// maxCacheRepository bounds, in bytes, what stands for the repository in the name of a
	// cache: registries take 255 in all.
	maxCacheRepository = 100
	// maxTarget bounds what a tag shows of a build's target.
	maxTarget = 40
)

// FarmCache names the caches that the farm keeps by itself: one for each tenant, each
// repository of sources or images, each of their targets and each platform. The tenant
// is a part of the path that nothing else can stand for, so that none is given another's.
type FarmCache struct{ before, after string }

// ParseFarmCache reads a template such as "registry.example.com/cache/{{.Repository}}". The
// tenant goes before the part of the path that holds the field.
func ParseFarmCache(template string) (*FarmCache, error) {
	before, after, ok := strings.Cut(template, fieldRepository)
	slash := strings.LastIndex(before, "/")
	if !ok || slash < 0 {
		return nil, fmt.Errorf("%q: want a repository with %s in its path, such as registry.example.com/cache/%s", template, fieldRepository, fieldRepository)
	}
	c := &FarmCache{before[:slash+1] + "%s/" + before[slash+1:], after}
	if strings.Contains(before+after, "%") || strings.Contains(before+after, "{{") {
		return nil, fmt.Errorf("%q: %s is the only field", template, fieldRepository)
	}
	named, err := reference.ParseNormalizedNamed(c.repository("tenant", "team/app"))
	if err != nil {
		return nil, fmt.Errorf("%q: %w", template, err)
	}
	if !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("%q: the tag is the platform, leave it out", template)
	}
	return c, nil
}

func (c *FarmCache) repository(tenant, repository string) string {
	return fmt.Sprintf(c.before, tenant) + repository + c.after
}

// BuildCache is the farm's cache of a build; nil for none.
type BuildCache struct {
	repository, variant string
	exports             bool
}

// Of returns the cache of a build; nil where the request does not tell of what repository
// it is, or builds without a cache.
func (c *FarmCache) Of(tenant string, req *controlapi.SolveRequest) *BuildCache {
	if c == nil || Question(req.GetFrontendAttrs()) {
		return nil
	}
	attrs, images := req.GetFrontendAttrs(), pushedImages(req)
	repository := sourcePath(attrs["vcs:source"])
	if context := attrs["context"]; repository == "" && isGit(context) {
		repository = sourcePath(context)
	}
	for _, image := range images {
		if named, err := reference.ParseNormalizedNamed(image); err == nil && repository == "" {
			repository = pathOf(reference.Path(named))
		}
	}
	if _, none := attrs["no-cache"]; none || repository == "" {
		return nil
	}
	out := &BuildCache{repository: c.repository(tenantPart(tenant), repository), variant: variant(attrs)}
	out.exports = len(images) > 0 && len(cacheExports(req.GetCache())) == 0
	return out
}

// Ref is where the cache of a platform is.
func (c *BuildCache) Ref(platform Leg) string {
	return c.repository + ":" + withTagLimit(strings.TrimPrefix(platform.suffix(), "-")+c.variant)
}

// Exports tells whether the build writes the cache: it pushes an image, so it is one that
// others should start from, and its client exports no cache itself.
func (c *BuildCache) Exports() bool { return c != nil && c.exports }

// Export adds the cache to those that a leg exports. The build does not mind when that fails.
func (c *BuildCache) Export(platform Leg, options *controlapi.CacheOptions) *controlapi.CacheOptions {
	if !c.Exports() {
		return options
	}
	return &controlapi.CacheOptions{
		Imports: options.GetImports(), ImportRefsDeprecated: options.GetImportRefsDeprecated(),
		Exports: []*controlapi.CacheOptionsEntry{{
			Type: typeRegistry, Attrs: map[string]string{attrRef: c.Ref(platform), attrMode: "max", attrIgnoreError: "true"},
		}},
	}
}

// Import has a frontend request of a leg import the cache, unless the client names caches
// itself: of several that a build imports, BuildKit loses parts of one where they have a
// step in common.
func (c *BuildCache) Import(platform Leg, req *gwpb.SolveRequest) (*gwpb.SolveRequest, error) {
	if c == nil || Question(req.GetFrontendOpt()) || len(req.GetCacheImports()) > 0 || req.GetFrontendOpt()[optCacheImports] != "" {
		return req, nil
	}
	out := Clone(req)
	entry := &gwpb.CacheOptionsEntry{Type: typeRegistry, Attrs: map[string]string{attrRef: c.Ref(platform)}}
	if req.GetFrontend() == "" {
		out.CacheImports = []*gwpb.CacheOptionsEntry{entry}
		return out, nil
	}
	list, err := json.Marshal([]*gwpb.CacheOptionsEntry{entry})
	if err != nil {
		return nil, err
	}
	if out.FrontendOpt == nil {
		out.FrontendOpt = map[string]string{}
	}
	out.FrontendOpt[optCacheImports] = string(list)
	return out, nil
}

// pushedImages are the names of the images that a request pushes.
func pushedImages(req *controlapi.SolveRequest) []string {
	var out []string
	for _, e := range Exporters(req) {
		if push, err := strconv.ParseBool(e.GetAttrs()["push"]); e.GetType() == client.ExporterImage && err == nil && push {
			out = append(out, strings.Split(e.GetAttrs()[attrName], ",")...)
		}
	}
	return slices.DeleteFunc(out, func(name string) bool { return name == "" })
}

// isGit tells whether a context is a git repository, as far as its address shows it.
func isGit(context string) bool {
	address, _, fragment := strings.Cut(context, "#")
	return fragment || strings.HasPrefix(address, "git://") || strings.HasPrefix(address, "git@") || strings.HasSuffix(address, ".git")
}

// sourcePath is the path of a git address, of either form; empty when it has none.
func sourcePath(address string) string {
	address, _, _ = strings.Cut(address, "#")
	if u, err := url.Parse(address); err == nil && u.Scheme != "" {
		return pathOf(u.Path)
	}
	if _, after, ok := strings.Cut(address, ":"); ok { // git@host:path
		return pathOf(after)
	}
	return ""
}

var notInPaths = regexp.MustCompile(`[^a-z0-9]+`)

// pathOf makes a path of a repository's name: what that cannot have becomes '-'. Names
// that differ in that only share a cache.
func pathOf(name string) string {
	var parts []string
	for part := range strings.SplitSeq(strings.TrimSuffix(strings.ToLower(name), ".git"), "/") {
		if clean := strings.Trim(notInPaths.ReplaceAllString(part, "-"), "-"); clean != "" {
			parts = append(parts, clean)
		}
	}
	out := strings.Join(parts, "/")
	if len(out) > maxCacheRepository {
		return digest.FromString(out).Encoded()[:32]
	}
	return out
}

var plainTenant = regexp.MustCompile(`^[a-z0-9]+(-[a-z0-9]+)*$`)

// tenantPart is a tenant as a part of a path, another one for each.
func tenantPart(tenant string) string {
	if plainTenant.MatchString(tenant) {
		return tenant
	}
	return "tenant_" + digest.FromString(tenant).Encoded()[:32]
}

// variant tells what is built of one repository apart: nothing for what is built by default.
func variant(attrs map[string]string) string {
	special := map[string]string{}
	for _, k := range []string{"target", "filename", "contextsubdir", "vcs:localdir:context"} {
		if v := attrs[k]; v != "" && (k != "filename" || v != "Dockerfile") && v != "." {
			special[k] = v
		}
	}
	if context := attrs["context"]; isGit(context) { // #ref:folder
		_, fragment, _ := strings.Cut(context, "#")
		if _, folder, ok := strings.Cut(fragment, ":"); ok {
			special["folder"] = folder
		}
	}
	if len(special) == 0 {
		return ""
	}
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(special)) {
		fmt.Fprintf(&b, "%s=%q\n", k, special[k])
	}
	name := strings.Trim(notInPaths.ReplaceAllString(strings.ToLower(special["target"]), "-"), "-")
	if name != "" {
		name = "-" + name[:min(len(name), maxTarget)]
	}
	return name + "-" + digest.FromString(b.String()).Encoded()[:12]
}
