package split

import (
	"strings"
	"testing"

	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"pgregory.net/rapid"
)

func farmCache(t *testing.T, template string) *FarmCache {
	t.Helper()
	c, err := ParseFarmCache(template)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pushing(names string, attrs map[string]string) *controlapi.SolveRequest {
	return &controlapi.SolveRequest{FrontendAttrs: attrs, Exporters: []*controlapi.Exporter{{Type: "image", Attrs: map[string]string{"name": names, "push": "true"}}}}
}

func TestFarmCache_NamesWhatIsBuilt(t *testing.T) {
	t.Parallel()
	c := farmCache(t, "registry.example.com/cache/{{.Repository}}")
	leg := legsFor(t, "linux/arm64")[0]
	for name, x := range map[string]struct {
		tenant string
		req    *controlapi.SolveRequest
		want   string
	}{
		"an image":           {"acme", pushing("example.com:5000/team/app:v1,example.com/other", nil), "acme/team/app:linux-arm64"},
		"sources":            {"acme", pushing("example.com/x", map[string]string{"vcs:source": "https://user@git.example.com/Team/My_App.git"}), "acme/team/my-app:linux-arm64"},
		"sources by SSH":     {"acme", pushing("", map[string]string{"vcs:source": "git@git.example.com:team/app.git"}), "acme/team/app:linux-arm64"},
		"a git context":      {"acme", pushing("", map[string]string{"context": "https://git.example.com/team/app.git#main"}), "acme/team/app:linux-arm64"},
		"another tenant":     {"Acme", pushing("app", nil), "tenant_" + strings.TrimPrefix(tenantPart("Acme"), "tenant_") + "/library/app:linux-arm64"},
		"the default target": {"acme", pushing("app", map[string]string{"filename": "Dockerfile", "target": ""}), "acme/library/app:linux-arm64"},
	} {
		got := c.Of(x.tenant, x.req)
		if got == nil {
			t.Errorf("%s: no cache", name)
			continue
		}
		wantEqual(t, name, got.Ref(leg), "registry.example.com/cache/"+x.want)
	}
	for name, req := range map[string]*controlapi.SolveRequest{
		"nothing is known": {FrontendAttrs: map[string]string{"context": "local"}},
		"no cache":         pushing("app", map[string]string{"no-cache": ""}),
		"a question":       pushing("app", map[string]string{"requestid": "frontend.outline"}),
	} {
		if got := c.Of("acme", req); got != nil {
			t.Errorf("%s: %s", name, got.Ref(leg))
		}
	}
	if (*FarmCache)(nil).Of("acme", pushing("app", nil)) != nil {
		t.Error("a farm without a cache has one")
	}
}

func TestFarmCache_TellsApartWhatIsBuiltOfOneRepository(t *testing.T) {
	t.Parallel()
	c := farmCache(t, "registry.example.com/{{.Repository}}")
	leg := legsFor(t, "linux/amd64")[0]
	seen := map[string]bool{}
	for _, attrs := range []map[string]string{
		{}, {"target": "a"}, {"target": "b"}, {"target": "A"}, {"filename": "a.Dockerfile"}, {"filename": "b.Dockerfile"}, {"contextsubdir": "a"},
		{"context": "https://x/team/app.git#main:a"}, {"context": "https://x/team/app.git#main:b"}, {"target": strings.Repeat("long", 100)},
	} {
		attrs["vcs:source"] = "https://git.example.com/team/app"
		ref := c.Of("acme", pushing("", attrs)).Ref(leg)
		if _, err := reference.ParseNormalizedNamed(ref); err != nil || seen[ref] {
			t.Errorf("%v: %s, %v", attrs, ref, err)
		}
		seen[ref] = true
	}
}

func TestFarmCache_NoTenantGetsAnothers(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c, err := ParseFarmCache(rapid.SampledFrom([]string{"registry.example.com/cache/{{.Repository}}", "r.example.com/x-{{.Repository}}-y", "localhost:5000/{{.Repository}}/z"}).Draw(t, "template"))
		if err != nil {
			t.Fatal(err)
		}
		tenant := rapid.StringMatching(`[A-Za-z0-9][A-Za-z0-9._-]{0,5}`)
		one, other := tenant.Draw(t, "one"), tenant.Draw(t, "other")
		name := rapid.OneOf(rapid.StringMatching(`[A-Za-z0-9._/-]{1,12}`), rapid.String())
		ref := func(tenant, source string) string {
			req := pushing("app", map[string]string{"vcs:source": "https://h/" + source, "target": name.Draw(t, "target")})
			ref := c.Of(tenant, req).Ref(Leg{})
			if _, err := reference.ParseNormalizedNamed(ref); err != nil {
				t.Fatalf("%q: %v", ref, err)
			}
			repository, _, _ := strings.Cut(strings.TrimPrefix(ref, "localhost:5000"), ":")
			return repository
		}
		if a, b := ref(one, name.Draw(t, "source")), ref(other, name.Draw(t, "source")); a == b && one != other {
			t.Fatalf("%s and %s share %s", one, other, a)
		}
	})
}

