package e2e_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// newTightRig is a rig whose farm has one slot for each platform.
func newTightRig(t *testing.T) rig {
	t.Helper()
	if direct() {
		return newRig(t)
	}
	return newFarmRig(t, oneSlot(), farmtest.WorkerSpec{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1})
}

// base pushes an image that has only busybox, for both platforms.
func (r rig) base(t *testing.T) string {
	t.Helper()
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nENV PATH=/bin\n"})
	r.Client.Build(t, "--platform", both, "--provenance=false", "--push", "-t", r.ref("base"), dir)
	return r.ref("base")
}

// TestBakeLink_TargetsThatWaitForEachOtherShareTheSlots has a chain and a fan of targets over two platforms, all of one
// session: each holds its slots until those that build on it have ended.
func TestBakeLink_TargetsThatWaitForEachOtherShareTheSlots(t *testing.T) {
	t.Parallel()
	r := newTightRig(t)
	const onBase = "  contexts = { base = \"target:base\" }"
	dir := r.context(t, map[string]string{
		"docker-bake.hcl": r.bakeFile(
			[3]string{"base", "base.Dockerfile"}, [3]string{"left", "left.Dockerfile", onBase}, [3]string{"right", "right.Dockerfile", onBase},
			[3]string{"top", "top.Dockerfile", "  contexts = { left = \"target:left\", right = \"target:right\" }"}, [3]string{"alone", "base.Dockerfile"}),
		"base.Dockerfile": "FROM scratch AS common\nCOPY busybox /bin/busybox\nFROM common AS leg-amd64\n" +
			farmtest.Run("/bin/busybox uname -m > /base") + "\nFROM common AS leg-arm64\nCOPY told /base\nFROM leg-${TARGETARCH}\n",
		"left.Dockerfile":  "FROM base\nCOPY app /left\n",
		"right.Dockerfile": "FROM base\nCOPY app /right\n",
		"top.Dockerfile":   "FROM left\nCOPY --from=right /right /base /from-right/\n",
		"told":             "told\n", "app": t.Name(),
	})
	if result := r.Client.Bake(t, dir, "docker-bake.hcl", "--push"); result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	top := r.registry.Index(t, r.repo, "top")
	wantList(t, "platforms", top.Platforms(), "linux/amd64", "linux/arm64")
	for platform, uname := range map[string]string{"linux/amd64": "x86_64\n", "linux/arm64": "told\n"} {
		image := r.registry.Image(t, r.repo, top.For(t, platform))
		for file, want := range map[string]string{"base": uname, "left": t.Name(), "from-right/right": t.Name(), "from-right/base": uname} {
			wantEqual(t, platform+": /"+file, image.Files[file], want)
		}
	}
	for _, target := range []string{"base", "left", "right", "alone"} {
		wantList(t, "platforms of "+target, r.registry.Index(t, r.repo, target).Platforms(), "linux/amd64", "linux/arm64")
	}
	if r.Farm != nil {
		r.Farm.WaitWorkersWithin(t, goneLimit, "all slots are free", idle)
	}
}

// TestBakeLink_AGroupOfManyTargetsOnOneSlot has more targets than slots, which do not depend on each other.
func TestBakeLink_AGroupOfManyTargetsOnOneSlot(t *testing.T) {
	t.Parallel()
	r := newTightRig(t)
	var targets [][3]string
	for i := range 6 {
		targets = append(targets, [3]string{fmt.Sprint("t", i), "Dockerfile", fmt.Sprintf("  args = { N = \"%d\" }", i)})
	}
	dir := r.context(t, map[string]string{"docker-bake.hcl": r.bakeFile(targets...), "Dockerfile": "FROM scratch\nARG N\nLABEL n=$N\nCOPY app /app\n", "app": "app"})
	if result := r.Client.Bake(t, dir, "docker-bake.hcl", "--push"); result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	for i := range targets {
		index := r.registry.Index(t, r.repo, fmt.Sprint("t", i))
		for _, platform := range []string{"linux/amd64", "linux/arm64"} {
			image := r.registry.Image(t, r.repo, index.For(t, platform))
			wantEqual(t, platform+": label", image.Config.Config.Labels["n"], fmt.Sprint(i))
		}
	}
}

