package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/types"
	"google.golang.org/protobuf/proto"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// folder is one with these files.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestSubmit_SendsWhatTheFlagsSay(t *testing.T) {
	config.SetDir(folder(t, map[string]string{"config.json": `{"auths":{"registry.example.com":{"auth":"Y2k6cHc="},"elsewhere.example":{"auth":"Y2k6cHc="}}}`}))
	t.Setenv("TEST_SUBMIT_TOKEN", "s3cret")
	t.Setenv("TEST_SUBMIT_ARG", "from the environment")
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	got := try(t, "", "submit", "--farm", f.serve(t), "--context", "https://git.example.com/app.git#main:sub", "--file", "build/Dockerfile", "--target", "final",
		"--platform", "linux/amd64,arm64", "--tag", "registry.example.com/app:{{.GitSHA}}", "--build-arg", "A=1,2", "--build-arg", "TEST_SUBMIT_ARG", "--build-arg", "TEST_SUBMIT_NONE",
		"--label", "l=1", "--annotation", "a=1", "--secret", "id=npm,env=TEST_SUBMIT_TOKEN", "--secret", "id=stored,name=prod", "--cache-from", "registry.example.com/app:cache",
		"--cache-to", "type=registry,ref=registry.example.com/app:cache,mode=max", "--provenance", "mode=max", "--sbom", "--priority", "5", "--timeout", "1h", "--max-attempts", "2",
		"--overwrite-newer", "--registry-insecure", "--no-cache", "--pull", "--metadata", "pipeline=https://ci.example/1", "--request-id", "r-1")
	if got.err != nil || got.stdout != "job-1\n" {
		t.Fatalf("%v: %q", got.err, got.stdout)
	}
	spec := f.submitted.GetSpec()
	if git := spec.GetContext().GetGit(); git.GetUrl() != "https://git.example.com/app.git" || git.GetRef() != "main" || git.GetSubdir() != "sub" {
		t.Errorf("the context is %v", spec.GetContext())
	}
	spec.Context = nil
	timeout := spec.GetTimeout().AsDuration().String()
	spec.Timeout = nil
	want := &archfarmv1.JobSpec{
		Dockerfile: "build/Dockerfile", Target: "final", Platforms: []string{"linux/amd64", "linux/arm64"}, Tags: []string{"registry.example.com/app:{{.GitSHA}}"},
		BuildArgs: map[string]string{"A": "1,2", "TEST_SUBMIT_ARG": "from the environment"}, Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "1"},
		Secrets:    []*archfarmv1.SecretRef{{Id: "npm"}, {Id: "stored", Name: "prod"}},
		CacheFrom:  []*archfarmv1.CacheEntry{{Type: "registry", Attrs: map[string]string{"ref": "registry.example.com/app:cache"}}},
		CacheTo:    []*archfarmv1.CacheEntry{{Type: "registry", Attrs: map[string]string{"ref": "registry.example.com/app:cache", "mode": "max"}}},
		Provenance: "mode=max", Sbom: "true", NoCache: true, Pull: true, Priority: 5, MaxAttempts: 2, OverwriteNewer: true, InsecureRegistry: true,
		Metadata: map[string]string{"pipeline": "https://ci.example/1"},
	}
	if !proto.Equal(spec, want) || timeout != "1h0m0s" || f.submitted.GetRequestId() != "r-1" {
		t.Errorf("submitted %v\nwant %v", spec, want)
	}
	if s := f.submitted.GetSecrets(); len(s) != 1 || string(s["npm"]) != "s3cret" {
		t.Errorf("the secrets sent are %d", len(s))
	}
	if c := f.submitted.GetCredentials(); len(c) != 1 || c[0].GetHost() != "registry.example.com" || c[0].GetUsername() != "ci" || c[0].GetPassword() != "pw" {
		t.Errorf("credentials for %d registries are sent", len(c))
	}
}

