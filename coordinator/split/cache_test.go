package split

import (
	"encoding/json"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestCache_NoLegWritesWhereAnotherDoes(t *testing.T) {
	t.Parallel()
	long := "localhost:5000/app:t123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456"
	exports := []*controlapi.CacheOptionsEntry{
		{Type: "registry", Attrs: map[string]string{"ref": "localhost:5000/app:cache", "mode": "max"}},
		{Type: "registry", Attrs: map[string]string{"ref": "user/app"}},
		{Type: "registry", Attrs: map[string]string{"ref": long}},
		{Type: "registry", Attrs: map[string]string{"ref": "Not A Reference"}},
		{Type: "gha", Attrs: nil},
		{Type: "s3", Attrs: map[string]string{"name": "a;b", "bucket": "x"}},
		{Type: "azblob", Attrs: map[string]string{}},
		{Type: "inline"},
		{Type: "local", Attrs: map[string]string{"dest": "/cache"}},
	}
	in := &controlapi.CacheOptions{Exports: exports}
	legs := legsFor(t, "linux/amd64,linux/arm/v7")
	if got := legs[0].Cache(in, true); got != in {
		t.Errorf("the first leg's caches are %v", got)
	}
	got := legs[1].Cache(in, false).GetExports()
	type entry struct{ kind, key, value string }
	want := []entry{
		{"registry", "ref", "localhost:5000/app:cache-linux-arm-v7"},
		{"registry", "ref", "docker.io/user/app:latest-linux-arm-v7"},
		{"registry", "ref", got[2].GetAttrs()["ref"]},
		{"registry", "ref", "Not A Reference"},
		{"gha", "scope", "buildkit-linux-arm-v7"},
		{"s3", "name", "a-linux-arm-v7;b-linux-arm-v7"},
		{"azblob", "name", "buildkit-linux-arm-v7"},
		{"inline", "", ""},
	}
	if len(got) != len(want) {
		t.Fatalf("%d caches, want %d: %v", len(got), len(want), got)
	}
	for i, w := range want {
		if got[i].GetType() != w.kind || got[i].GetAttrs()[w.key] != w.value {
			t.Errorf("cache %d is %v, want %v", i, got[i], w)
		}
	}
	if ref := got[2].GetAttrs()["ref"]; ref == long || len(ref) != len("localhost:5000/app:")+maxTag {
		t.Errorf("a tag too long for a suffix became %q", ref)
	}
	if got[0].GetAttrs()["mode"] != "max" || exports[0].GetAttrs()["ref"] != "localhost:5000/app:cache" {
		t.Error("other attributes are lost, or the request was changed")
	}
}

func TestCache_OfOldClientsGoesBesideToo(t *testing.T) {
	t.Parallel()
	got := legsFor(t, "linux/arm64")[0].Cache(&controlapi.CacheOptions{ExportRefDeprecated: "localhost:5000/app:cache"}, false)
	if len(got.GetExports()) != 1 || got.GetExports()[0].GetAttrs()["ref"] != "localhost:5000/app:cache-linux-arm64" || got.GetExportRefDeprecated() != "" {
		t.Errorf("exports %v, old reference %q", got.GetExports(), got.GetExportRefDeprecated())
	}
}

func TestFrontendRequest_ImportsWhatTheLegExported(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm64")[0]
	req := &gwpb.SolveRequest{
		CacheImports: []*gwpb.CacheOptionsEntry{{Type: "gha"}},
		FrontendOpt: map[string]string{
			"platform":      "linux/amd64,linux/arm64",
			"cache-imports": `[{"Type":"registry","Attrs":{"ref":"localhost:5000/app:cache"}},{"Type":"local","Attrs":{"src":"/x","digest":"sha256:1"}}]`,
		},
	}
	out, err := leg.FrontendRequest(req)
	if err != nil {
		t.Fatal(err)
	}
	var listed []*gwpb.CacheOptionsEntry
	if err := json.Unmarshal([]byte(out.GetFrontendOpt()["cache-imports"]), &listed); err != nil {
		t.Fatal(err)
	}
	var refs []string
	for _, e := range listed {
		refs = append(refs, e.GetType()+" "+e.GetAttrs()["ref"])
	}
	wantEqual(t, "imports", refs, []string{"registry localhost:5000/app:cache-linux-arm64", "registry localhost:5000/app:cache", "local "})
	if n := len(out.GetCacheImports()); n != 2 || out.GetCacheImports()[0].GetAttrs()["scope"] != "buildkit-linux-arm64" {
		t.Errorf("imports of the request: %v", out.GetCacheImports())
	}
}

func TestFrontendRequest_RefusesImportsThatItCannotRead(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm64")[0]
	for name, list := range map[string]string{"no JSON": "{", "another shape": `{"Type":1}`, "too long": string(make([]byte, maxCacheBytes+1))} {
		if _, err := leg.FrontendRequest(&gwpb.SolveRequest{FrontendOpt: map[string]string{"cache-imports": list}}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzCacheImports(f *testing.F) {
	f.Add(`[{"Type":"registry","Attrs":{"ref":"localhost:5000/app:cache"}}]`)
	f.Add(`[{"Type":"s3","Attrs":{"name":";"}},null]`)
	f.Add(`[]`)
	f.Fuzz(func(t *testing.T, list string) {
		legs, err := Legs(map[string]string{optPlatform: "linux/arm64"})
		if err != nil {
			t.Fatal(err)
		}
		out, err := legs[0].FrontendRequest(&gwpb.SolveRequest{FrontendOpt: map[string]string{optCacheImports: list}})
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Fatalf("error %v has code %s", err, status.Code(err))
			}
			return
		}
		if _, err := parseCacheImports(out.GetFrontendOpt()[optCacheImports]); err != nil {
			t.Fatalf("what was made of %q cannot be read: %v", list, err)
		}
	})
}