// TestBakeLink_AFailedTargetEndsThoseThatBuildOnIt checks that nobody goes on waiting in its slot.
func TestBakeLink_AFailedTargetEndsThoseThatBuildOnIt(t *testing.T) {
	t.Parallel()
	r := newTightRig(t)
	dir := r.context(t, map[string]string{
		"docker-bake.hcl": r.bakeFile([3]string{"base", "base.Dockerfile"}, [3]string{"top", "top.Dockerfile", "  contexts = { base = \"target:base\" }"}),
		"base.Dockerfile": "FROM scratch\nCOPY told /told\n", "told": "told",
		"top.Dockerfile": "FROM base\nCOPY --from=base /nothing /\n",
	})
	result := r.Client.Bake(t, dir, "docker-bake.hcl", "--push")
	wantFailure(t, result, "top.Dockerfile:2", "2 | >>> COPY --from=base /nothing /", "lstat /nothing: no such file")
	if r.Farm != nil {
		r.Farm.WaitWorkersWithin(t, goneLimit, "all slots are free", idle)
	}
}

// pinnedStage runs something on amd64 whatever is built for.
func pinnedStage(base string) string {
	return "FROM --platform=linux/amd64 " + base + " AS tool\nARG TARGETARCH\n" + farmtest.Run("echo for $TARGETARCH on $(/bin/busybox uname -m) > /made") +
		"\nFROM " + base + "\nCOPY --from=tool /made /made\nCOPY app /app\n"
}

func TestMove_AStagePinnedToAnotherArchitectureRunsThere(t *testing.T) {
	t.Parallel()
	for _, platforms := range []string{"linux/arm64", both} {
		t.Run(platforms, func(t *testing.T) {
			t.Parallel()
			r := newTightRig(t)
			dir := r.context(t, map[string]string{"Dockerfile": pinnedStage(r.base(t)), "app": "app"})
			result := r.Client.Build(t, "--platform", platforms, "--push", "-t", r.ref("v1"), dir)
			index := r.registry.Index(t, r.repo, "v1")
			wantList(t, "platforms", index.Platforms(), strings.Split(platforms, ",")...)
			for _, platform := range index.Platforms() {
				image := r.registry.Image(t, r.repo, index.For(t, platform))
				wantEqual(t, "configured platform", farmtest.PlatformName(&image.Config.Platform), platform)
				wantEqual(t, platform+": /made", image.Files["made"], "for "+strings.TrimPrefix(platform, "linux/")+" on x86_64\n")
			}
			if platforms == both && !direct() && !strings.Contains(result.Output, "moved to worker amd-1 (its steps execute on linux/amd64)") {
				t.Errorf("it is not told where the leg moved:\n%s", result.Output)
			}
			if r.Farm != nil {
				r.Farm.WaitWorkersWithin(t, goneLimit, "all slots are free", idle)
			}
		})
	}
}

// TestBakeLink_APinnedStageBuildsOnAnotherTarget has a leg move to another worker than the one that has its input.
func TestBakeLink_APinnedStageBuildsOnAnotherTarget(t *testing.T) {
	t.Parallel()
	r := newTightRig(t)
	dir := r.context(t, map[string]string{
		"docker-bake.hcl": r.bakeFile([3]string{"base", "base.Dockerfile"}, [3]string{"top", "top.Dockerfile", "  contexts = { base = \"target:base\" }"}),
		"base.Dockerfile": "FROM " + r.base(t) + "\nARG TARGETARCH\nLABEL arch=$TARGETARCH\nCOPY app /base-${TARGETARCH}\n", "app": "app",
		"top.Dockerfile": pinnedStage("base"),
	})
	if result := r.Client.Bake(t, dir, "docker-bake.hcl", "--push"); result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	top := r.registry.Index(t, r.repo, "top")
	for _, arch := range []string{"amd64", "arm64"} {
		image := r.registry.Image(t, r.repo, top.For(t, "linux/"+arch))
		wantEqual(t, arch+": /made", image.Files["made"], "for "+arch+" on x86_64\n")
		wantEqual(t, arch+": the base's file", image.Files["base-"+arch], "app")
		wantEqual(t, arch+": label", image.Config.Config.Labels["arch"], arch)
	}
}
