package e2e_test

import (
	"path/filepath"
	"regexp"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// cachedRun is how buildx shows a RUN step that was taken from a cache.
var cachedRun = regexp.MustCompile(`(?m)^#(\d+) \[.*\] RUN `)

// wantCachedRun checks that every RUN step of a build came from its cache.
func wantCachedRun(t *testing.T, output string) {
	t.Helper()
	steps := cachedRun.FindAllStringSubmatch(output, -1)
	if len(steps) == 0 {
		t.Errorf("no RUN step in the output:\n%s", output)
	}
	for _, step := range steps {
		if !regexp.MustCompile(`(?m)^#` + step[1] + ` CACHED`).MatchString(output) {
			t.Errorf("%s did not come from the cache:\n%s", step[0], output)
		}
	}
}

// TestCache_InlineServesOthers exports the cache in the image, and imports it into buildkitds that have nothing yet.
func TestCache_InlineServesOthers(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.legsContext(t)
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), "--cache-to", "type=inline", dir)
	elsewhere := farmtest.StartDirect(t, r.tools)
	result := elsewhere.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v2"), "--cache-from", "type=registry,ref="+r.ref("v1"), dir)
	wantCachedRun(t, result.Output)
	r.checkLeg(t, r.registry.Index(t, r.repo, "v2"), "linux/amd64", "x86_64\n")
}

func TestCache_OfOnePlatformInAFolderAndInARegistry(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	for name, cache := range map[string]struct{ to, from string }{
		"local":    {"type=local,mode=max,dest=", "type=local,src="},
		"registry": {"type=registry,mode=max,ref=", "type=registry,ref="},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := r
			r.repo = newRepo(t)
			place := r.ref("cache")
			if name == "local" {
				place = filepath.Join(farmtest.Folder(t), "cache")
			}
			dir := r.legsContext(t)
			r.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), "--cache-to", cache.to+place, dir)
			elsewhere := r // a farm whose worker has nothing yet imports it through the coordinator
			if !direct() {
				elsewhere = newFarmRig(t, oneSlot())
			}
			result := elsewhere.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v2"), "--cache-from", cache.from+place, dir)
			wantCachedRun(t, result.Output)
			r.checkLeg(t, r.registry.Index(t, r.repo, "v2"), "linux/amd64", "x86_64\n")
		})
	}
}

// TestCache_OfTwoPlatformsUnderOneName exports the caches of two legs to one reference. Neither destroys the other's:
// a farm that has nothing yet finds both.
func TestCache_OfTwoPlatformsUnderOneName(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, fleet()...)
	dir := r.context(t, map[string]string{
		"Dockerfile": "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /arch\nCOPY all /all\n",
		"amd64":      "for amd64", "arm64": "for arm64", "all": "for all",
	})
	cache := "type=registry,mode=max,ref=" + r.ref("cache")
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), "--cache-to", cache, dir)
	wantList(t, "caches", r.registry.Tags(t, r.repo), "cache", "cache-linux-arm64", "v1")

	elsewhere := newFarmRig(t, fleet()...)
	result := elsewhere.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v2"), "--cache-from", "type=registry,ref="+r.ref("cache"), dir)
	copies := regexp.MustCompile(`(?m)^#(\d+) \[.*\] COPY `).FindAllStringSubmatch(result.Output, -1)
	if len(copies) < 4 {
		t.Errorf("%d COPY steps of two platforms:\n%s", len(copies), result.Output)
	}
	for _, step := range copies {
		if !regexp.MustCompile(`(?m)^#` + step[1] + ` CACHED`).MatchString(result.Output) {
			t.Errorf("%s did not come from the cache:\n%s", step[0], result.Output)
		}
	}
	index := r.registry.Index(t, r.repo, "v2")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
}