func TestSubmit_UploadsAFolderWithItsCommit(t *testing.T) {
	t.Parallel()
	dir := folder(t, map[string]string{"Dockerfile": "FROM scratch\n", "file": "x"})
	inGit(t, dir, "init", "--quiet", "--initial-branch=main")
	inGit(t, dir, "remote", "add", "origin", "https://user:pw@git.example.com/app.git")
	inGit(t, dir, "add", ".")
	inGit(t, dir, "commit", "--quiet", "-m", "one")
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	got := try(t, "", "submit", "--farm", f.serve(t), "--no-credentials", "--context", dir, "--platform", "linux/amd64", "--wait", "--progress", "plain", "--output", "json")
	var job struct{ ID, State string }
	if err := json.Unmarshal([]byte(got.stdout), &job); got.err != nil || err != nil || job.State != "succeeded" {
		t.Fatalf("%v, %v: %s%s", got.err, err, got.stdout, got.stderr)
	}
	spec := f.submitted.GetSpec()
	source := spec.GetContext().GetSource()
	if !strings.HasPrefix(spec.GetContext().GetDigest(), "sha256:") || spec.GetDockerfile() != "Dockerfile" || source.GetBranch() != "main" || len(source.GetCommit()) != 40 ||
		source.GetUrl() != "https://git.example.com/app.git" || source.GetDirty() || source.GetCommitTime() == nil {
		t.Errorf("submitted %v", spec)
	}
}

func TestSubmit_TakesATarballOnStandardInput(t *testing.T) {
	t.Parallel()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: "Dockerfile", Mode: 0o644, Size: 4}); err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte("FROM"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	got := try(t, archive.String(), "submit", "--farm", f.serve(t), "--no-credentials", "--context", "-", "--platform", "linux/amd64")
	if got.err != nil || f.submitted.GetSpec().GetContext().GetDigest() == "" || f.submitted.GetSpec().GetContext().GetSource() != nil {
		t.Errorf("%v: submitted %v", got.err, f.submitted)
	}
}

func TestSubmit_RefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	dir := folder(t, map[string]string{"Dockerfile": "FROM scratch\n"})
	for name, test := range map[string]struct {
		args  []string
		words []string
	}{
		"nothing to build":           {nil, []string{"--context"}},
		"every fault of the job":     {[]string{"--context", dir, "--tag", "registry.example.com/UPPER", "--priority", "1000"}, []string{"\n  --platform (spec.platforms)", "\n  --tag (spec.tags[0])", "\n  --priority (spec.priority)"}},
		"a platform that is none":    {[]string{"--context", dir, "--platform", "toaster/x/y/z"}, []string{"--platform"}},
		"an argument":                {[]string{"."}, []string{`"."`, "--context"}},
		"a second argument":          {[]string{"--provenance", "mode=max", "x"}, []string{`"x"`}},
		"a folder that is not there": {[]string{"--context", "./not-there", "--platform", "linux/amd64"}, []string{"not-there"}},
		"a wait that is not asked":   {[]string{"--wait-timeout", "1m"}, []string{"--wait-timeout", "--timeout"}},
		"a secret without a value":   {[]string{"--context", dir, "--secret", "id=x,env=TEST_NO_SUCH"}, []string{"TEST_NO_SUCH"}},
		"a build-arg without name":   {[]string{"--context", dir, "--build-arg", "=x"}, []string{"--build-arg"}},
		"a label without a value":    {[]string{"--context", dir, "--label", "x"}, []string{"--label", "KEY=VALUE"}},
		"a cache of no type":         {[]string{"--context", dir, "--cache-to", "ref=x"}, []string{"--cache-to"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
			got := try(t, "", append([]string{"submit", "--no-credentials", "--farm", f.serve(t)}, test.args...)...)
			if got.err == nil || exitCode(got.err) != exitUsage || f.submitted != nil {
				t.Fatalf("exit code %d: %v", exitCode(got.err), got.err)
			}
			for _, w := range test.words {
				if !strings.Contains(got.err.Error(), w) {
					t.Errorf("%q does not say %q", got.err, w)
				}
			}
		})
	}
}

func TestSubmit_TellsTheFarmsOwnFaults(t *testing.T) {
	t.Parallel()
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	f.refuse = faulty(t, "spec.context.git.ref", "spec.secrets[0].name", "spec.novelty")
	got := try(t, "", "submit", "--no-credentials", "--farm", f.serve(t), "--context", "https://git.example.com/app.git", "--platform", "linux/amd64")
	const want = "the job cannot be taken:\n  --context (spec.context.git.ref): wrong spec.context.git.ref\n  --secret (spec.secrets[0].name): wrong spec.secrets[0].name\n  spec.novelty: wrong spec.novelty"
	if got.err == nil || got.err.Error() != want || exitCode(got.err) != exitUsage {
		t.Errorf("%v", got.err)
	}
}

