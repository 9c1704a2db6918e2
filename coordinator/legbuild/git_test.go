package legbuild

import (
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// repository is a git repository that is served over HTTP to who knows a token.
type repository struct {
	t   *testing.T
	dir string // with the working tree
	url string
}

func newRepository(t *testing.T, name, token string) *repository {
	t.Helper()
	path, err := exec.LookPath("git")
	if err != nil {
		t.Skip("git is missing")
	}
	root := farmtest.Folder(t)
	r := &repository{t: t, dir: filepath.Join(root, name)}
	r.git("init", "--quiet", "--initial-branch=main", r.dir)
	backend := &cgi.Handler{Path: path, Args: []string{"http-backend"}, Env: []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"}, InheritEnv: []string{"PATH"}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, got, _ := req.BasicAuth(); got != token {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		backend.ServeHTTP(w, req)
	}))
	t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
	r.url = server.URL + "/" + name
	return r
}

func (r *repository) git(args ...string) string {
	r.t.Helper()
	cmd := exec.CommandContext(r.t.Context(), "git", append([]string{"-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("git %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// commit returns the hash of a commit of files.
func (r *repository) commit(files map[string]string) string {
	r.t.Helper()
	for name, content := range files {
		farmtest.WriteFile(r.t, r.dir, name, content)
	}
	r.git("-C", r.dir, "add", "--all")
	r.git("-C", r.dir, "commit", "--quiet", "--message", "x")
	return r.git("-C", r.dir, "rev-parse", "HEAD")
}

func TestBuild_GitCommitThatIsNotTheBranchAnyMore(t *testing.T) {
	t.Parallel()
	const token = secretValue // which r.silent looks for
	for _, name := range []string{"app.git", "app"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			repo := newRepository(t, name, token)
			pinned := repo.commit(map[string]string{"sub/Dockerfile": "FROM scratch\nCOPY file /file\n", "sub/file": "one"})
			moved := repo.commit(map[string]string{"sub/file": "two"})
			leg := r.leg("", nil)
			leg.Dir, leg.Secrets = "", map[string][]byte{"GIT_AUTH_TOKEN": []byte(token)}
			leg.Spec.Context = &archfarmv1.BuildContext{
				From:   &archfarmv1.BuildContext_Git{Git: &archfarmv1.GitContext{Url: repo.url, Ref: "main", Subdir: "sub"}},
				Source: &archfarmv1.Source{Url: repo.url, Commit: pinned, Branch: "main"},
			}
			r.refusesWrongToken(leg, moved)
			r.push(&leg, r.repo)
			d := r.must(leg)
			if got := r.image(r.repo, d).Files["file"]; got != "one" {
				t.Errorf("the file is %q", got)
			}
			r.checkGit(d.Digest.String(), repo.url, pinned)
			r.silent(nil)
		})
	}
}

// checkGit wants the provenance to name the commit.
func (r *rig) checkGit(dgst, url, commit string) {
	r.Helper()
	for _, m := range r.registry.Index(r, r.repo, dgst).Manifests {
		if farmtest.IsAttestation(m) {
			statement := string(r.registry.Blob(r, r.repo, r.registry.Manifest(r, r.repo, m.Digest).Layers[0]))
			if !strings.Contains(statement, commit) || !strings.Contains(statement, url) {
				r.Errorf("the provenance is %s", statement)
			}
		}
	}
}

// refusesWrongToken wants a commit to stay out of reach. It is another than the one that
// is built next: what a BuildKit is about to finish, its next build shares.
func (r *rig) refusesWrongToken(leg job.Leg, commit string) {
	r.Helper()
	leg.Spec = proto.CloneOf(leg.Spec)
	leg.Spec.Context.Source.Commit = commit
	leg.Ref, leg.Secrets = leg.Ref+"x", map[string][]byte{"GIT_AUTH_TOKEN": []byte("mistaken-token")}
	if _, err := r.build(leg); err == nil || strings.Contains(err.Error(), "mistaken-token") {
		r.Errorf("with a wrong token: %v", err)
	}
}
