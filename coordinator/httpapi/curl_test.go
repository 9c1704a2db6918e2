package httpapi_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/httpapi"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// checkout is a git repository of one commit.
func checkout(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte("FROM scratch\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"init", "--quiet"}, {"add", "."}, {"-c", "user.name=n", "-c", "user.email=e@example.com", "commit", "--quiet", "--message", "m"}} {
		if out, err := exec.CommandContext(t.Context(), "git", append([]string{"-C", dir}, args...)...).CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	return dir
}

// The guide's script, as it is.
func TestCurl_SubmitsAndWaits(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"bash", "curl", "git", "jq"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	script, err := filepath.Abs("../../deploy/ci/curl.sh")
	if err != nil {
		t.Fatal(err)
	}
	dir := checkout(t)
	for name, test := range map[string]struct {
		env   []string
		check func(*archfarmv1.SubmitRequest) bool
	}{
		"the folder": {nil, func(r *archfarmv1.SubmitRequest) bool {
			c := r.GetSpec().GetContext()
			return strings.HasPrefix(c.GetDigest(), "sha256:") && len(c.GetSource().GetCommit()) == 40 && c.GetSource().GetCommitTime().IsValid() && len(r.GetCredentials()) == 0
		}},
		"a repository": {[]string{"GIT_URL=https://git.example/app.git", "GIT_REF=main", "REGISTRY_USER=u", "REGISTRY_PASSWORD=p\"'$"}, func(r *archfarmv1.SubmitRequest) bool {
			git, creds := r.GetSpec().GetContext().GetGit(), r.GetCredentials()
			return git.GetUrl() == "https://git.example/app.git" && git.GetRef() == "main" &&
				len(creds) == 1 && creds[0].GetHost() == "registry.example.com" && creds[0].GetPassword() == "p\"'$"
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := serve(t, httpapi.Options{})
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, script)
			cmd.Dir = dir
			cmd.Env = append(os.Environ(), append([]string{"FARM=" + r.url, "IMAGE=registry.example.com/team/app", "RUN_ID=run-1", "no_proxy=*"}, test.env...)...)
			var errs bytes.Buffer
			cmd.Stderr = &errs
			out, err := cmd.Output()
			if want := "registry.example.com/team/app@" + published + "\n"; err != nil || string(out) != want {
				t.Fatalf("printed %q, %v: %s", out, err, errs.String())
			}
			sent := r.sent
			if sent.GetRequestId() != "run-1" || strings.Join(sent.GetSpec().GetPlatforms(), " ") != "linux/amd64 linux/arm64" ||
				strings.Join(sent.GetSpec().GetTags(), " ") != "registry.example.com/team/app:{{.GitSHA}}" || !test.check(sent) {
				t.Errorf("submitted %v", sent)
			}
		})
	}
}
