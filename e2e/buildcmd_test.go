package e2e_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// command is archfarm build for the rig's farm, not yet started.
func (r rig) buildCommand(env []string, in io.Reader, args ...string) farmtest.Spec {
	return farmtest.Spec{
		Name: "archfarm build", Path: r.tools.Archfarm, Args: append([]string{"build", "--farm", r.Addr, "--progress", "plain"}, args...), Env: env, In: in, Keep: true,
	}
}

// archfarmBuild runs archfarm build to its end.
func (r rig) archfarmBuild(t *testing.T, args ...string) farmtest.Result {
	t.Helper()
	return runSpec(t, r.buildCommand(nil, nil, args...))
}

// mustArchfarmBuild is archfarmBuild, which must succeed.
func (r rig) mustArchfarmBuild(t *testing.T, args ...string) farmtest.Result {
	t.Helper()
	return wantBuilt(t, r.archfarmBuild(t, args...))
}

func runSpec(t *testing.T, spec farmtest.Spec) farmtest.Result {
	t.Helper()
	p := farmtest.StartProcess(t, spec)
	code := p.Wait(t, buildLimit)
	return farmtest.Result{Output: p.Output(), Code: code}
}

func wantBuilt(t *testing.T, result farmtest.Result) farmtest.Result {
	t.Helper()
	if result.Code != 0 {
		t.Fatalf("archfarm build: exit code %d:\n%s", result.Code, result.Output)
	}
	return result
}

func TestBuildCommand_PushesSeveralPlatforms(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	dir, out := r.legsContext(t), farmtest.Folder(t)
	metadata, iid := filepath.Join(out, "metadata.json"), filepath.Join(out, "iid")
	result := r.mustArchfarmBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), "-t", r.ref("v1.0"), "--metadata-file", metadata, "--iidfile", iid, dir)
	for _, text := range []string{"[linux/amd64", "[linux/arm64", "pushing manifest for " + r.ref("v1.0")} {
		if !strings.Contains(result.Output, text) {
			t.Errorf("the progress does not say %q:\n%s", text, result.Output)
		}
	}
	index := r.registry.Index(t, r.repo, "v1")
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	r.checkLeg(t, index, "linux/amd64", "x86_64\n")
	r.checkLeg(t, index, "linux/arm64", "told\n")
	wantEqual(t, "v1.0", r.registry.Index(t, r.repo, "v1.0").Digest, index.Digest)
	var said struct {
		Digest     digest.Digest      `json:"containerimage.digest"`
		Descriptor ocispec.Descriptor `json:"containerimage.descriptor"`
		Name       string             `json:"image.name"`
	}
	if err := json.Unmarshal(read(t, metadata), &said); err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "the digest in --metadata-file", said.Digest, index.Digest)
	wantEqual(t, "the descriptor in --metadata-file", said.Descriptor.Digest, index.Digest)
	wantEqual(t, "the names in --metadata-file", said.Name, r.ref("v1")+","+r.ref("v1.0"))
	wantEqual(t, "--iidfile", string(read(t, iid)), index.Digest.String())

	// Without a provenance, which tells times, stock buildx makes the same of it.
	args := []string{"--platform", both, "--provenance=false", "--push", "-t", r.ref("v2"), "--iidfile", iid, dir}
	r.mustArchfarmBuild(t, args...)
	ours := r.registry.Index(t, r.repo, "v2").Digest
	r.Client.Build(t, args...)
	wantEqual(t, "buildx's digest", r.registry.Index(t, r.repo, "v2").Digest, ours)
	wantEqual(t, "buildx's --iidfile", string(read(t, iid)), ours.String())
}

func TestBuildCommand_OneOfAnArchiveOnStandardInput(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for name, content := range map[string]string{"Dockerfile": plain, "hello": "hello\n"} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	wantBuilt(t, runSpec(t, r.buildCommand(nil, &archive, "--platform", both, "--push", "-t", r.ref("v1"), "-")))
	index := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "the file of arm64", r.registry.Image(t, r.repo, index.For(t, "linux/arm64")).Files["hello-arm64"], "hello\n")
}