func TestParseSecret_ReadsTheSpellingsOfDocker(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]secretFlag{
		"id=a,env=B":              {id: "a", env: "B"},
		"id=a,src=f":              {id: "a", src: "f"},
		"type=file,id=a,source=f": {id: "a", src: "f"},
		"type=env,id=a,src=B":     {id: "a", env: "B"},
		"id=a,name=n":             {id: "a", name: "n"},
		"id=a":                    {id: "a"},
		`id=a,"src=with,comma"`:   {id: "a", src: "with,comma"},
	} {
		if got, err := parseSecret(text); err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "a", "env=B", "id=a,env=B,src=f", "id=a,name=n,env=B", "id=a,value=b", "type=x,id=a", `id="a`} {
		if got, err := parseSecret(text); err == nil {
			t.Errorf("%q is taken as %+v", text, got)
		}
	}
}

func FuzzParseSecret(f *testing.F) {
	f.Add("id=a,env=B")
	f.Add(`type=file,"id=a,b",src=x`)
	f.Fuzz(func(t *testing.T, text string) {
		if s, err := parseSecret(text); err == nil && s.id == "" {
			t.Errorf("%q is taken without an id", text)
		}
	})
}

func TestRegistryHosts_AreThoseThatTheJobNames(t *testing.T) {
	t.Parallel()
	s := &archfarmv1.JobSpec{
		Tags:      []string{"registry.example.com/app:{{.GitSHA}}", "app", "org/app:v1", "localhost/app", "localhost:5000/app:x", "index.docker.io/org/app"},
		CacheFrom: []*archfarmv1.CacheEntry{{Type: "registry", Attrs: map[string]string{"ref": "cache.example.com:5000/app"}}, {Type: "gha"}},
		CacheTo:   []*archfarmv1.CacheEntry{{Type: "s3", Attrs: map[string]string{"ref": "not.example.com/x"}}},
	}
	want := []string{"base.example.com", "cache.example.com:5000", "docker.io", "localhost", "localhost:5000", "registry.example.com"}
	if got := registryHosts(s, []string{"base.example.com"}); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	docker := configfile.New("")
	docker.AuthConfigs = map[string]types.AuthConfig{dockerHubKey: {Username: "u", Password: "p"}, "localhost": {IdentityToken: "i"}, "localhost:5000": {Username: "only"}}
	list, err := credentialsFor(docker, want)
	if err != nil || len(list) != 2 || list[0].GetHost() != dockerHubKey || list[1].GetIdentityToken() != "i" {
		t.Errorf("%d credentials, %v", len(list), err)
	}
}

