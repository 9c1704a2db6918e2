package e2e_test

import (
	"fmt"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// bakeFile describes targets for both platforms, each by its name, Dockerfile and further settings.
func (r rig) bakeFile(targets ...[3]string) string {
	file := "group \"default\" { targets = ["
	for _, target := range targets {
		file += fmt.Sprintf("%q, ", target[0])
	}
	file += "] }\n"
	for _, target := range targets {
		file += fmt.Sprintf("target %q {\n  context = \".\"\n  dockerfile = %q\n  platforms = [\"linux/amd64\", \"linux/arm64\"]\n"+
			"  tags = [%q]\n%s\n}\n", target[0], target[1], r.ref(target[0]), target[2])
	}
	return file
}

func TestBake_TwoTargetsForTwoPlatforms(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{
		"docker-bake.hcl": r.bakeFile([3]string{"one", "Dockerfile"}, [3]string{"two", "two.Dockerfile"}),
		"Dockerfile":      legs, "told": "told\n", "app": "app of " + t.Name(),
		"two.Dockerfile": "FROM scratch\nARG TARGETARCH\nLABEL arch=$TARGETARCH\nCOPY app /two\n",
	})
	if result := r.Client.Bake(t, dir, "docker-bake.hcl", "--push"); result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	one, two := r.registry.Index(t, r.repo, "one"), r.registry.Index(t, r.repo, "two")
	wantList(t, "platforms of one", one.Platforms(), "linux/amd64", "linux/arm64")
	wantList(t, "platforms of two", two.Platforms(), "linux/amd64", "linux/arm64")
	r.checkLeg(t, one, "linux/amd64", "x86_64\n")
	r.checkLeg(t, one, "linux/arm64", "told\n")
	for arch, platform := range map[string]string{"amd64": "linux/amd64", "arm64": "linux/arm64"} {
		image := r.registry.Image(t, r.repo, two.For(t, platform))
		wantEqual(t, platform+": label of two", image.Config.Config.Labels["arch"], arch)
		wantEqual(t, platform+": /two", image.Files["two"], "app of "+t.Name())
	}
}

// TestBake_ATargetBuildsOnAnother links two targets: the result of one is an input of the other, on the worker that has it.
func TestBake_ATargetBuildsOnAnother(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{
		"docker-bake.hcl": r.bakeFile([3]string{"base", "base.Dockerfile"},
			[3]string{"final", "final.Dockerfile", "  contexts = { base = \"target:base\" }"}),
		"base.Dockerfile": "FROM scratch AS common\nCOPY busybox /bin/busybox\nFROM common AS leg-amd64\n" +
			farmtest.Run("echo made on amd64 > /base") + "\nFROM common AS leg-arm64\nCOPY arm /base\nFROM leg-${TARGETARCH}\n",
		"final.Dockerfile": "FROM base\nCOPY app /app\n",
		"arm":              "made for arm64\n", "app": t.Name(),
	})
	if result := r.Client.Bake(t, dir, "docker-bake.hcl", "--push"); result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	final := r.registry.Index(t, r.repo, "final")
	wantList(t, "platforms", final.Platforms(), "linux/amd64", "linux/arm64")
	for platform, base := range map[string]string{"linux/amd64": "made on amd64\n", "linux/arm64": "made for arm64\n"} {
		image := r.registry.Image(t, r.repo, final.For(t, platform))
		wantEqual(t, platform+": /base", image.Files["base"], base)
		wantEqual(t, platform+": /app", image.Files["app"], t.Name())
	}
}