func TestBuildCommand_SecretsReachTheirStep(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	secret, other := nonce(t), nonce(t)
	file := farmtest.WriteFile(t, farmtest.Folder(t), "token", secret)
	dir := r.context(t, map[string]string{
		"Dockerfile": onlyOnAMD64(farmtest.Run("/bin/busybox sha256sum < /run/secrets/token > /sum; /bin/busybox sha256sum < /run/secrets/other >> /sum",
			"--mount=type=secret,id=token,required=true", "--mount=type=secret,id=other,required=true")),
		"extra/extra": t.Name(),
	})
	result := wantBuilt(t, runSpec(t, r.buildCommand([]string{"OTHER=" + other}, nil,
		"--platform", both, "--secret", "id=token,src="+file, "--secret", "id=other,env=OTHER", "--push", "-t", r.ref("v1"), dir)))
	index := r.registry.Index(t, r.repo, "v1")
	sums := strings.Fields(r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["sum"])
	wantList(t, "checksums of the secrets", sums, sha256Hex(secret), "-", sha256Hex(other), "-")
	if said := result.Output + r.Logs(); strings.Contains(said, secret) || strings.Contains(said, other) {
		t.Error("a secret is in the build's output or in a daemon's log")
	}
	wantFailure(t, r.archfarmBuild(t, "--no-cache", "--platform", both, dir), "secret token: not found")
}

func TestBuildCommand_TheSSHAgentAnswersInAStep(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	socket, fingerprint := startSSHAgent(t) // skips the test where there is none
	dir := r.context(t, map[string]string{
		"Dockerfile":  onlyOnAMD64(farmtest.Run("/extra/sshprobe > /keys", "--mount=type=ssh,required=true")),
		"extra/extra": t.Name(),
	})
	probe := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "extra", "sshprobe"), "./e2e/farmtest/sshprobe")
	probe.Dir, probe.Env = r.tools.Root, append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := probe.CombinedOutput(); err != nil {
		t.Fatalf("building sshprobe: %v: %s", err, out)
	}
	wantBuilt(t, runSpec(t, r.buildCommand([]string{"SSH_AUTH_SOCK=" + socket}, nil, "--platform", both, "--ssh", "default", "--push", "-t", r.ref("v1"), dir)))
	index := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "keys that the RUN step saw", r.registry.Image(t, r.repo, index.For(t, "linux/amd64")).Files["keys"], fingerprint+"\n")
	wantFailure(t, r.archfarmBuild(t, "--no-cache", "--platform", both, dir), "ssh")
}

// TestBuildCommand_CachesServeAnotherFarm exports a cache, and imports it where nothing has been built yet.
func TestBuildCommand_CachesServeAnotherFarm(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	elsewhere := newFarmRig(t, oneSlot())
	for name, caches := range map[string]func(jobs rig) (to, from string){
		"registry": func(r rig) (string, string) {
			return "type=registry,mode=max,ref=" + r.ref("cache"), "type=registry,ref=" + r.ref("cache")
		},
		"inline": func(r rig) (string, string) { return "type=inline", r.ref("v1") },
	} {
		t.Run(name, func(t *testing.T) {
			r := r
			r.repo = newRepo(t)
			to, from := caches(r)
			dir := r.legsContext(t)
			r.mustArchfarmBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), "--cache-to", to, dir)
			there := elsewhere
			there.registry, there.repo = r.registry, r.repo
			result := there.mustArchfarmBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("v2"), "--cache-from", from, dir)
			wantCachedRun(t, result.Output)
			r.checkLeg(t, r.registry.Index(t, r.repo, "v2"), "linux/amd64", "x86_64\n")
		})
	}
}

