package e2e_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// pipelines is a secured farm as docs/ci.md has it, and a runner of CI jobs with a token and nothing else.
type pipelines struct {
	rig
	https string // the farm's HTTP API
	home  string // the runner's
	token string
}

const ciPassword = "registry-password-2"

func newPipelines(t *testing.T) pipelines {
	t.Helper()
	farmOnly(t)
	for _, program := range []string{"bash", "curl", "git", "jq"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Fatalf("the scripts of deploy/ci need it: %v", err)
		}
	}
	tools, network := farmtest.FindFarmTools(t), farmtest.NewNetwork(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{User: "ci", Password: ciPassword})
	web := network.Free(t)
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Host: network.Host, Workers: fleet(), CoordinatorArgs: []string{"--http", web}})
	p := pipelines{rig: rigAt(t, tools, &farm.Endpoint, registry), https: "https://" + web, home: farmtest.Folder(t)}
	p.token = farm.Token(t, "--client", "--tenant", "acme", "--uses", "10000", "--ttl", "2160h", "--cert-ttl", "2h")
	for password, name := range map[string]string{ciPassword: "docker", "outdated": "outdated"} {
		auth := base64.StdEncoding.EncodeToString([]byte("ci:" + password))
		farmtest.WriteFile(t, p.home, name+"/config.json", fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, registry.Host, auth))
	}
	if err := os.Mkdir(filepath.Join(p.home, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(tools.Archfarm, filepath.Join(p.home, "bin", "archfarm")); err != nil {
		t.Fatal(err)
	}
	return p
}

// image is the repository that a scenario publishes to.
func (p pipelines) image(name string) string { return p.registry.Host + "/" + p.repo + "/" + name }

// script is a run of one of deploy/ci's scripts in a checkout.
func (p pipelines) script(t *testing.T, name, dir string, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", filepath.Join(p.tools.Root, "deploy", "ci", name))
	cmd.Dir = dir
	cmd.Env = append([]string{
		"PATH=" + filepath.Join(p.home, "bin") + ":" + os.Getenv("PATH"), "HOME=" + p.home, "DOCKER_CONFIG=" + filepath.Join(p.home, "docker"),
		"GORACE=atexit_sleep_ms=0",
	}, env...)
	cmd.WaitDelay = time.Second
	return cmd
}

// ran is what a script has said.
type ran struct {
	image string // IMAGE@DIGEST, the only thing on standard output
	job   string
	log   string
	code  int
}

var jobLine = regexp.MustCompile(`(?m)^archfarm: job ([0-9a-f-]+)$`)

func (p pipelines) run(t *testing.T, cmd *exec.Cmd) ran {
	t.Helper()
	return p.start(t, cmd)()
}

// start starts a script; wait returns what it has said once it has ended.
func (p pipelines) start(t *testing.T, cmd *exec.Cmd) (wait func() ran) {
	t.Helper()
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return func() ran {
		_ = cmd.Wait() // the exit code tells
		r := ran{image: strings.TrimSpace(out.String()), log: log.String(), code: cmd.ProcessState.ExitCode()}
		if m := jobLine.FindStringSubmatch(r.log); m != nil {
			r.job = m[1]
		}
		return r
	}
}

// wantPublished checks that a run has succeeded, and that the image that it prints is what the commit's tag means, of both
// platforms.
func (p pipelines) wantPublished(t *testing.T, r ran, name, sha string) {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d:\n%s", r.code, r.log)
	}
	repo := p.repo + "/" + name
	wantList(t, "tags", p.registry.Tags(t, repo), sha)
	index := p.registry.Index(t, repo, sha)
	wantEqual(t, "what it prints", r.image, p.image(name)+"@"+index.Digest.String())
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	wantEqual(t, "the file of arm64", p.registry.Image(t, repo, index.For(t, "linux/arm64")).Files["hello-arm64"], "hello\n")
}

