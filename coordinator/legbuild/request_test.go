package legbuild

import (
	"context"
	"encoding/base64"
	"maps"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/session/auth"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/job"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const commit = "0123456789abcdef0123456789abcdef01234567"

func gitLeg(url, subdir string) job.Leg {
	return job.Leg{Platform: "linux/amd64", Spec: &archfarmv1.JobSpec{
		Platforms: []string{"linux/amd64"},
		Context: &archfarmv1.BuildContext{From: &archfarmv1.BuildContext_Git{Git: &archfarmv1.GitContext{Url: url, Ref: "main", Subdir: subdir}},
			Source: &archfarmv1.Source{Commit: commit}},
	}}
}

func TestSolveOpt_Attributes(t *testing.T) {
	t.Parallel()
	const url = "https://example.com/app.git"
	least := map[string]string{"platform": "linux/amd64", "attest:provenance": defaultProvenance, "context": url + "#" + commit}
	cases := map[string]struct {
		change  func(*archfarmv1.JobSpec)
		want    map[string]string
		without string
	}{
		"nothing asked": {change: func(*archfarmv1.JobSpec) {}},
		"everything asked": {change: func(s *archfarmv1.JobSpec) {
			s.Dockerfile, s.Target, s.NoCache, s.Pull = "sub/Dockerfile.x", "final", true, true
			s.BuildArgs, s.Labels = map[string]string{"A": "1", "B": ""}, map[string]string{"l": "v"}
		}, want: map[string]string{
			"filename": "sub/Dockerfile.x", "target": "final", "no-cache": "", "image-resolve-mode": "pull",
			"build-arg:A": "1", "build-arg:B": "", "label:l": "v",
		}},
		"provenance off":         {change: func(s *archfarmv1.JobSpec) { s.Provenance = "false" }, without: "attest:provenance"},
		"provenance disabled":    {change: func(s *archfarmv1.JobSpec) { s.Provenance = "mode=max,disabled=true" }, without: "attest:provenance"},
		"provenance on":          {change: func(s *archfarmv1.JobSpec) { s.Provenance = "true" }, want: map[string]string{"attest:provenance": "type=provenance"}},
		"provenance max":         {change: func(s *archfarmv1.JobSpec) { s.Provenance = "mode=max" }, want: map[string]string{"attest:provenance": "type=provenance,mode=max"}},
		"sbom":                   {change: func(s *archfarmv1.JobSpec) { s.Sbom = "true" }, want: map[string]string{"attest:sbom": "type=sbom"}},
		"sbom of a generator":    {change: func(s *archfarmv1.JobSpec) { s.Sbom = "generator=x" }, want: map[string]string{"attest:sbom": "type=sbom,generator=x"}},
		"sbom off":               {change: func(s *archfarmv1.JobSpec) { s.Sbom = "false" }},
		"folder of a repository": {change: func(s *archfarmv1.JobSpec) { s.GetContext().GetGit().Subdir = "/a/b/" }, want: map[string]string{"context": url + "#" + commit + ":a/b"}},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			leg := gitLeg(url, "")
			c.change(leg.Spec)
			opt, err := solveOpt(leg)
			if err != nil {
				t.Fatal(err)
			}
			want := maps.Clone(least)
			maps.Copy(want, c.want)
			delete(want, c.without)
			if !maps.Equal(opt.FrontendAttrs, want) {
				t.Errorf("got %v, want %v", opt.FrontendAttrs, want)
			}
			if len(opt.Exports) != 0 || len(opt.AllowedEntitlements) != 0 || opt.Frontend != "dockerfile.v0" {
				t.Errorf("%+v", opt)
			}
		})
	}
}

func TestSolveOpt_GitWithoutTheSuffixIsNotADownload(t *testing.T) {
	t.Parallel()
	opt, err := solveOpt(gitLeg("https://example.com/app", "sub"))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := opt.FrontendAttrs["context"]; ok || len(opt.FrontendInputs) != 2 {
		t.Errorf("%v, inputs %v", opt.FrontendAttrs, opt.FrontendInputs)
	}
}