func inGit(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %q: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestGitSource_TellsTheCommitAndRunsNothing(t *testing.T) {
	t.Parallel()
	none := func(string) (string, bool) { return "", false }
	dir := folder(t, map[string]string{"sub/a": "1", "other": "2"})
	if got := gitSource(t.Context(), dir, none); got != nil {
		t.Errorf("of no repository: %v", got)
	}
	inGit(t, dir, "init", "--quiet", "--initial-branch=main")
	if got := gitSource(t.Context(), dir, none); got != nil {
		t.Errorf("without a commit: %v", got)
	}
	inGit(t, dir, "add", ".")
	inGit(t, dir, "commit", "--quiet", "-m", "one")
	inGit(t, dir, "tag", "v1.2.3")
	inGit(t, dir, "remote", "add", "origin", "ssh://git:pw@git.example.com/app.git")
	ran := filepath.Join(t.TempDir(), "ran")
	inGit(t, dir, "config", "core.fsmonitor", "touch "+ran+"; false")
	head := inGit(t, dir, "-c", "core.fsmonitor=false", "rev-parse", "HEAD")
	got := gitSource(t.Context(), dir, none)
	if got.GetCommit() != head || got.GetBranch() != "main" || got.GetTag() != "v1.2.3" || got.GetUrl() != "ssh://git@git.example.com/app.git" || got.GetDirty() {
		t.Errorf("%v", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), []byte("3"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := gitSource(t.Context(), filepath.Join(dir, "sub"), none); got.GetDirty() {
		t.Error("what is beside the folder makes it dirty")
	}
	if got := gitSource(t.Context(), dir, none); !got.GetDirty() {
		t.Error("a changed file does not make it dirty")
	}
	if _, err := os.Stat(ran); err == nil {
		t.Error("the repository's own program has been run")
	}
	inGit(t, dir, "-c", "core.fsmonitor=false", "checkout", "--quiet", "--detach")
	for name, test := range map[string]struct {
		env         map[string]string
		branch, tag string
	}{
		"GitLab's branch":  {map[string]string{"CI_COMMIT_SHA": head, "CI_COMMIT_BRANCH": "dev"}, "dev", "v1.2.3"},
		"GitHub's branch":  {map[string]string{"GITHUB_SHA": head, "GITHUB_REF_TYPE": "branch", "GITHUB_REF_NAME": "dev"}, "dev", "v1.2.3"},
		"another commit's": {map[string]string{"CI_COMMIT_SHA": "123", "CI_COMMIT_BRANCH": "dev"}, "", "v1.2.3"},
	} {
		got := gitSource(t.Context(), dir, func(k string) (string, bool) { v, ok := test.env[k]; return v, ok })
		if got.GetBranch() != test.branch || got.GetTag() != test.tag {
			t.Errorf("%s: branch %q, tag %q", name, got.GetBranch(), got.GetTag())
		}
	}
}

func TestWithoutCredentials(t *testing.T) {
	t.Parallel()
	for remote, want := range map[string]string{
		"https://user:pw@h/x.git": "https://h/x.git", "https://token@h/x.git": "https://h/x.git", "https://h/x?token=1#f": "https://h/x",
		"git@h:org/x.git": "git@h:org/x.git", "/srv/x": "", "../x": "", "ssh://git@h/x": "ssh://git@h/x", "h:/srv/x": "", "file:///srv/x": "",
	} {
		if got := withoutCredentials(remote); got != want {
			t.Errorf("%s: %q, want %q", remote, got, want)
		}
	}
}

func TestSubmit_ReadsAJobFromAFileOverWhichFlagsWin(t *testing.T) {
	t.Setenv("TEST_SPEC_KEY", "k")
	dir := folder(t, map[string]string{"ci/job.yaml": `
context: ../app
dockerfile: docker/Dockerfile
platforms: [linux/amd64]
tags: registry.example.com/app:v1
timeout: 10m
request_id: from-the-file
build_args: {A: one, B: two}
secrets: [{id: npm, src: token.txt}, {id: key, env: TEST_SPEC_KEY}, {id: stored, name: prod}]
`, "ci/token.txt": "t0ken", "app/docker/Dockerfile": "FROM scratch\n"})
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	farm := f.serve(t)
	got := try(t, "", "submit", "--farm", farm, "--no-credentials", "-f", filepath.Join(dir, "ci/job.yaml"), "--platform", "linux/arm64", "--build-arg", "B=three", "--secret", "id=key,name=prod")
	if got.err != nil {
		t.Fatal(got.err)
	}
	spec, secrets := f.submitted.GetSpec(), f.submitted.GetSecrets()
	if spec.GetDockerfile() != "docker/Dockerfile" || !slices.Equal(spec.GetPlatforms(), []string{"linux/arm64"}) || f.submitted.GetRequestId() != "from-the-file" ||
		spec.GetBuildArgs()["A"] != "one" || spec.GetBuildArgs()["B"] != "three" || spec.GetTimeout().GetSeconds() != 600 || spec.GetContext().GetDigest() == "" {
		t.Errorf("submitted %v as %s", spec, f.submitted.GetRequestId())
	}
	if len(secrets) != 1 || string(secrets["npm"]) != "t0ken" || len(spec.GetSecrets()) != 3 {
		t.Errorf("%d secrets, references %v", len(secrets), spec.GetSecrets())
	}
	got = try(t, "context: https://git.example.com/app.git\nplatforms: [linux/amd64]\n", "submit", "--farm", farm, "--no-credentials", "-f", "-")
	if got.err != nil || f.submitted.GetSpec().GetContext().GetGit().GetUrl() != "https://git.example.com/app.git" {
		t.Errorf("from standard input: %v, %v", got.err, f.submitted)
	}
	if got := try(t, "colour: red\n", "submit", "--farm", farm, "-f", "-"); exitCode(got.err) != exitUsage || !strings.Contains(got.err.Error(), "colour") {
		t.Errorf("an unknown field: %v", got.err)
	}
}
