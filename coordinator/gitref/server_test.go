package gitref

import (
	"bytes"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// repository is a real one, bare, with what refs may be.
type repository struct {
	dir                         string
	first, second, third, other string // commits: of main, and of the branch feature/x
	annotated                   string // the tag object of v2.0.0
}

// gitIn runs git on a repository, at a fixed time.
func gitIn(t *testing.T, dir, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL="+os.DevNull, "LC_ALL=C",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=c", "GIT_COMMITTER_EMAIL=c@example.com",
		"GIT_AUTHOR_DATE=1600000000 +0000")
	if date, ok := strings.CutPrefix(args[0], "date="); ok {
		cmd.Args = append(cmd.Args[:3], args[1:]...)
		cmd.Env = append(cmd.Env, "GIT_COMMITTER_DATE="+date+" +0200")
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, errs.String())
	}
	return strings.TrimSpace(out.String())
}

// newRepository makes root/app.git.
func newRepository(t *testing.T, root string) repository {
	t.Helper()
	dir := filepath.Join(root, "app.git")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := repository{dir: dir}
	gitIn(t, dir, "", "init", "-q", "--bare", "-b", "main")
	commit := func(date, content string, parents ...string) string {
		blob := gitIn(t, dir, content, "hash-object", "-w", "--stdin")
		tree := gitIn(t, dir, "100644 blob "+blob+"\tDockerfile\n", "mktree")
		args := []string{"date=" + date, "commit-tree", tree, "-m", content}
		for _, p := range parents {
			args = append(args, "-p", p)
		}
		return gitIn(t, dir, "", args...)
	}
	r.first = commit("1700000001", "FROM scratch\n")
	r.second = commit("1700000002", "FROM scratch\n# 2\n", r.first)
	r.third = commit("1700000003", "FROM scratch\n# 3\n", r.second)
	r.other = commit("1700000004", "FROM scratch\n# x\n", r.first)
	for name, id := range map[string]string{
		"refs/heads/main": r.third, "refs/heads/feature/x": r.other, "refs/tags/v1.0.0": r.first, "refs/pull/7/head": r.other,
		"refs/heads/both": r.first, "refs/tags/both": r.second, "refs/heads/same": r.first, "refs/tags/same": r.first,
	} {
		gitIn(t, dir, "", "update-ref", name, id)
	}
	gitIn(t, dir, "", "date=1700000009", "tag", "-a", "-m", "two", "v2.0.0", r.second)
	r.annotated = gitIn(t, dir, "", "rev-parse", "refs/tags/v2.0.0")
	return r
}

// backend serves the repositories of a folder with git's own program.
func backend(t *testing.T, root string) http.Handler {
	t.Helper()
	out, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		t.Fatal(err)
	}
	return &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(out)), "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull},
		// No output of CGI programs in the tests'.
		Stderr: new(bytes.Buffer),
	}
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}
