package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const both = "linux/amd64,linux/arm64"

func TestBuild_OnePlatformIsPushed(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Client.Build(t, "--platform", "linux/amd64", "--provenance=false", "--push", "-t", r.ref("v1"), r.legsContext(t))
	// BuildKit writes a bare manifest, not an index, for one platform without attestations.
	single := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "media type", single.MediaType, "application/vnd.oci.image.manifest.v1+json")
	image := r.registry.Image(t, r.repo, farmtest.Descriptor(single))
	r.checkImage(t, image, "linux/amd64", "x86_64\n")
}

func TestBuild_OnePlatformOfAForeignArchitecture(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Client.Build(t, "--platform", "linux/arm64", "--push", "-t", r.ref("v1"), r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/arm64")
	r.checkLeg(t, index, "linux/arm64", "told\n")
}

func TestBuild_WithoutAPlatformTheFarmsFirstOneIsBuilt(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Client.Build(t, "--push", "-t", r.ref("v1"), r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64")
	r.checkLeg(t, index, "linux/amd64", "x86_64\n")
}

func TestBuild_TwoPlatformsInTheAskedOrder(t *testing.T) {
	t.Parallel()
	for name, platforms := range map[string][]string{
		"amd64 first": {"linux/amd64", "linux/arm64"},
		"arm64 first": {"linux/arm64", "linux/amd64"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.Client.Build(t, "--platform", strings.Join(platforms, ","), "--push", "-t", r.ref("v1"), r.legsContext(t))
			index := r.registry.Index(t, r.repo, "v1")
			wantEqual(t, "media type", index.MediaType, "application/vnd.oci.image.index.v1+json")
			wantList(t, "platforms", index.Platforms(), platforms...)
			r.checkLeg(t, index, "linux/amd64", "x86_64\n")
			r.checkLeg(t, index, "linux/arm64", "told\n")
		})
	}
}

func TestBuild_SeveralTagsAndRepositories(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	other := newRepo(t)
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), "-t", r.ref("latest"),
		"-t", r.registry.Host+"/"+other+":v1", r.legsContext(t))
	wantList(t, "tags", r.registry.Tags(t, r.repo), "latest", "v1")
	wantList(t, "tags of the other repository", r.registry.Tags(t, other), "v1")
	first := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "digest of latest", r.registry.Index(t, r.repo, "latest").Digest, first.Digest)
	second := r.registry.Index(t, other, "v1")
	wantEqual(t, "digest in the other repository", second.Digest, first.Digest)
	r.checkLeg(t, second, "linux/amd64", "x86_64\n") // its blobs are in this repository too
	r.checkLeg(t, second, "linux/arm64", "told\n")
}

func TestBuild_SixAtOnceOnOneSlotForEachPlatform(t *testing.T) {
	t.Parallel()
	var r rig
	if direct() {
		r = newRig(t)
	} else {
		r = newFarmRig(t, oneSlot(), farmtest.WorkerSpec{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1})
	}
	var builds []*farmtest.Process
	for i := range 6 {
		dir := r.context(t, map[string]string{"Dockerfile": legs, "told": "told\n", "app": fmt.Sprintf("app %d", i)})
		builds = append(builds, r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.ref(fmt.Sprintf("v%d", i)), dir))
	}
	for i, build := range builds {
		if code := build.Wait(t, buildLimit); code != 0 {
			t.Errorf("build %d: exit code %d:\n%s", i, code, build.Output())
			continue
		}
		index := r.registry.Index(t, r.repo, fmt.Sprintf("v%d", i))
		wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
		for _, platform := range index.Platforms() {
			image := r.registry.Image(t, r.repo, index.For(t, platform))
			wantEqual(t, fmt.Sprintf("/app of build %d for %s", i, platform), image.Files["app"], fmt.Sprintf("app %d", i))
		}
	}
}

func TestBuild_EachLegHoldsASlotOfItsOwnWorker(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, fleet()...)
	// Both legs are held while they load a file, which executes nothing.
	amd, arm := farmtest.NewGate(t), farmtest.NewGate(t)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch AS leg-amd64\nADD " + amd.URL + "/file /\n" +
		"FROM scratch AS leg-arm64\nADD " + arm.URL + "/file /\nFROM leg-${TARGETARCH}\n"})
	build := r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), dir)
	amd.WaitArrival(t, build, startLimit)
	arm.WaitArrival(t, build, startLimit)
	list, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range list {
		wantEqual(t, "slots in use of "+w.Name, w.Slots.Used, 1)
	}
	amd.Open()
	arm.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	r.Farm.WaitWorkersWithin(t, goneLimit, "all slots are free", idle)
	wantList(t, "platforms", r.registry.Index(t, r.repo, "v1").Platforms(), "linux/amd64", "linux/arm64")
}

func TestBuild_CopyOnlyForAPlatformThatNobodyHas(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY app /app\n", "app": "for a mainframe"})
	r.Client.Build(t, "--platform", "linux/amd64,linux/s390x", "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/s390x")
	image := r.registry.Image(t, r.repo, index.For(t, "linux/s390x"))
	wantEqual(t, "architecture", image.Config.Architecture, "s390x")
	wantEqual(t, "/app", image.Files["app"], "for a mainframe")
}

