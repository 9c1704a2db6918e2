package e2e_test

import (
	"slices"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

func TestInputs_BuildArgsReachEveryLeg(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{
		"Dockerfile": "FROM scratch\nARG VERSION=none\nARG TARGETARCH\nLABEL version=$VERSION-$TARGETARCH\nCOPY app /app\n", "app": "app",
	})
	r.Client.Build(t, "--platform", both, "--build-arg", "VERSION=1.2", "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	for platform, want := range map[string]string{"linux/amd64": "1.2-amd64", "linux/arm64": "1.2-arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": label", image.Config.Config.Labels["version"], want)
	}
}

func TestInputs_NamedContexts(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY --from=docs manual /manual\nCOPY --from=src a /src/a\n"})
	docs := r.context(t, map[string]string{"manual": "the manual", "secret": "not asked for"})
	src := r.context(t, map[string]string{"a": "source"})
	r.Client.Build(t, "--platform", both, "--build-context", "docs="+docs, "--build-context", "src="+src,
		"--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": /manual", image.Files["manual"], "the manual")
		wantEqual(t, platform+": /src/a", image.Files["src/a"], "source")
		wantEqual(t, platform+": number of files", len(image.Files), 2)
	}
}

func TestInputs_TargetStopsAtItsStage(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dockerfile := "FROM scratch AS early\nCOPY app /early\nFROM early AS late\nCOPY app /late\nCOPY does-not-exist /\n"
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile, "app": "app"})
	r.Client.Build(t, "--platform", both, "--target", "early", "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": /early", image.Files["early"], "app")
		wantEqual(t, platform+": number of files", len(image.Files), 1)
	}
}

func TestInputs_DockerignoreKeepsFilesOut(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{
		"Dockerfile":    "FROM scratch\nCOPY . /\n",
		".dockerignore": "busybox\n.dockerignore\nDockerfile\nprivate\n**/*.log\n!keep.log\n",
		"app":           "app", "private/key": "key", "sub/x.log": "log", "keep.log": "kept",
	})
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		var names []string
		for name := range image.Files {
			names = append(names, name)
		}
		slices.Sort(names)
		wantList(t, platform+": files", names, "app", "keep.log")
	}
}

// TestInputs_DockerfileOutsideTheContext checks that the Dockerfile of -f wins over the one in the context.
func TestInputs_DockerfileOutsideTheContext(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	elsewhere := farmtest.Folder(t)
	file := farmtest.WriteFile(t, elsewhere, "other.Dockerfile", "FROM scratch\nCOPY app /from-elsewhere\n")
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY does-not-exist /\n", "app": "app"})
	r.Client.Build(t, "--platform", both, "-f", file, "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": file", image.Files["from-elsewhere"], "app")
	}
}
