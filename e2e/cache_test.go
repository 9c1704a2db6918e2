package e2e_test

import (
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
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

// twoStages builds something random in a stage of its own, which only a cache with mode=max has, and more of it after that.
var twoStages = `FROM scratch AS base
COPY busybox /bin/busybox
FROM base AS build
ARG TARGETARCH
COPY src /src
` + farmtest.Run("/bin/busybox head -c 99 /dev/urandom > /made && echo $TARGETARCH >> /made") + `
FROM base
COPY --from=build /made /made
` + farmtest.Run("/bin/busybox head -c 99 /dev/urandom > /after") + `
`

// cachedStep is how buildx shows steps that a cache may have.
var cachedStep = regexp.MustCompile(`(?m)^#(\d+) \[.*\] (?:RUN|COPY) .*`)

// wantAllCached checks that of each platform every step that a cache may have came from one.
func wantAllCached(t *testing.T, output string, steps int) {
	t.Helper()
	found := cachedStep.FindAllStringSubmatch(output, -1)
	if len(found) < steps {
		t.Errorf("%d steps in the output, want %d:\n%s", len(found), steps, output)
	}
	for _, step := range found {
		if !regexp.MustCompile(`(?m)^#` + step[1] + ` CACHED`).MatchString(output) {
			t.Errorf("%s did not come from the cache:\n%s", step[0], output)
		}
	}
}

// wantSameLayers checks that each platform's image has the layers of the first build's, some of which are random.
func (r rig) wantSameLayers(t *testing.T, tag string) {
	t.Helper()
	first, second := r.registry.Index(t, r.repo, "v1"), r.registry.Index(t, r.repo, tag)
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		want := r.registry.Manifest(t, r.repo, first.For(t, platform).Digest).Layers
		got := r.registry.Manifest(t, r.repo, second.For(t, platform).Digest).Layers
		for i := range want {
			if i >= len(got) || got[i].Digest != want[i].Digest {
				t.Errorf("%s: layer %d of %s is not that of v1", platform, i, tag)
			}
		}
	}
}

// TestCache_OfTwoPlatformsUnderOneName exports the caches of two legs to one place. A farm of which no worker has built
// anything finds both there, and so does a plain buildkitd. (With a builder of two nodes, buildx has the later node
// replace the other's cache: docker/buildx#1044.)
func TestCache_OfTwoPlatformsUnderOneName(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	for name, attrs := range map[string]string{
		"registry max":              "type=registry,mode=max",
		"registry min":              "type=registry,mode=min",
		"registry zstd":             "type=registry,mode=max,compression=zstd,force-compression=true,ignore-error=true",
		"local max":                 "type=local,mode=max",
		"local min":                 "type=local",
		"local index, under a name": "type=local,mode=max,image-manifest=false,tag=mine",
		"local, docker's types":     "type=local,mode=max,oci-mediatypes=false",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newFarmRig(t, fleet()...)
			dir := r.context(t, map[string]string{"Dockerfile": twoStages, "src": "source"})
			to, from := attrs+",ref="+r.ref("cache"), "type=registry,ref="+r.ref("cache")
			if strings.HasPrefix(attrs, "type=local") {
				place := filepath.Join(farmtest.Folder(t), "cache")
				to, from = attrs+",dest="+place, "type=local,src="+place
				if strings.Contains(attrs, "tag=mine") {
					from += ",tag=mine"
				}
			}
			compression := ""
			if strings.Contains(attrs, "zstd") {
				compression = ",compression=zstd,force-compression=true"
			}
			args := []string{"--platform", both, "--provenance=false"}
			output := func(tag string) string { return "type=image,push=true,name=" + r.ref(tag) + compression }
			result := r.Client.Build(t, append(args, "--output", output("v1"), "--cache-to", to, dir)...)
			if !regexp.MustCompile(`writing cache (image )?manifest sha256:`).MatchString(result.Output) {
				t.Errorf("nothing said of the merged cache:\n%s", result.Output)
			}
			if strings.HasPrefix(attrs, "type=registry") {
				wantList(t, "tags", r.registry.Tags(t, r.repo), "cache", "v1")
			}
			const steps = 8 // of two platforms, with 2 more that a single buildkitd does once for both
			cold := newFarmRig(t, fleet()...)
			wantAllCached(t, cold.Client.Build(t, append(args, "--output", output("v2"), "--cache-from", from, dir)...).Output, steps)
			r.wantSameLayers(t, "v2")
			plain := farmtest.StartDirect(t, r.tools)
			wantAllCached(t, plain.Client.Build(t, append(args, "--output", output("v3"), "--cache-from", from, dir)...).Output, steps)
			r.wantSameLayers(t, "v3")
		})
	}
}