// TestPipeline_InPlainShell runs deploy/ci/pipeline.sh as a CI system does, on runners that have nothing but a token.
func TestPipeline_InPlainShell(t *testing.T) {
	t.Parallel()
	p := newPipelines(t)
	gate := farmtest.NewGate(t)
	gated := "FROM scratch AS base-arm64\nFROM scratch AS base-amd64\nCOPY busybox /bin/busybox\n" + gate.Run() + "\nFROM base-$TARGETARCH\nARG TARGETARCH\nCOPY hello /hello-$TARGETARCH\n"
	dir := p.context(t, map[string]string{"Dockerfile": plain, "gated": gated, "hello": "hello\n"})
	sha := commit(t, dir)
	pipeline := func(dir, name string, env ...string) *exec.Cmd {
		return p.script(t, "pipeline.sh", dir, append([]string{"IMAGE=" + p.image(name), "RUN_ID=run-" + name, "ARCHFARM_TOKEN=" + p.token}, env...)...)
	}

	t.Run("a run, and again on another runner", func(t *testing.T) {
		first := p.run(t, pipeline(dir, "app"))
		p.wantPublished(t, first, "app", sha)
		checkout := filepath.Join(farmtest.Folder(t), "checkout")
		git(t, dir, "clone", "--quiet", dir, checkout)
		git(t, checkout, "remote", "set-url", "origin", "https://git.example/team/app.git")
		git(t, dir, "remote", "add", "origin", "https://git.example/team/app.git")
		again := p.run(t, pipeline(dir, "again"))
		p.wantPublished(t, again, "again", sha)
		elsewhere := p.run(t, pipeline(checkout, "again"))
		p.wantPublished(t, elsewhere, "again", sha)
		wantEqual(t, "the job of the same run", elsewhere.job, again.job)
	})
	t.Run("a run that failed", func(t *testing.T) {
		failed := p.run(t, pipeline(dir, "failing", "DOCKER_CONFIG="+filepath.Join(p.home, "outdated")))
		if failed.code != 1 || failed.image != "" || !strings.Contains(failed.log, "401 Unauthorized") {
			t.Fatalf("exit code %d, %q on standard output:\n%s", failed.code, failed.image, failed.log)
		}
		p.wantPublished(t, p.run(t, pipeline(dir, "failing")), "failing", sha)
	})
	t.Run("a run that is cancelled", func(t *testing.T) {
		cmd := pipeline(dir, "cancelled", "ARCHFARM_FILE=gated")
		wait := p.start(t, cmd)
		gate.WaitArrival(t, p.Farm.Coordinator, jobLimit)
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		cancelled := wait()
		if cancelled.code != 130 || cancelled.image != "" {
			t.Fatalf("exit code %d, %q on standard output:\n%s", cancelled.code, cancelled.image, cancelled.log)
		}
		gate.WaitKilled(t, jobLimit)
		gate.Open()
		again := p.run(t, pipeline(dir, "cancelled", "ARCHFARM_FILE=gated"))
		p.wantPublished(t, again, "cancelled", sha)
		if again.job == cancelled.job {
			t.Errorf("the cancelled job %s has published something", again.job)
		}
	})
	t.Run("a run that makes no sense", func(t *testing.T) {
		refused := p.run(t, pipeline(dir, "NoSuchThing"))
		if refused.code == 0 || refused.image != "" || !strings.Contains(refused.log, "must be lowercase") {
			t.Fatalf("exit code %d, %q on standard output:\n%s", refused.code, refused.image, refused.log)
		}
	})
}

// TestPipeline_WithCurl runs deploy/ci/curl.sh, over HTTPS with a client's certificate.
func TestPipeline_WithCurl(t *testing.T) {
	t.Parallel()
	p := newPipelines(t)
	_, certificate := p.Farm.Secured(t, "--tenant", "acme")
	dir := p.context(t, map[string]string{"Dockerfile": plain, "hello": "hello\n"})
	sha := commit(t, dir)
	url := serveGit(t, dir, "")
	curl := func(name string, env ...string) ran {
		return p.run(t, p.script(t, "curl.sh", dir, append([]string{
			"FARM=" + p.https, "IMAGE=" + p.image(name), "RUN_ID=run-" + name, "ARCHFARM_CERT_DIR=" + certificate,
			"REGISTRY_USER=ci", "REGISTRY_PASSWORD=" + ciPassword, "POLL=0.2",
		}, env...)...))
	}
	t.Run("of a repository", func(t *testing.T) {
		p.wantPublished(t, curl("git", "GIT_URL="+url, "GIT_REF=main"), "git", sha)
	})
	t.Run("of a checkout", func(t *testing.T) {
		first := curl("checkout")
		p.wantPublished(t, first, "checkout", sha)
		again := curl("checkout")
		p.wantPublished(t, again, "checkout", sha)
		wantEqual(t, "the job of the same run", again.job, first.job)
	})
	t.Run("that failed", func(t *testing.T) {
		failed := curl("failing", "REGISTRY_PASSWORD=outdated")
		if failed.code != 1 || failed.image != "" || !strings.Contains(failed.log, "401 Unauthorized") {
			t.Fatalf("exit code %d, %q on standard output:\n%s", failed.code, failed.image, failed.log)
		}
		p.wantPublished(t, curl("failing"), "failing", sha)
	})
	t.Run("that is refused", func(t *testing.T) {
		for name, want := range map[string]string{"NoSuchThing": "spec.tags[0]", "nowhere": "there is no branch, tag or commit"} {
			if refused := curl(name, "GIT_URL="+url, "GIT_REF=nowhere"); refused.code == 0 || refused.image != "" || !strings.Contains(refused.log, want) {
				t.Errorf("%s: exit code %d, %q on standard output:\n%s", name, refused.code, refused.image, refused.log)
			}
		}
	})
	t.Run("of a stranger", func(t *testing.T) {
		_, other := p.Farm.Secured(t, "--tenant", "others", "--name", "stranger")
		if got := curl("checkout", "ARCHFARM_CERT_DIR="+other); got.code == 0 || !strings.Contains(got.log, "immutable") {
			t.Errorf("exit code %d, %q on standard output:\n%s", got.code, got.image, got.log)
		}
	})
}
