package e2e_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// jobLimit is how long a job of some small steps may take on a busy machine.
const jobLimit = 2 * time.Minute

// jobRig is a farm that jobs are submitted to.
type jobRig struct {
	rig
	client *client.Client
}

// newJobRig returns a farm of the test's own with a native worker and one that poses as arm64.
func newJobRig(t *testing.T, options farmtest.FarmOptions) jobRig {
	t.Helper()
	if options.Workers == nil {
		options.Workers = fleet()
		for i := range options.Workers {
			options.Workers[i].Dials = true // at once again after a restart
		}
	}
	return jobsAt(t, newFarm(t, options))
}

func jobsAt(t *testing.T, r rig) jobRig {
	t.Helper()
	farm, err := client.Dial(client.Config{Farm: r.Farm.Addr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = farm.Close() })
	return jobRig{r, farm}
}

// submit submits by the command line, and returns the job's id.
func (r jobRig) submit(t *testing.T, args ...string) string {
	t.Helper()
	result := r.Farm.Archfarm(t, "submit", append([]string{"--output", "json"}, args...)...)
	if result.Code != 0 {
		t.Fatalf("archfarm submit %s: exit code %d:\n%s", strings.Join(args, " "), result.Code, result.Output)
	}
	var made struct {
		ID string `json:"id"`
	}
	readJSON(t, result.Output, &made)
	if made.ID == "" {
		t.Fatalf("archfarm submit prints no id:\n%s", result.Output)
	}
	return made.ID
}

// ended waits for a job's end, and checks how it ended.
func (r jobRig) ended(t *testing.T, id string, want archfarmv1.Job_State) *archfarmv1.Job {
	t.Helper()
	var job *archfarmv1.Job
	farmtest.Eventually(t, jobLimit, "job "+id+" has ended", func() (string, bool) {
		var err error
		if job, err = r.client.Get(t.Context(), id); err != nil {
			return err.Error(), false
		}
		return job.String(), client.Ended(job.GetState())
	})
	if job.GetState() != want {
		t.Fatalf("job %s is %s, want %s: %s\n%s", id, job.GetState(), want, job.GetError(), r.Farm.Archfarm(t, "logs", id).Output)
	}
	return job
}

// readJSON reads the JSON that a command has printed, behind what it said on standard error.
func readJSON(t *testing.T, output string, into any) {
	t.Helper()
	start := strings.IndexAny(output, "{[")
	if start < 0 {
		t.Fatalf("no JSON in:\n%s", output)
	}
	if err := json.NewDecoder(strings.NewReader(output[start:])).Decode(into); err != nil {
		t.Fatalf("reading JSON: %v:\n%s", err, output)
	}
}

// git runs a git command in a folder.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v:\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit makes a folder the work tree of a repository, or adds to it, and returns the commit.
func commit(t *testing.T, dir string) string {
	t.Helper()
	if _, err := os.Stat(filepath.Join(dir, ".git")); err != nil {
		git(t, dir, "init", "--quiet", "--initial-branch=main")
	}
	git(t, dir, "add", "--all")
	git(t, dir, "commit", "--quiet", "--message=work")
	return git(t, dir, "rev-parse", "HEAD")
}

// serveGit serves the repository of a work tree over HTTP, to those with the password if there is one.
func serveGit(t *testing.T, dir, password string) (url string) {
	t.Helper()
	backend := &cgi.Handler{
		Path: filepath.Join(git(t, dir, "--exec-path"), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=2", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*", "GIT_CONFIG_KEY_1=uploadpack.allowAnySHA1InWant", "GIT_CONFIG_VALUE_1=true"},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, given, _ := req.BasicAuth(); password != "" && given != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		backend.ServeHTTP(w, req)
	}))
	t.Cleanup(server.Close)
	return server.URL + "/.git"
}

// plain is a Dockerfile without a step that runs, so that it can be built for arm64 anywhere.
const plain = "FROM scratch\nARG TARGETARCH\nCOPY hello /hello-$TARGETARCH\n"