// TestCache_SeveralAtOnce exports the caches of two legs to several places, some of them with more in them than others.
func TestCache_SeveralAtOnce(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	dir := r.context(t, map[string]string{"Dockerfile": twoStages, "src": "source " + t.Name()})
	place := filepath.Join(farmtest.Folder(t), "cache")
	args := []string{"--platform", both, "--provenance=false", "--push"}
	r.Client.Build(t, append(args, "-t", r.ref("v1"), "--cache-to", "type=local,mode=max,dest="+place, "--cache-to", "type=inline",
		"--cache-to", "type=registry,mode=max,ref="+r.ref("whole"), "--cache-to", "type=registry,ref="+r.ref("part"), dir)...)
	wantList(t, "tags", r.registry.Tags(t, r.repo), "part", "v1", "whole")
	plain := farmtest.StartDirect(t, r.tools)
	for tag, from := range map[string]string{
		"v2": "type=registry,ref=" + r.ref("whole"), "v3": "type=registry,ref=" + r.ref("part"), "v4": "type=local,src=" + place,
	} {
		plain.Client.Run(t, "prune", "--all", "--force")
		wantAllCached(t, plain.Client.Build(t, append(args, "-t", r.ref(tag), "--cache-from", from, dir)...).Output, 8)
		r.wantSameLayers(t, tag)
	}
	plain.Client.Run(t, "prune", "--all", "--force")
	result := plain.Client.Build(t, "--platform", both, "--target", "build", "--cache-from", "type=registry,ref="+r.ref("whole"), dir)
	wantAllCached(t, result.Output, 4)
}

// TestCache_OneThatIsEmptyHarmsNoOther has one leg that has nothing to export.
func TestCache_OneThatIsEmptyHarmsNoOther(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	dir := r.context(t, map[string]string{"src": t.Name(), "Dockerfile": "FROM scratch AS leg-amd64\nCOPY src /src\nFROM scratch AS leg-arm64\nFROM leg-${TARGETARCH}\n"})
	args := []string{"--platform", both, "--provenance=false", "--push", "-t", r.ref("v1")}
	r.Client.Build(t, append(args, "--cache-to", "type=registry,mode=max,ref="+r.ref("cache"), dir)...)
	wantList(t, "tags", r.registry.Tags(t, r.repo), "cache", "v1")
	plain := farmtest.StartDirect(t, r.tools)
	wantAllCached(t, plain.Client.Build(t, append(args, "--cache-from", "type=registry,ref="+r.ref("cache"), dir)...).Output, 1)
}

// TestCache_AnExportThatFails fails the build, and then no tag of the image has moved, unless the client said otherwise.
func TestCache_AnExportThatFails(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{Fault: func(r *http.Request) int {
		if r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/manifests/refused") {
			return http.StatusForbidden
		}
		return 0
	}})
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fleet()})
	for name, attrs := range map[string]string{
		"when it is merged": "",
		"at the legs":       ",image-manifest=false", // the registry does not take such an index
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := rigAt(t, tools, &farm.Endpoint, registry)
			dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY src /src\n", "src": t.Name()})
			args := []string{"--platform", both, "--provenance=false", "--push", "-t", r.ref("v1"), "--cache-to"}
			to := "type=registry,ref=" + r.ref("refused") + attrs
			wantFailure(t, r.Client.TryBuild(t, append(args, to, dir)...), "error writing manifest blob", "exporting cache to registry")
			r.wantNoTags(t)
			result := r.Client.Build(t, append(args, to+",ignore-error=true", dir)...)
			if !strings.Contains(result.Output, "ERROR: error writing manifest blob") {
				t.Errorf("nothing said of the cache:\n%s", result.Output)
			}
			wantList(t, "tags", r.registry.Tags(t, r.repo), "v1")
		})
	}
}

