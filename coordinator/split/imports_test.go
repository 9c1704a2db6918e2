package split

import (
	"testing"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestImporting_WhatIsThePlatforms(t *testing.T) {
	t.Parallel()
	req := &gwpb.SolveRequest{
		CacheImports: []*gwpb.CacheOptionsEntry{{Type: "gha"}, {Type: "registry", Attrs: map[string]string{"ref": "app:v1", "registry.insecure": "true"}}},
		FrontendOpt: map[string]string{
			"cache-imports": `[{"Type":"registry","Attrs":{"ref":"localhost:5000/app:cache"}},{"Type":"local","Attrs":{"src":"/x","digest":"sha256:1"}},{"Type":"s3"},{"Type":"registry","Attrs":{"ref":"app:v1"}}]`,
		},
	}
	caches, err := ImportedCaches(req)
	if err != nil {
		t.Fatal(err)
	}
	inline := ImportedCache{Ref: "app:v1"}
	wantEqual(t, "caches", caches, []ImportedCache{{Ref: "localhost:5000/app:cache"}, inline, {Ref: "app:v1", Insecure: true}})
	amd, arm := digest.FromString("amd64"), digest.FromString("arm64")
	images := map[ImportedCache]ocispecs.Index{inline: {Manifests: []ocispecs.Descriptor{
		{Digest: digest.FromString("attestation"), Platform: &ocispecs.Platform{OS: "unknown", Architecture: "unknown"}}, {Digest: digest.FromString("none")},
		{Digest: amd, Platform: &ocispecs.Platform{OS: "linux", Architecture: "amd64"}}, {Digest: arm, Platform: &ocispecs.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}},
	}}}
	for platform, want := range map[string]struct{ name, image string }{
		"linux/amd64": {"", "docker.io/library/app@" + amd.String()}, "linux/arm64": {"buildkit-linux-arm64", "docker.io/library/app@" + arm.String()},
		"linux/s390x": {"buildkit-linux-s390x", "app:v1"},
	} {
		out, err := legsFor(t, platform)[0].Importing(req, images)
		if err != nil {
			t.Fatal(err)
		}
		listed, err := parseCacheImports(out.GetFrontendOpt()["cache-imports"])
		if err != nil || len(listed) != 4 || len(out.GetCacheImports()) != 2 {
			t.Fatalf("%v, %v, %v", listed, out.GetCacheImports(), err)
		}
		wantEqual(t, "reference", listed[0].GetAttrs()["ref"], "localhost:5000/app:cache")
		wantEqual(t, "folder", listed[1].GetAttrs()["src"], "/x")
		wantEqual(t, platform+": name", listed[2].GetAttrs()["name"], want.name)
		wantEqual(t, platform+": image", listed[3].GetAttrs()["ref"], want.image)
		wantEqual(t, platform+": scope", out.GetCacheImports()[0].GetAttrs()["scope"], want.name)
		wantEqual(t, "another registry's image", out.GetCacheImports()[1].GetAttrs()["ref"], "app:v1")
	}
	plain := &gwpb.SolveRequest{FrontendOpt: map[string]string{"cache-imports": `[{"Type":"registry","Attrs":{"ref":"app"}},null]`}}
	if out, err := legsFor(t, "linux/arm64")[0].Importing(plain, images); out != plain || err != nil {
		t.Errorf("a request without such caches became %v, %v", out, err)
	}
}

func TestImporting_RefusesImportsThatItCannotRead(t *testing.T) {
	t.Parallel()
	leg := legsFor(t, "linux/arm64")[0]
	for name, list := range map[string]string{"no JSON": "{", "another shape": `{"Type":1}`, "too long": string(make([]byte, maxCacheBytes+1))} {
		req := &gwpb.SolveRequest{FrontendOpt: map[string]string{"cache-imports": list}}
		if _, err := leg.Importing(req, nil); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := ImportedCaches(req); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzCacheImports(f *testing.F) {
	f.Add(`[{"Type":"registry","Attrs":{"ref":"localhost:5000/app:cache"}}]`)
	f.Add(`[{"Type":"s3","Attrs":{"name":";"}},null]`)
	f.Add(`[]`)
	f.Fuzz(func(t *testing.T, list string) {
		legs, err := Legs(map[string]string{"platform": "linux/arm64"})
		if err != nil {
			t.Fatal(err)
		}
		req := &gwpb.SolveRequest{FrontendOpt: map[string]string{optCacheImports: list}}
		caches, err := ImportedCaches(req)
		if err != nil {
			return
		}
		images := map[ImportedCache]ocispecs.Index{}
		for _, c := range caches {
			images[c] = ocispecs.Index{Manifests: []ocispecs.Descriptor{{Digest: digest.FromString("x"), Platform: &ocispecs.Platform{OS: "linux", Architecture: "arm64"}}}}
		}
		out, err := legs[0].Importing(req, images)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseCacheImports(out.GetFrontendOpt()[optCacheImports]); err != nil {
			t.Fatalf("what is passed on cannot be read: %v", err)
		}
	})
}