// TestBuild_CrossCompiledStageRunsOnTheBuildPlatform needs a real base image: of FROM scratch BuildKit ignores --platform.
func TestBuild_CrossCompiledStageRunsOnTheBuildPlatform(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	base := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n"})
	r.Client.Build(t, "--platform", "linux/amd64", "--push", "-t", r.ref("base"), base)
	dockerfile := "FROM --platform=$BUILDPLATFORM " + r.ref("base") + " AS compile\nARG TARGETARCH\n" +
		farmtest.Run("echo for $TARGETARCH on $(/bin/busybox uname -m) > /out") +
		"\nFROM scratch\nCOPY --from=compile /out /out\n"
	dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
	r.Client.Build(t, "--platform", "linux/amd64,linux/s390x", "--push", "-t", r.ref("v1"), dir)
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/s390x")
	for arch, platform := range map[string]string{"amd64": "linux/amd64", "s390x": "linux/s390x"} {
		image := r.registry.Image(t, r.repo, index.For(t, platform))
		wantEqual(t, platform+": /out", image.Files["out"], "for "+arch+" on x86_64\n")
	}
}

// TestBuild_IndexEqualsThatOfOneBuildkitd is the strongest content check: with time stamps pinned, the farm's index
// has the very digest that one buildkitd building all platforms gives it.
func TestBuild_IndexEqualsThatOfOneBuildkitd(t *testing.T) {
	t.Parallel()
	for name, extra := range map[string][]string{
		"plain":        nil,
		"docker types": {"oci-mediatypes=false"},
		"annotated":    {"annotation-index.farm=yes", "annotation-manifest[linux/arm64].leg=arm", "annotation.all=x"},
		"zstd layers":  {"compression=zstd", "force-compression=true"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			plain := farmtest.StartDirect(t, r.tools)
			dir := r.context(t, map[string]string{
				"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nCOPY sub /sub\nARG TARGETARCH\nENV ARCH=$TARGETARCH\n",
				"sub/a":      "a", "sub/b": "b",
			})
			build := func(client *farmtest.Client, tag string) farmtest.Index {
				output := append([]string{"type=image", "name=" + r.ref(tag), "push=true", "rewrite-timestamp=true"}, extra...)
				client.Build(t, "--platform", both, "--provenance=false", "--build-arg", "SOURCE_DATE_EPOCH=1700000000",
					"--output", strings.Join(output, ","), dir)
				return r.registry.Index(t, r.repo, tag)
			}
			farm, one := build(r.Client, "farm"), build(plain.Client, "one")
			if farm.Digest != one.Digest {
				t.Errorf("the farm's index %s differs from that of one buildkitd %s:\n%s\n%s", farm.Digest, one.Digest, farm.Raw, one.Raw)
			}
			wantList(t, "platforms", farm.Platforms(), "linux/amd64", "linux/arm64")
		})
	}
}

func TestBuildctl_OneAndTwoPlatforms(t *testing.T) {
	t.Parallel()
	for _, platforms := range []string{"linux/amd64", both} {
		t.Run(platforms, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			dir := r.legsContext(t)
			metadata := filepath.Join(farmtest.Folder(t), "metadata.json")
			result := farmtest.Buildctl(t, r.tools, r.Addr, "build", "--progress=plain", "--frontend", "dockerfile.v0",
				"--local", "context="+dir, "--local", "dockerfile="+dir, "--opt", "platform="+platforms,
				"--output", "type=image,name="+r.ref("v1")+",push=true", "--metadata-file", metadata)
			if result.Code != 0 {
				t.Fatalf("buildctl: exit code %d:\n%s", result.Code, result.Output)
			}
			index := r.registry.Index(t, r.repo, "v1")
			wantEqual(t, "digest in the metadata", readMetadata(t, metadata).Digest, index.Digest.String())
			if platforms != both {
				r.checkImage(t, r.registry.Image(t, r.repo, farmtest.Descriptor(index)), "linux/amd64", "x86_64\n")
				return
			}
			wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
			r.checkLeg(t, index, "linux/amd64", "x86_64\n")
			r.checkLeg(t, index, "linux/arm64", "told\n")
		})
	}
}

func TestExport_TarAndLocalOfOnePlatform(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	out := farmtest.Folder(t)
	dir := r.legsContext(t)
	tarball, folder := filepath.Join(out, "image.tar"), filepath.Join(out, "image")
	r.Client.Build(t, "--platform", "linux/amd64", "--output", "type=tar,dest="+tarball, dir)
	r.Client.Build(t, "--platform", "linux/amd64", "--output", "type=local,dest="+folder, dir)

	archive, err := os.Open(tarball)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	files := map[string]string{}
	if err := farmtest.ReadTar(archive, files); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "/uname in the archive", files["uname"], "x86_64\n")
	wantEqual(t, "/app in the archive", files["app"], "app of "+t.Name())
	wantEqual(t, "/uname in the folder", readFile(t, folder, "uname"), "x86_64\n")
	wantEqual(t, "/app in the folder", readFile(t, folder, "app"), "app of "+t.Name())
}

func TestExport_LocalOfTwoPlatformsHasAFolderForEach(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	out := farmtest.Folder(t)
	r.Client.Build(t, "--platform", both, "--output", "type=local,dest="+out, r.legsContext(t))
	wantEqual(t, "amd64's /uname", readFile(t, out, "linux_amd64/uname"), "x86_64\n")
	wantEqual(t, "arm64's /uname", readFile(t, out, "linux_arm64/uname"), "told\n")
}

func TestExport_OCIArchiveOfOnePlatform(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(farmtest.Folder(t), "oci.tar")
	r.Client.Build(t, "--platform", "linux/arm64", "--output", "type=oci,dest="+file, r.legsContext(t))
	archive, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	files := map[string]string{}
	if err := farmtest.ReadTar(archive, files); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(files["index.json"], `"manifests"`) || files["oci-layout"] == "" {
		t.Errorf("not an OCI layout: %d files, index.json: %s", len(files), files["index.json"])
	}
}

func readFile(t *testing.T, dir, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Error(err)
	}
	return string(content)
}
