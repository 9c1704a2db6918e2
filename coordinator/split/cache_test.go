package split

import (
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/archfarm/archfarm/manifest"
)

func cacheEntry(kind string, attrs ...string) *controlapi.CacheOptionsEntry {
	e := &controlapi.CacheOptionsEntry{Type: kind, Attrs: map[string]string{}}
	for i := 0; i < len(attrs); i += 2 {
		e.Attrs[attrs[i]] = attrs[i+1]
	}
	return e
}

func TestPlanCaches_NoLegWritesWhereAnotherDoes(t *testing.T) {
	t.Parallel()
	in := &controlapi.CacheOptions{
		Imports: []*controlapi.CacheOptionsEntry{cacheEntry("gha")},
		Exports: []*controlapi.CacheOptionsEntry{
			cacheEntry("registry", "ref", "localhost:5000/app:cache", "mode", "max"),
			cacheEntry("registry", "ref", "user/app", "oci-mediatypes", "false", "ignore-error", "true", "registry.insecure", "1"),
			cacheEntry("registry", "ref", "Not A Reference"),
			cacheEntry("registry", "ref", "app@"+untagged.String()),
			cacheEntry("registry", "ref", "app:x", "image-manifest", "perhaps"),
			cacheEntry("local", "dest", "/cache", "image-manifest", "false"),
			cacheEntry("local"),
			cacheEntry("gha"),
			cacheEntry("s3", "name", "a;b", "bucket", "x"),
			cacheEntry("azblob"),
			cacheEntry("inline"),
		},
	}
	plan := PlanCaches(in)
	wantEqual(t, "merged", plan.Merged(), []CacheExport{
		{Ref: "localhost:5000/app:cache", Format: manifest.CacheFormat{Image: true}, Step: exportToRegistry},
		{Ref: "docker.io/user/app:latest", Format: manifest.CacheFormat{Docker: true}, Insecure: true, IgnoreError: true, Step: exportToRegistry, Nth: 1},
		{Store: "local:/cache", Step: exportToClient},
	})
	if !plan.Several() {
		t.Error("an answer of such a leg was thought to name the only cache")
	}
	beside := "@" + untagged.String()
	for platform, suffix := range map[string]string{"linux/amd64": "", "linux/arm/v7": "-linux-arm-v7"} {
		name := ""
		if suffix != "" {
			name = "buildkit" + suffix
		}
		got := plan.Leg(legsFor(t, platform)[0])
		want := []struct{ key, value string }{
			{"ref", "localhost:5000/app:cache" + beside}, {"ref", "docker.io/user/app:latest" + beside}, {"ref", "Not A Reference"},
			{"ref", "app" + beside}, {"ref", "app:x"}, {"dest", "/cache"}, {"dest", ""}, {"scope", name}, {"name", "a" + suffix + ";b" + suffix}, {"name", name}, {"", ""},
		}
		if len(got.GetExports()) != len(want) || len(got.GetImports()) != 1 {
			t.Fatalf("%s: %v", platform, got)
		}
		for i, w := range want {
			if e := got.GetExports()[i]; e.GetType() != in.GetExports()[i].GetType() || e.GetAttrs()[w.key] != w.value {
				t.Errorf("%s: cache %d is %v, want %v", platform, i, e, w)
			}
		}
		if got.GetExports()[0].GetAttrs()["mode"] != "max" || in.GetExports()[0].GetAttrs()["ref"] != "localhost:5000/app:cache" {
			t.Error("other attributes are lost, or the request was changed")
		}
	}
}

func TestPlanCaches_OfOldClientsAndOfNone(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm64")[0]
	plan := PlanCaches(&controlapi.CacheOptions{ExportRefDeprecated: "localhost:5000/app:cache", ExportAttrsDeprecated: map[string]string{"mode": "max"}})
	got := plan.Leg(leg)
	if len(plan.Merged()) != 1 || plan.Several() || len(got.GetExports()) != 1 || got.GetExports()[0].GetAttrs()["mode"] != "max" || got.GetExportRefDeprecated() != "" {
		t.Errorf("merged %v, exports %v, old reference %q", plan.Merged(), got.GetExports(), got.GetExportRefDeprecated())
	}
	if none := PlanCaches(nil); none.Leg(leg) != nil || len(none.Merged()) != 0 {
		t.Error("something came of nothing")
	}
	if (*CachePlan)(nil).Merged() != nil {
		t.Error("a build of one leg merges caches")
	}
}

func TestCacheExports_OfTheOnlyLeg(t *testing.T) {
	t.Parallel()
	in := &controlapi.CacheOptions{Exports: []*controlapi.CacheOptionsEntry{cacheEntry("registry", "ref", "app"), cacheEntry("gha", "scope", "x")}}
	got := legsFor(t, "linux/arm64")[0].CacheExports(in).GetExports()
	wantEqual(t, "reference", got[0].GetAttrs()["ref"], "app")
	wantEqual(t, "scope", got[1].GetAttrs()["scope"], "x-linux-arm64")
	for _, platform := range []string{"linux/amd64", ""} {
		got := legsFor(t, platform)[0].CacheExports(in).GetExports()
		wantEqual(t, "scope", got[1].GetAttrs()["scope"], "x")
	}
	plain := &controlapi.CacheOptions{Exports: in.GetExports()[:1], ExportRefDeprecated: "old"}
	if legsFor(t, "linux/arm64")[0].CacheExports(plain) != plain {
		t.Error("a request without such caches was changed")
	}
}

func TestCacheRef_AppendsThePlatform(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm/v7")[0]
	for ref, want := range map[string]string{
		"localhost:5000/app:cache": "localhost:5000/app:cache-linux-arm-v7", "user/app": "docker.io/user/app:latest-linux-arm-v7", "Not A Reference": "Not A Reference",
	} {
		wantEqual(t, ref, leg.CacheRef(ref), want)
	}
	long := "localhost:5000/app:" + strings.Repeat("t", maxTag)
	if got := leg.CacheRef(long); got == long || len(got) != len(long) {
		t.Errorf("a tag too long for a suffix became %q", got)
	}
}