func TestSolveOpt_Refuses(t *testing.T) {
	t.Parallel()
	unpinned := gitLeg("https://example.com/app.git", "")
	unpinned.Spec.Context.Source = nil
	local := gitLeg("https://example.com/app.git", "")
	local.Spec.CacheTo = []*archfarmv1.CacheEntry{{Type: "local", Attrs: map[string]string{"dest": t.TempDir() + "/x"}}}
	read := gitLeg("https://example.com/app.git", "")
	read.Spec.CacheFrom = []*archfarmv1.CacheEntry{{Type: "local", Attrs: map[string]string{"src": "/"}}}
	for name, leg := range map[string]job.Leg{
		"no commit": unpinned, "a folder of the coordinator as cache": local, "the same to read": read,
		"query": gitLeg("https://user:secret@example.com/app.git?ref=x", ""), "fragment": gitLeg("https://example.com/app.git#x", ""),
	} {
		if _, err := solveOpt(leg); status.Code(err) != codes.InvalidArgument || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSolveOpt_UploadedFolder(t *testing.T) {
	t.Parallel()
	source := func(url string, dirty bool) map[string]string {
		leg := job.Leg{Platform: "linux/amd64", Dir: t.TempDir(), Spec: &archfarmv1.JobSpec{Context: &archfarmv1.BuildContext{
			From:   &archfarmv1.BuildContext_Digest{Digest: "sha256:abc"},
			Source: &archfarmv1.Source{Url: url, Commit: commit, Dirty: dirty},
		}}}
		opt, err := solveOpt(leg)
		if err != nil {
			t.Fatal(err)
		}
		if len(opt.LocalMounts) != 2 || !strings.Contains(opt.SharedKey, "sha256:abc") {
			t.Errorf("mounts %v, key %q", opt.LocalMounts, opt.SharedKey)
		}
		return opt.FrontendAttrs
	}
	for url, want := range map[string]string{
		"https://bob:pw@example.com/app": "https://example.com/app", "git@example.com:app.git": "git@example.com:app.git",
		"ssh://git@example.com/app": "ssh://git@example.com/app", "": "", "https://bob:%zz@x/": "",
	} {
		if attrs := source(url, false); attrs["vcs:source"] != want || attrs["vcs:revision"] != commit {
			t.Errorf("%s: %v", url, attrs)
		}
	}
	if got := source("", true)["vcs:revision"]; got != commit+"-dirty" {
		t.Error(got)
	}
}

func TestSolveOpt_CachesOfSeveralPlatforms(t *testing.T) {
	t.Parallel()
	leg := gitLeg("https://example.com/app.git", "")
	leg.Spec.BuildArgs = map[string]string{"BUILDKIT_INLINE_CACHE": "1"}
	leg.Spec.CacheFrom = []*archfarmv1.CacheEntry{{Type: "registry", Attrs: map[string]string{"ref": "example.com/app:cache"}}}
	leg.Spec.CacheTo = []*archfarmv1.CacheEntry{{Type: "registry", Attrs: map[string]string{"ref": "example.com/app:cache", "mode": "max"}}}
	refs := func(platform string, all ...string) (in, out []string) {
		leg := leg
		leg.Platform, leg.Spec = platform, &archfarmv1.JobSpec{
			Context: leg.Spec.GetContext(), Platforms: all, BuildArgs: leg.Spec.GetBuildArgs(),
			CacheFrom: leg.Spec.GetCacheFrom(), CacheTo: leg.Spec.GetCacheTo(),
		}
		opt, err := solveOpt(leg)
		if err != nil {
			t.Fatal(err)
		}
		names := func(entries []client.CacheOptionsEntry) (names []string) {
			for _, e := range entries {
				names = append(names, e.Type+" "+e.Attrs["ref"]+" "+e.Attrs["mode"])
			}
			return names
		}
		return names(opt.CacheImports), names(opt.CacheExports)
	}
	const plain, amd, arm = "registry example.com/app:cache", "registry example.com/app:cache-linux-amd64", "registry example.com/app:cache-linux-arm64"
	for _, c := range []struct {
		platform string
		all      []string
		in, out  []string
	}{
		{"linux/amd64", []string{"linux/amd64"}, []string{plain + " "}, []string{plain + " max", "inline  "}},
		{"linux/amd64", []string{"linux/amd64", "linux/arm64"}, []string{plain + " "}, []string{amd + " max", "inline  "}},
		{"linux/arm64", []string{"linux/amd64", "linux/arm64"}, []string{plain + " "}, []string{arm + " max", "inline  "}},
	} {
		if in, out := refs(c.platform, c.all...); !reflect.DeepEqual(in, c.in) || !reflect.DeepEqual(out, c.out) {
			t.Errorf("%s of %v: %q, %q", c.platform, c.all, in, out)
		}
	}
}

func TestPushed_ChecksWhatItIsTold(t *testing.T) {
	t.Parallel()
	d := digest.FromString("x").String()
	leg := job.Leg{Repositories: []string{"example.com/app"}}
	response := func(descriptor, dgst string) map[string]string {
		return map[string]string{"containerimage.descriptor": base64.StdEncoding.EncodeToString([]byte(descriptor)), "containerimage.digest": dgst}
	}
	const mediaType = "application/vnd.oci.image.index.v1+json"
	if got, err := pushed(leg, response(`{"mediaType":"`+mediaType+`","digest":"`+d+`","size":7}`, d)); err != nil || got.Digest.String() != d || got.Size != 7 || got.MediaType != mediaType {
		t.Errorf("%v, %v", got, err)
	}
	for name, r := range map[string]map[string]string{
		"nothing":        {},
		"not base64":     {"containerimage.descriptor": "!"},
		"not JSON":       response("{", d),
		"no digest":      response(`{"mediaType":"m","size":7}`, ""),
		"another digest": response(`{"mediaType":"m","digest":"`+d+`","size":7}`, digest.FromString("y").String()),
		"no size":        response(`{"mediaType":"m","digest":"`+d+`"}`, d),
		"no type":        response(`{"digest":"`+d+`","size":7}`, d),
	} {
		if got, err := pushed(leg, r); status.Code(err) != codes.Internal || got.Digest != "" {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestRegistryAuth_OffersWhatCameWithTheJob(t *testing.T) {
	t.Parallel()
	a := newRegistryAuth([]*archfarmv1.RegistryCredential{
		{Host: "https://index.docker.io/v1/", Username: "hub", Password: "p"},
		{Host: "Registry.example.com:5000", Username: "own", Password: "q"},
		{Host: "token.example.com", Username: "ignored", IdentityToken: "t"},
	})
	for host, want := range map[string][2]string{
		"registry-1.docker.io": {"hub", "p"}, "docker.io": {"hub", "p"}, "registry.example.com:5000": {"own", "q"},
		"token.example.com": {"", "t"}, "other.example.com": {"", ""}, "registry.example.com": {"", ""},
	} {
		got, err := a.Credentials(context.Background(), &auth.CredentialsRequest{Host: host})
		if err != nil || got.GetUsername() != want[0] || got.GetSecret() != want[1] {
			t.Errorf("%s: %v, %v", host, got, err)
		}
	}
}