func TestParseFarmCache_RefusesWhatNamesNoPlace(t *testing.T) {
	t.Parallel()
	for _, template := range []string{
		"", "registry.example.com/cache", "{{.Repository}}", "registry.example.com/{{.Repository}}:tag", "registry.example.com/{{.Tenant}}/{{.Repository}}",
		"Registry Example/{{.Repository}}", "registry.example.com/%s/{{.Repository}}", "registry.example.com/{{.Repository}}/{{.Repository}}",
	} {
		if c, err := ParseFarmCache(template); err == nil {
			t.Errorf("%q is %+v", template, c)
		}
	}
}

func TestBuildCache_IsTheOnlyOneImported(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm64")[0]
	c := farmCache(t, "registry.example.com/{{.Repository}}").Of("acme", pushing("app", nil))
	got, err := c.Import(leg, &gwpb.SolveRequest{Frontend: "dockerfile.v0"})
	if err != nil {
		t.Fatal(err)
	}
	imports, err := parseCacheImports(got.GetFrontendOpt()[optCacheImports])
	if err != nil || len(imports) != 1 || imports[0].GetAttrs()["ref"] != c.Ref(leg) {
		t.Errorf("imports %v, %v", imports, err)
	}
	if got, _ := c.Import(leg, &gwpb.SolveRequest{}); len(got.GetCacheImports()) != 1 {
		t.Errorf("imports of a definition: %v", got.GetCacheImports())
	}
	for name, req := range map[string]*gwpb.SolveRequest{
		"in options":   {Frontend: "x", FrontendOpt: map[string]string{optCacheImports: "[]"}},
		"beside them":  {CacheImports: []*gwpb.CacheOptionsEntry{{Type: "gha"}}},
		"in questions": {Frontend: "x", FrontendOpt: map[string]string{"requestid": "x"}},
	} {
		if got, _ := c.Import(leg, req); got != req {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestBuildCache_IsExportedByPushesWithoutOneOfTheirOwn(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm64")[0]
	f := farmCache(t, "registry.example.com/{{.Repository}}")
	req := pushing("app", nil)
	got := f.Of("acme", req).Export(leg, req.GetCache()).GetExports()
	if len(got) != 1 || got[0].GetAttrs()["ignore-error"] != "true" || got[0].GetAttrs()["mode"] != "max" || got[0].GetAttrs()["ref"] != "registry.example.com/acme/library/app:linux-arm64" {
		t.Errorf("exports %v", got)
	}
	own := pushing("app", nil)
	own.Cache = &controlapi.CacheOptions{Exports: []*controlapi.CacheOptionsEntry{{Type: "inline"}}}
	loaded := pushing("app", map[string]string{"vcs:source": "https://x/app"})
	loaded.Exporters[0].Attrs["push"] = "false"
	for name, req := range map[string]*controlapi.SolveRequest{"one of its own": own, "no push": loaded} {
		if c := f.Of("acme", req); c == nil || c.Exports() || c.Export(leg, req.GetCache()) != req.GetCache() {
			t.Errorf("%s: it is exported", name)
		}
	}
}
