package e2e_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// TestJob_AGitCommitThroughEveryDoor submits one commit of a private repository by the command line, by plain curl and by
// grpcurl: each is pinned to the commit that the branch was at, and pushed to a registry that wants a password.
func TestJob_AGitCommitThroughEveryDoor(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{User: "ci", Password: "registry-password-1"})
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fleet()})
	r := jobsAt(t, rigAt(t, tools, &farm.Endpoint, registry))
	dir := r.context(t, map[string]string{"app/Dockerfile": plain, "app/hello": "hello\n"})
	sha := commit(t, dir)
	url := serveGit(t, dir, "git-token-1")
	host := registry.Host

	t.Run("archfarm submit", func(t *testing.T) {
		config := farmtest.Folder(t)
		farmtest.WriteFile(t, config, "config.json", fmt.Sprintf(`{"auths":{%q:{"auth":"Y2k6cmVnaXN0cnktcGFzc3dvcmQtMQ=="}}}`, host))
		token := farmtest.WriteFile(t, config, "token", "git-token-1")
		result := r.command(t, []string{"DOCKER_CONFIG=" + config}, r.tools.Archfarm, "submit", "--farm", r.Farm.Addr, "--output", "json",
			"--context", url+"#main:app", "--platform", both, "--tag", r.ref("cli-{{.GitSHA}}"), "--secret", "id=GIT_AUTH_TOKEN,src="+token)
		r.wantCommit(t, result, "cli-"+sha, sha)
	})
	body := func(tag string) string {
		return fmt.Sprintf(`{"spec":{"context":{"git":{"url":%q,"ref":"main","subdir":"app"}},"platforms":["linux/amd64","linux/arm64"],"tags":[%q]},
			"secrets":{"GIT_AUTH_TOKEN":"Z2l0LXRva2VuLTE="},"credentials":[{"host":%q,"username":"ci","password":"registry-password-1"}]}`, url, r.ref(tag), host)
	}
	t.Run("curl", func(t *testing.T) {
		result := r.command(t, nil, "curl", "--silent", "--show-error", "--fail-with-body", "--header", "Content-Type: application/json", "--data", body("curl-{{.ShortSHA}}"), r.Farm.HTTP+"/v1/jobs")
		id := r.wantCommit(t, result, "curl-"+sha[:7], sha)
		polled := r.command(t, nil, "curl", "--silent", "--show-error", "--fail-with-body", r.Farm.HTTP+"/v1/jobs/"+id)
		if !strings.Contains(polled.Output, "STATE_SUCCEEDED") {
			t.Errorf("curl of the job says:\n%s", polled.Output)
		}
	})
	t.Run("grpcurl", func(t *testing.T) {
		grpcurl := filepath.Join(r.tools.Root, "bin", "tools", "grpcurl")
		result := r.command(t, nil, grpcurl, "-plaintext", "-d", body("grpc-{{.Branch}}-{{.ShortSHA}}"), strings.TrimPrefix(r.Farm.Addr, "tcp://"), "archfarm.v1.JobService/Submit")
		r.wantCommit(t, result, "grpc-main-"+sha[:7], sha)
	})
	t.Run("everything that is wrong is told at once", func(t *testing.T) {
		bad := `{"spec":{"platforms":["linux/amd64","Linux/what?"],"tags":["localhost:5000/UPPER"],"priority":1000}}`
		result := r.command(t, nil, "curl", "--silent", "--header", "Content-Type: application/json", "--data", bad, r.Farm.HTTP+"/v1/jobs")
		for _, field := range []string{"spec.context", "spec.platforms[1]", "spec.tags[0]", "spec.priority", "google.rpc.BadRequest"} {
			if !strings.Contains(result.Output, field) {
				t.Errorf("the answer does not name %s:\n%s", field, result.Output)
			}
		}
	})
}

// wantCommit waits for the job that a submission has printed, checks that the tag is its, of both platforms, and of the
// commit, and returns its id.
func (r jobRig) wantCommit(t *testing.T, submission farmtest.Result, tag, sha string) string {
	t.Helper()
	var made struct {
		ID  string `json:"id"`
		Job struct{ ID string }
	}
	readJSON(t, submission.Output, &made)
	id := made.ID + made.Job.ID
	job := r.ended(t, id, archfarmv1.Job_STATE_SUCCEEDED)
	if got := job.GetSpec().GetContext().GetSource().GetCommit(); got != sha {
		t.Errorf("the job was pinned to %q, want %s", got, sha)
	}
	index := r.registry.Index(t, r.repo, tag)
	wantEqual(t, "the digest", index.Digest.String(), job.GetDigest())
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	wantEqual(t, "the file of arm64", r.registry.Image(t, r.repo, index.For(t, "linux/arm64")).Files["hello-arm64"], "hello\n")
	return id
}

// command runs a program to its end.
func (r jobRig) command(t *testing.T, env []string, path string, args ...string) farmtest.Result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		t.Fatalf("%s: %v", path, err)
	}
	return farmtest.Result{Output: string(out), Code: cmd.ProcessState.ExitCode()}
}