func TestJob_AFolderIsBuiltForEachPlatformAndTaggedOnce(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{})
	dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": "hello\n", "secret.txt": "x", ".dockerignore": "*.txt\n.git\n"})
	sha := commit(t, dir)
	result := r.Farm.Archfarm(t, "submit", "--context", dir, "--platform", both, "--tag", r.ref("{{.ShortSHA}}"), "--tag", r.ref("latest"), "--wait", "--progress", "plain")
	if result.Code != 0 {
		t.Fatalf("archfarm submit --wait: exit code %d:\n%s", result.Code, result.Output)
	}
	for _, text := range []string{"[linux/amd64", "[linux/arm64", "COPY hello"} {
		if !strings.Contains(result.Output, text) {
			t.Errorf("the progress does not show %q:\n%s", text, result.Output)
		}
	}
	tags := r.registry.Tags(t, r.repo)
	if len(tags) != 2 || !slices.Contains(tags, "latest") || !strings.HasPrefix(sha, tags[0]) {
		t.Fatalf("tags %q, want the short form of %s and latest", tags, sha)
	}
	index := r.registry.Index(t, r.repo, tags[0])
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	for platform, file := range map[string]string{"linux/amd64": "hello-amd64", "linux/arm64": "hello-arm64"} {
		wantEqual(t, file, r.registry.Image(t, r.repo, index.For(t, platform)).Files[file], "hello\n")
	}

	var jobs []struct {
		ID, State, Digest string
		Tags              []string
	}
	readJSON(t, r.Farm.Archfarm(t, "jobs", "--output", "json", "--state", "succeeded", "--repo", r.registry.Host+"/"+r.repo).Output, &jobs)
	if len(jobs) != 1 || jobs[0].State != "succeeded" || jobs[0].Digest != index.Digest.String() || len(jobs[0].Tags) != 2 {
		t.Errorf("archfarm jobs says %+v, want one that succeeded with %s", jobs, index.Digest)
	}
	job := r.ended(t, jobs[0].ID, archfarmv1.Job_STATE_SUCCEEDED)
	if got := job.GetSpec().GetContext().GetSource().GetCommit(); got != sha {
		t.Errorf("the job's commit is %q, want %s", got, sha)
	}
	var bound []struct{ Tag, Digest, State, Job string }
	readJSON(t, r.Farm.Archfarm(t, "tags", "--output", "json", r.registry.Host+"/"+r.repo).Output, &bound)
	if len(bound) != 2 || bound[0].Digest != index.Digest.String() || bound[0].State != "published" || bound[0].Job != job.GetId() {
		t.Errorf("archfarm tags says %+v", bound)
	}
	if logs := r.Farm.Archfarm(t, "logs", job.GetId()); logs.Code != 0 {
		t.Errorf("archfarm logs: exit code %d: %s", logs.Code, logs.Output)
	}
}

func TestJob_AnImmutableTagMeansOneDigestThroughBothDoors(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{})
	dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": "one\n"})
	first := r.ended(t, r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("v1.0.0")), archfarmv1.Job_STATE_SUCCEEDED)
	same := r.ended(t, r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("v1.0.0"), "--provenance", "false"), archfarmv1.Job_STATE_FAILED)

	farmtest.WriteFile(t, dir, "hello", "two\n")
	second := r.ended(t, r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("v1.0.0")), archfarmv1.Job_STATE_FAILED)
	for _, refused := range []*archfarmv1.Job{same, second} {
		for _, text := range []string{first.GetDigest(), first.GetId(), "immutable"} {
			if !strings.Contains(refused.GetError(), text) {
				t.Errorf("the refusal %q does not say %q", refused.GetError(), text)
			}
		}
	}
	wantEqual(t, "the tag", r.registry.Index(t, r.repo, "v1.0.0").Digest.String(), first.GetDigest())

	// The other door warns, as its policy is by default, and says so to a stock client.
	pushed := r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1.0.0"), "--progress", "plain", dir)
	for _, text := range []string{"immutable", first.GetDigest()} {
		if !strings.Contains(pushed.Output, text) {
			t.Errorf("buildx build --push over an immutable tag does not say %q:\n%s", text, pushed.Output)
		}
	}
}

func TestJob_APushOverAnImmutableTagIsRefusedWhereThePolicySaysSo(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{CoordinatorArgs: []string{"--push-policy", "enforce"}})
	for name, platforms := range map[string]string{"several platforms": both, "one platform": "linux/amd64"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := r
			r.repo = newRepo(t)
			dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": "one\n"})
			meta := filepath.Join(farmtest.Folder(t), "metadata.json")
			r.Client.Build(t, "--platform", platforms, "--push", "-t", r.ref("v1"), "-t", r.ref("v1.2.3"), "--metadata-file", meta, dir)
			one := r.registry.Index(t, r.repo, "v1.2.3").Digest
			told := readMetadata(t, meta)
			wantEqual(t, "the digest that the client is told", told.Digest, one.String())
			wantEqual(t, "the name that the client is told", told.ImageName, r.ref("v1")+","+r.ref("v1.2.3"))
			r.wantLedger(t, "v1.2.3", one.String())
			farmtest.WriteFile(t, dir, "hello", "two\n")
			wantFailure(t, r.Client.TryBuild(t, "--platform", platforms, "--push", "-t", r.ref("v1.2.3"), dir), "immutable", one.String())
			wantEqual(t, "the tag", r.registry.Index(t, r.repo, "v1.2.3").Digest, one)
			r.Client.Build(t, "--platform", platforms, "--push", "-t", r.ref("v1"), dir) // an alias may move
			if moved := r.registry.Index(t, r.repo, "v1").Digest; moved == one {
				t.Error("the mutable tag v1 has not moved")
			}
		})
	}
}