func TestBuildCommand_WritesAnOCIArchive(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	archive := filepath.Join(farmtest.Folder(t), "image.tar")
	result := r.mustArchfarmBuild(t, "--platform", both, "-t", "example.com/app:v1", "--output", "type=oci,dest="+archive, r.legsContext(t))
	files := map[string]string{}
	if err := farmtest.ReadTar(bytes.NewReader(read(t, archive)), files); err != nil {
		t.Fatal(err)
	}
	var top, index ocispec.Index
	readJSON(t, files["index.json"], &top)
	if len(top.Manifests) != 1 || top.Manifests[0].Annotations["io.containerd.image.name"] != "example.com/app:v1" {
		t.Fatalf("the archive's index.json is %s", files["index.json"])
	}
	readJSON(t, files["blobs/sha256/"+top.Manifests[0].Digest.Encoded()], &index)
	wantList(t, "platforms", farmtest.Index{Index: index}.Platforms(), "linux/amd64", "linux/arm64")
	if strings.Contains(result.Output, "pushing") {
		t.Errorf("something was pushed:\n%s", result.Output)
	}
}

// sourceLines is where buildx shows the Dockerfile's lines that an error is about.
var sourceLines = regexp.MustCompile(`(?s)Dockerfile:\d+\n-{20}\n.*?\n-{20}\n`)

func TestBuildCommand_AFailureShowsWhatBuildxShows(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	for name, dockerfile := range map[string]string{
		"a step":          "FROM scratch\nCOPY busybox /bin/busybox\nLABEL a=b\n" + farmtest.Run("echo told you so; exit 7") + "\nLABEL c=d\n",
		"an instruction":  "FROM scratch\nCOPY busybox /bin/busybox\nRUNN make\nLABEL c=d\n",
		"a missing file":  "FROM scratch\nLABEL a=b\nCOPY nothing /nothing\n",
		"a missing stage": "FROM scratch AS one\nFROM scratch\nLABEL a=b\nCOPY --from=registry.invalid/two /a /a\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := r.context(t, map[string]string{"Dockerfile": dockerfile})
			for _, platforms := range []string{"linux/amd64", "linux/amd64,linux/amd64/v2"} {
				metadata := filepath.Join(farmtest.Folder(t), "metadata")
				ours := r.archfarmBuild(t, "--platform", platforms, "--push", "-t", r.ref("v1"), "--metadata-file", metadata, dir)
				theirs := r.Client.TryBuild(t, "--platform", platforms, "--push", "-t", r.ref("v1"), dir)
				wantEqual(t, "the exit code", ours.Code, 1)
				want := sourceLines.FindString(theirs.Output)
				if want == "" || !strings.Contains(ours.Output, want) {
					t.Errorf("%s: archfarm build does not show what buildx shows:\n%s\n--- buildx:\n%s", platforms, ours.Output, theirs.Output)
				}
				if _, err := os.Stat(metadata); err == nil {
					t.Error("a build that failed has written --metadata-file")
				}
			}
			r.wantNoTags(t)
		})
	}
}

func TestBuildCommand_ThatMakesNoSense(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	dir := r.context(t, map[string]string{"Dockerfile": plain})
	for text, args := range map[string][]string{
		"a folder, a URL":        {},
		"needs a name":           {"--push", dir},
		"no-such-file":           {"--secret", "id=x,src=" + filepath.Join(dir, "no-such-file"), dir},
		"--platform":             {"--platform", "linux amd64", dir},
		"--output":               {"--output", "type=floppy", dir},
		"name it with --file":    {filepath.Dir(dir)},
		"no such file":           {filepath.Join(dir, "nowhere")},
		"--ssh":                  {"--ssh", "default=" + filepath.Join(dir, "nowhere"), dir},
		"Dockerfile cannot both": {"--file", "-", "-"},
	} {
		result := r.archfarmBuild(t, args...)
		if result.Code != 2 || !strings.Contains(result.Output, text) {
			t.Errorf("archfarm build %q: exit code %d, want 2 and %q:\n%s", args, result.Code, text, result.Output)
		}
	}
}

func TestBuildCommand_InterruptedEndsItsSteps(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	gate := farmtest.NewGate(t)
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + gate.Run() + "\n"})
	build := farmtest.StartProcess(t, r.buildCommand(nil, nil, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), dir))
	gate.WaitArrival(t, build, buildLimit)
	build.Signal(syscall.SIGINT)
	if code := build.Wait(t, buildLimit); code == 0 {
		t.Errorf("an interrupted build succeeds:\n%s", build.Output())
	}
	gate.WaitKilled(t, buildLimit)
	r.wantNoTags(t)
}