// TestCache_InlineIsCompleteForEachPlatform imports the caches inside the images of two platforms, which have steps in
// common. (One buildkitd that is given the index finds one platform's, or parts of both.)
func TestCache_InlineIsCompleteForEachPlatform(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	dir := r.context(t, map[string]string{"Dockerfile": twoStages, "src": "source " + t.Name()})
	args := []string{"--provenance=false", "--push"}
	r.Client.Build(t, append(args, "--platform", both, "-t", r.ref("v1"), "--cache-to", "type=inline", dir)...)
	args = append(args, "--cache-from", "type=registry,ref="+r.ref("v1"))
	cold := newFarmRig(t, fleet()...)
	cold.Client.Build(t, append(args, "--platform", both, "-t", r.ref("v2"), dir)...)
	r.wantSameLayers(t, "v2")
}

// TestCache_KeptPerPlatformWhereNobodyCanMerge: a worker that has built nothing finds what was exported for its platform,
// whatever else is built along with it, with the name that the client gave.
func TestCache_KeptPerPlatformWhereNobodyCanMerge(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	s3 := farmtest.StartS3(t, tools)
	actions := farmtest.StartActionsCache(t)
	for name, c := range map[string]struct {
		attrs string
		list  func(t *testing.T) []string
		want  []string
	}{
		"s3": {
			s3.Attrs + ",name=app", func(t *testing.T) []string { return s3.Objects(t, "manifests/") },
			[]string{"manifests/app", "manifests/app-linux-arm64"},
		},
		"gha": {
			actions.Attrs + ",scope=app", func(*testing.T) []string { return actions.Keys("index-") },
			[]string{"index-app-1-f921bd05#1", "index-app-linux-arm64-1-f921bd05#1"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newFarmRig(t, fleet()...)
			dir := r.context(t, map[string]string{"Dockerfile": twoStages, "src": "source"})
			args := []string{"--provenance=false", "--push"}
			r.Client.Build(t, append(args, "--platform", both, "-t", r.ref("v1"), "--cache-to", c.attrs+",mode=max", dir)...)
			wantList(t, "caches", c.list(t), c.want...)
			cold := newFarmRig(t, fleet()...)
			wantAllCached(t, cold.Client.Build(t, append(args, "--platform", both, "-t", r.ref("v2"), "--cache-from", c.attrs, dir)...).Output, 8)
			r.wantSameLayers(t, "v2")
			alone := newFarmRig(t, fleet()...)
			result := alone.Client.Build(t, append(args, "--platform", "linux/arm64", "-t", r.ref("v3"), "--cache-from", c.attrs, dir)...)
			wantAllCached(t, result.Output, 5)
		})
	}
}

// TestCache_OfAJob has the legs of a job, which are builds of their own, export to one name.
func TestCache_OfAJob(t *testing.T) {
	t.Parallel()
	r := newJobRig(t, farmtest.FarmOptions{})
	dir := r.context(t, map[string]string{"Dockerfile": twoStages, "src": "source"})
	args := []string{"--platform", both, "--tag", r.ref("v1"), "--cache-to", "type=registry,mode=max,ref=" + r.ref("cache"), "--context", dir}
	r.ended(t, r.submit(t, args...), archfarmv1.Job_STATE_SUCCEEDED)
	wantList(t, "tags", r.registry.Tags(t, r.repo), "cache", "cache-linux-amd64", "cache-linux-arm64", "v1")
	plain := farmtest.StartDirect(t, r.tools)
	for tag, client := range map[string]*farmtest.Client{"v2": newFarmRig(t, fleet()...).Client, "v3": plain.Client} {
		result := client.Build(t, "--platform", both, "--provenance=false", "--push", "-t", r.ref(tag), "--cache-from", "type=registry,ref="+r.ref("cache"), dir)
		wantAllCached(t, result.Output, 8)
		r.wantSameLayers(t, tag)
	}
}