// TestJob_APushOverAnImmutableTagIsToldWhereThePolicyIsToWarn is the default: the push
// goes through, the client is told, and the ledger has it.
func TestJob_APushOverAnImmutableTagIsToldWhereThePolicyIsToWarn(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{})
	for name, platforms := range map[string]string{"several platforms": both, "one platform": "linux/amd64"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := r
			r.repo = newRepo(t)
			dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": "one\n"})
			r.Client.Build(t, "--platform", platforms, "--push", "-t", r.ref("v1.2.3"), dir)
			one := r.registry.Index(t, r.repo, "v1.2.3").Digest
			r.wantLedger(t, "v1.2.3", one.String())
			farmtest.WriteFile(t, dir, "hello", "two\n")
			told := r.Client.TryBuild(t, "--platform", platforms, "--push", "-t", r.ref("v1.2.3"), dir)
			if told.Code != 0 {
				t.Fatalf("exit code %d:\n%s", told.Code, told.Output)
			}
			for _, text := range []string{"WARNING: tag policy", "immutable", one.String(), "published all the same"} {
				if !strings.Contains(told.Output, text) {
					t.Errorf("the output does not say %q:\n%s", text, told.Output)
				}
			}
			two := r.registry.Index(t, r.repo, "v1.2.3").Digest
			if one == two {
				t.Error("the tag has not moved")
			}
			r.wantLedger(t, "v1.2.3", two.String(), one.String())
		})
	}
}

// wantLedger waits until the ledger says that a tag has meant these digests, the newest first.
func (r jobRig) wantLedger(t *testing.T, tag string, digests ...string) {
	t.Helper()
	farmtest.Eventually(t, jobLimit, fmt.Sprintf("the ledger has %q for %s", digests, tag), func() (string, bool) {
		var bindings []struct{ Digest, State string }
		answer := r.Farm.Archfarm(t, "tags", r.registry.Host+"/"+r.repo, "--tag", tag, "--output", "json")
		readJSON(t, answer.Output, &bindings)
		var have []string
		for _, b := range bindings {
			if b.State == "published" {
				have = append(have, b.Digest)
			}
		}
		return answer.Output, slices.Equal(have, digests)
	})
}

func TestJob_CancelledAndRetriedOfOnePlatform(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{})
	gate := farmtest.NewGate(t)
	files := map[string]string{"Dockerfile": "FROM scratch AS base-arm64\nCOPY hello /hello\nFROM scratch AS base-amd64\nCOPY busybox /bin/busybox\n" + gate.Run() + "\nFROM base-$TARGETARCH\n", "hello": "hello\n"}
	dir := r.context(t, files)
	id := r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("v1"))
	gate.WaitArrival(t, r.Farm.Coordinator, jobLimit)
	farmtest.Eventually(t, jobLimit, "the arm64 leg is done", func() (string, bool) {
		job, err := r.client.Get(t.Context(), id)
		return job.String(), err == nil && legOf(job, "linux/arm64").GetState() == archfarmv1.JobLeg_STATE_SUCCEEDED
	})
	if cancelled := r.Farm.Archfarm(t, "cancel", id); cancelled.Code != 0 {
		t.Fatalf("archfarm cancel: %s", cancelled.Output)
	}
	job := r.ended(t, id, archfarmv1.Job_STATE_CANCELLED)
	gate.WaitKilled(t, jobLimit)
	r.wantNoTags(t)
	arm := legOf(job, "linux/arm64").GetDigest()
	gate.Open()
	if retried := r.Farm.Archfarm(t, "retry", id); retried.Code != 0 {
		t.Fatalf("archfarm retry: %s", retried.Output)
	}
	job = r.ended(t, id, archfarmv1.Job_STATE_SUCCEEDED)
	if leg := legOf(job, "linux/arm64"); leg.GetDigest() != arm || len(leg.GetAttempts()) != 1 {
		t.Errorf("the leg that had succeeded is %v, want the digest %s of its one attempt", leg, arm)
	}
	wantEqual(t, "the tag", r.registry.Index(t, r.repo, "v1").Digest.String(), job.GetDigest())
}

func legOf(job *archfarmv1.Job, platform string) *archfarmv1.JobLeg {
	for _, leg := range job.GetLegs() {
		if leg.GetPlatform() == platform {
			return leg
		}
	}
	return nil
}