// TestCache_OfTheFarm builds on workers that have built nothing, by clients that name no cache: what another farm with the
// same cache has pushed before is there, for each platform, whatever is built along with it. Without it, it is not.
func TestCache_OfTheFarm(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	start := func(flags ...string) rig {
		return rigAt(t, tools, &farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fleet(), CoordinatorArgs: flags}).Endpoint, registry)
	}
	flag := "--cache=" + registry.Host + "/farm/{{.Repository}}"
	first := start(flag)
	dir := first.context(t, map[string]string{"src": "source", "Dockerfile": strings.Replace(twoStages, "COPY src /src\n",
		"COPY src /src\n"+farmtest.Run("i=0; while [ $i -lt 400000 ]; do i=$((i+1)); done")+"\n", 1)})
	build := func(r rig, platforms, tag string, more ...string) (farmtest.Result, time.Duration) {
		r.repo = first.repo
		began := time.Now()
		result := r.Client.Build(t, append(append([]string{"--platform", platforms, "--provenance=false", "-t", r.ref(tag)}, more...), dir)...)
		return result, time.Since(began)
	}
	told := filepath.Join(farmtest.Folder(t), "metadata.json")
	result, _ := build(first, both, "v1", "--push", "--metadata-file", told)
	if raw, err := os.ReadFile(told); err != nil || strings.Contains(string(raw), "cache.manifest") {
		t.Errorf("the client is told of a cache that it has not asked for: %s, %v", raw, err)
	}
	if strings.Contains(result.Output, "ERROR") {
		t.Errorf("that there is no cache yet is no error of the client's:\n%s", result.Output)
	}
	wantList(t, "caches", registry.Tags(t, "farm/default/"+first.repo), "linux-amd64", "linux-arm64")

	result, with := build(start(flag), both, "v2", "--push")
	wantAllCached(t, result.Output, 12)
	first.wantSameLayers(t, "v2")
	result, _ = build(start(flag), "linux/arm64", "v3", "--push")
	wantAllCached(t, result.Output, 6)

	result, without := build(start(), both, "v4", "--push")
	if regexp.MustCompile(`(?m)^#\d+ CACHED`).MatchString(result.Output) {
		t.Errorf("without the cache, workers that are cold had something:\n%s", result.Output)
	}
	t.Logf("two platforms on cold workers: %s with the farm's cache, %s without", with.Round(time.Millisecond), without.Round(time.Millisecond))
}

// TestCache_AWorkerLostWhileItExports: the leg goes on elsewhere, and its cache is that of the attempt that succeeded.
func TestCache_AWorkerLostWhileItExports(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	arrived, leave := make(chan struct{}), make(chan struct{})
	var once sync.Once
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{Fault: func(r *http.Request) int {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/caches/manifests/") {
			once.Do(func() { // the amd64 leg's: the other one has nothing to export
				close(arrived)
				<-leave
			})
		}
		return 0
	}})
	letGo := sync.OnceFunc(func() { close(leave) })
	t.Cleanup(letGo)
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{
		{Name: "amd-1", Slots: 2}, {Name: "amd-2", Slots: 1}, {Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 1},
	}})
	r := rigAt(t, tools, &farm.Endpoint, registry)
	dir := r.context(t, map[string]string{"src": "source", "Dockerfile": "FROM scratch AS leg-amd64\nCOPY busybox /bin/busybox\n" +
		farmtest.Run("/bin/busybox head -c 99 /dev/urandom > /made") + "\nFROM scratch AS leg-arm64\nFROM leg-${TARGETARCH}\n"})
	args := []string{"--platform", both, "--provenance=false", "--push"}
	cache := r.registry.Host + "/caches:app"
	build := r.Client.StartBuild(t, append(args, "-t", r.ref("v1"), "--cache-to", "type=registry,mode=max,ref="+cache, dir)...)
	select {
	case <-arrived:
	case <-time.After(buildLimit):
		t.Fatalf("no cache is exported:\n%s", build.Output())
	}
	lost, _ := r.amd(t, build)
	lost.Buildkitd.Kill()
	letGo()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	if !strings.Contains(build.Output(), "worker "+lost.Name+" was lost; continuing on ") {
		t.Errorf("the leg was not continued:\n%s", build.Output())
	}
	wantList(t, "caches", r.registry.Tags(t, "caches"), "app")
	plain := farmtest.StartDirect(t, r.tools)
	wantAllCached(t, plain.Client.Build(t, append(args, "-t", r.ref("v2"), "--cache-from", "type=registry,ref="+cache, dir)...).Output, 2)
	r.wantSameLayers(t, "v2")
}
