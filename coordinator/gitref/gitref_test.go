package gitref

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestResolve_EachKindOfRef(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRepository(t, root)
	url := serve(t, backend(t, root)) + "/app.git"
	for _, filter := range []string{"false", "true"} {
		gitIn(t, r.dir, "", "config", "uploadpack.allowFilter", filter)
		for ref, want := range map[string]struct {
			commit, branch, tag string
			time                int64
		}{
			"":                           {r.third, "main", "", 1700000003},
			"HEAD":                       {r.third, "main", "", 1700000003},
			"main":                       {r.third, "main", "", 1700000003},
			"refs/heads/main":            {r.third, "main", "", 1700000003},
			"feature/x":                  {r.other, "feature/x", "", 1700000004},
			"v1.0.0":                     {r.first, "", "v1.0.0", 1700000001},
			"tags/v1.0.0":                {r.first, "", "v1.0.0", 1700000001},
			"v2.0.0":                     {r.second, "", "v2.0.0", 1700000002},
			"refs/tags/v2.0.0":           {r.second, "", "v2.0.0", 1700000002},
			"refs/pull/7/head":           {r.other, "", "", 1700000004},
			"pull/7/head":                {r.other, "", "", 1700000004},
			"same":                       {r.first, "same", "same", 1700000001},
			"refs/tags/both":             {r.second, "", "both", 1700000002},
			r.third:                      {r.third, "", "", 1700000003},
			r.second:                     {r.second, "", "", 1700000002}, // a tag's commit, and no tip of a branch
			strings.ToUpper(r.first):     {r.first, "", "", 1700000001},
			r.annotated:                  {r.second, "", "", 1700000002},
			r.other[:7]:                  {r.other, "", "", 1700000004},
			r.second[:12]:                {r.second, "", "", 1700000002},
			strings.ToUpper(r.third[:9]): {r.third, "", "", 1700000003},
		} {
			if filter == "true" && want.time%2 == 0 { // half of them will do
				continue
			}
			got, err := Resolve(t.Context(), &archfarmv1.GitContext{Url: url, Ref: ref}, Auth{})
			if err != nil {
				t.Errorf("%q: %v", ref, err)
				continue
			}
			if got.GetCommit() != want.commit || got.GetBranch() != want.branch || got.GetTag() != want.tag || got.GetCommitTime().GetSeconds() != want.time || got.GetUrl() != url || got.GetDirty() {
				t.Errorf("%q (filter %s): %v, want %+v", ref, filter, got, want)
			}
		}
	}
}

func TestResolve_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRepository(t, root)
	base := serve(t, backend(t, root))
	empty := filepath.Join(root, "empty.git")
	if err := os.Mkdir(empty, 0o700); err != nil {
		t.Fatal(err)
	}
	gitIn(t, empty, "", "init", "-q", "--bare")
	html := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "<html>internal: hunter2</html>"+strings.Repeat("\nhunter2", strings.Count(r.URL.Path, "lines")*3))
	}))
	hostile := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-git-upload-pack-advertisement")
		fmt.Fprint(w, "001e# service=git-upload-pack\n0000001aERR hunter2 \x1b[2J\x1b[H..")
	}))
	broken := serve(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "hunter2", http.StatusBadGateway)
	}))
	url := base + "/app.git"
	for name, c := range map[string]struct {
		url, ref string
		code     codes.Code
		says     []string
	}{
		"misspelt branch":      {url, "mian", codes.NotFound, []string{`"mian"`, "main"}},
		"misspelt tag":         {url, "v2.0", codes.NotFound, []string{"v2.0.0"}},
		"branch and tag":       {url, "both", codes.InvalidArgument, []string{"refs/heads/both", "refs/tags/both"}},
		"full name":            {url, "refs/heads/none", codes.NotFound, []string{"refs/heads/none"}},
		"unknown commit":       {url, strings.Repeat("0123456789", 4), codes.NotFound, []string{"no such commit"}},
		"short, unknown":       {url, "0123456", codes.NotFound, []string{"give all its digits"}},
		"a tree":               {url, gitIn(t, r.dir, "", "rev-parse", "main^{tree}"), codes.InvalidArgument, []string{"no commit"}},
		"no such repository":   {base + "/none.git", "main", codes.NotFound, []string{"GIT_AUTH_TOKEN"}},
		"empty":                {base + "/empty.git", "", codes.NotFound, []string{"empty"}},
		"no git server":        {html + "/app.git", "", codes.NotFound, []string{"not a repository's"}},
		"no git server, lines": {html + "/lines/app.git", "", codes.InvalidArgument, []string{"does not speak"}},
		"hostile":              {hostile + "/app.git", "", codes.Unavailable, nil},
		"broken":               {broken + "/app.git", "", codes.Unavailable, []string{"502"}},
		"nobody there":         {"http://127.0.0.1:1/app.git", "main", codes.Unavailable, []string{"127.0.0.1"}},
		"no such host":         {"http://git.invalid/app.git", "main", codes.Unavailable, []string{"git.invalid"}},
		"option as URL":        {"--upload-pack=touch", "", codes.InvalidArgument, nil},
		"command as URL":       {"ext::sh -c touch% /tmp/x", "", codes.InvalidArgument, nil},
		"file":                 {"file://" + r.dir, "", codes.InvalidArgument, []string{"https://HOST/PATH"}},
		"path":                 {r.dir, "", codes.InvalidArgument, nil},
		"option as ref":        {url, "--upload-pack=touch", codes.InvalidArgument, nil},
		"pattern":              {url, "*", codes.InvalidArgument, nil},
		"revision":             {url, "main~1", codes.InvalidArgument, nil},
		"ssh":                  {"git@example.com:owner/app.git", "", codes.InvalidArgument, []string{"https://example.com/owner/app.git", "GIT_AUTH_TOKEN"}},
	} {
		_, err := Resolve(t.Context(), &archfarmv1.GitContext{Url: c.url, Ref: c.ref}, Auth{})
		if status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
			continue
		}
		for _, want := range c.says {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v does not say %q", name, err, want)
			}
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v tells what a server said", name, err)
		}
	}
}

// guarded asks for credentials before anything, and fails the test when a command
// line on this machine holds them.
func guarded(t *testing.T, inner http.Handler, user, password string) (http.Handler, *atomic.Int64) {
	var looked atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u, p, ok := r.BasicAuth()
		if !ok || u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "no", http.StatusUnauthorized)
			return
		}
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Error(err)
		}
		for _, path := range lines {
			if line, err := os.ReadFile(path); err == nil && strings.Contains(string(line), "git") {
				looked.Add(1)
				if strings.Contains(string(line), password) || strings.Contains(string(line), strings.TrimPrefix(r.Header.Get("Authorization"), "Basic ")) {
					t.Errorf("a command line holds the credentials: %q", line)
				}
			}
		}
		inner.ServeHTTP(w, r)
	}), &looked
}

func TestResolve_Credentials(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRepository(t, root)
	const token = "s3cr3t-t0ken"
	h, looked := guarded(t, backend(t, root), "x-access-token", token)
	base := serve(t, h)
	url, host := base+"/app.git", strings.TrimPrefix(base, "http://")
	for name, c := range map[string]struct {
		secrets map[string][]byte
		code    codes.Code
		says    string
	}{
		"none":              {nil, codes.PermissionDenied, "send the secret GIT_AUTH_TOKEN"},
		"wrong":             {map[string][]byte{"GIT_AUTH_TOKEN": []byte("wrong-t0ken")}, codes.PermissionDenied, "refuses the credentials"},
		"token":             {map[string][]byte{"GIT_AUTH_TOKEN": []byte(token)}, codes.OK, ""},
		"the host's token":  {map[string][]byte{"GIT_AUTH_TOKEN": []byte("wrong-t0ken"), "GIT_AUTH_TOKEN." + host: []byte(token)}, codes.OK, ""},
		"another's token":   {map[string][]byte{"GIT_AUTH_TOKEN.example.com": []byte(token)}, codes.PermissionDenied, "GIT_AUTH_TOKEN"},
		"header":            {map[string][]byte{"GIT_AUTH_HEADER": []byte("Basic eC1hY2Nlc3MtdG9rZW46czNjcjN0LXQwa2Vu")}, codes.OK, ""},
		"header over token": {map[string][]byte{"GIT_AUTH_HEADER": []byte("Basic d3Jvbmc6d3Jvbmc="), "GIT_AUTH_TOKEN": []byte(token)}, codes.PermissionDenied, "refuses"},
	} {
		auth, err := AuthFor(url, c.secrets)
		if err != nil {
			t.Fatal(err)
		}
		got, err := Resolve(t.Context(), &archfarmv1.GitContext{Url: url, Ref: "main"}, auth)
		if status.Code(err) != c.code {
			t.Errorf("%s: %v, want %v", name, err, c.code)
			continue
		}
		if err == nil && got.GetCommit() != r.third {
			t.Errorf("%s: %v", name, got)
		}
		for _, shown := range []string{fmt.Sprint(err), fmt.Sprintf("%v %+v %#v %s", auth, auth, auth, auth)} {
			if strings.Contains(shown, "t0ken") || strings.Contains(shown, "eC1h") {
				t.Errorf("%s: it shows credentials: %s", name, shown)
			}
		}
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v does not say %q", name, err, c.says)
		}
	}
	if looked.Load() == 0 {
		t.Error("no command line of git was looked at")
	}
}

func TestAuthFor_RefusesWhatNoHeaderCanHold(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"", "a\n", "a\r\nX-Other: b", "\x00", strings.Repeat("x", 20<<10)} {
		if auth, err := AuthFor("https://example.com/a", map[string][]byte{"GIT_AUTH_TOKEN": []byte(value)}); err == nil || !strings.Contains(err.Error(), "GIT_AUTH_TOKEN") {
			t.Errorf("%.20q: %v, %v", value, auth, err)
		}
	}
}

func TestResolve_FollowsRedirectsOnlyWithoutCredentials(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRepository(t, root)
	inner := backend(t, root)
	var leaked atomic.Bool
	target := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "" {
			leaked.Store(true)
		}
		inner.ServeHTTP(w, r)
	}))
	redirect := func(to string) string {
		return serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", to+r.URL.RequestURI())
			w.WriteHeader(http.StatusMovedPermanently)
		}))
	}
	moved := &archfarmv1.GitContext{Url: redirect(target) + "/app.git", Ref: "main"}
	if got, err := Resolve(t.Context(), moved, Auth{}); err != nil || got.GetCommit() != r.third {
		t.Errorf("moved: %v, %v", got, err)
	}
	auth, err := AuthFor(moved.GetUrl(), map[string][]byte{"GIT_AUTH_TOKEN": []byte("token")})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Resolve(t.Context(), moved, auth); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "redirects") || leaked.Load() {
		t.Errorf("moved, with credentials (leaked: %v): %v, %v", leaked.Load(), got, err)
	}
	for _, to := range []string{"file://" + root, "ftp://127.0.0.1:1", "dict://127.0.0.1:1"} {
		if got, err := Resolve(t.Context(), &archfarmv1.GitContext{Url: redirect(to) + "/app.git", Ref: "main"}, Auth{}); err == nil {
			t.Errorf("a redirect to %s: %v", to, got)
		}
	}
}

func TestResolve_EndsWithItsContext(t *testing.T) {
	t.Parallel()
	asked, gone := make(chan struct{}), make(chan struct{})
	url := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done() // git's helper is a grandchild: its connection ends when it does
		close(gone)
	}))
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-asked; cancel() }()
	if _, err := Resolve(ctx, &archfarmv1.GitContext{Url: url + "/app.git"}, Auth{}); status.Code(err) != codes.Canceled {
		t.Errorf("%v, want Canceled", err)
	}
	<-gone
}

func TestList_EndlessAnswersEnd(t *testing.T) {
	t.Parallel()
	var page strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&page, "%040x\trefs/heads/%0200d\n", i+1, i)
	}
	url := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain") // the oldest protocol, of plain files
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, page.String()); err != nil {
				return
			}
		}
	}))
	c, err := newCLI("", url+"/app.git", "", Auth{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	c.memory = 128 << 10
	if refs, err := c.list(t.Context()); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("%d refs, %v, want ResourceExhausted", len(refs.ids), err)
	}
}

// TestRun_OutputIsBounded: what git holds in its memory it may write yet.
func TestRun_OutputIsBounded(t *testing.T) {
	t.Parallel()
	c, err := newCLI("", "https://example.com/app.git", "", Auth{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if out, err := c.run(t.Context(), "-c", "alias.flood=!yes", "flood"); status.Code(err) != codes.ResourceExhausted || out != nil {
		t.Errorf("%d bytes, %v, want ResourceExhausted", len(out), err)
	}
}

// TestCommit_LargeOnesEnd has a commit of which the server cannot leave anything out.
func TestCommit_LargeOnesEnd(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	r := newRepository(t, root)
	noise := make([]byte, 4<<20)
	state := uint64(1)
	for i := range noise { // what cannot be compressed
		state = state*6364136223846793005 + 1442695040888963407
		noise[i] = byte(state >> 56)
	}
	blob := gitIn(t, r.dir, string(noise), "hash-object", "-w", "--stdin")
	tree := gitIn(t, r.dir, "100644 blob "+blob+"\tnoise\n", "mktree")
	large := gitIn(t, r.dir, "", "date=1700000005", "commit-tree", tree, "-m", "large")
	gitIn(t, r.dir, "", "update-ref", "refs/heads/large", large)
	url := serve(t, backend(t, root)) + "/app.git"
	for filter, want := range map[string]error{"false": errTooLarge, "true": nil} {
		gitIn(t, r.dir, "", "config", "uploadpack.allowFilter", filter)
		c, err := newCLI("", url, "", Auth{})
		if err != nil {
			t.Fatal(err)
		}
		c.pack = 1 << 10
		_, at, err := c.commit(t.Context(), large)
		if !errors.Is(err, want) || err == nil && at.Unix() != 1700000005 {
			t.Errorf("filter %s: %v, %v", filter, at, err)
		}
		c.close()
		if _, err := os.Stat(c.dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("its folder is left: %v", err)
		}
	}
}

func TestResolve_WithoutGit(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := Resolve(t.Context(), &archfarmv1.GitContext{Url: "https://example.com/a.git"}, Auth{})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "install") {
		t.Errorf("%v", err)
	}
}

// TestResolve_UsesNobodysConfiguration: what the operator's git would rewrite, run or
// send does not count.
func TestResolve_UsesNobodysConfiguration(t *testing.T) {
	root, home := t.TempDir(), t.TempDir()
	r := newRepository(t, root)
	inner := backend(t, root)
	var header atomic.Value
	url := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header.Store(r.Header.Get("X-Mine"))
		_, _ = io.Copy(io.Discard, http.NoBody)
		inner.ServeHTTP(w, r)
	})) + "/app.git"
	t.Setenv("HOME", home)
	t.Setenv("GIT_CONFIG_COUNT", "1")
	t.Setenv("GIT_CONFIG_KEY_0", "http.extraHeader")
	t.Setenv("GIT_CONFIG_VALUE_0", "X-Mine: environment")
	t.Setenv("GIT_DIR", "/nowhere")
	if err := os.WriteFile(filepath.Join(home, ".gitconfig"), []byte("[http]\n\textraHeader = X-Mine: home\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Resolve(t.Context(), &archfarmv1.GitContext{Url: url, Ref: "main"}, Auth{})
	if err != nil || got.GetCommit() != r.third || header.Load() != "" {
		t.Errorf("%v, %v, X-Mine: %v", got, err, header.Load())
	}
}

func TestIn_WorksInItsFolderAndSweepsIt(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "git")
	left := filepath.Join(dir, "archfarm-git-1", "git")
	if err := os.MkdirAll(left, 0o700); err != nil {
		t.Fatal(err)
	}
	resolve, err := In(dir)
	if err != nil {
		t.Fatal(err)
	}
	entries := func() int {
		found, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	if n := entries(); n != 0 {
		t.Errorf("%d folders are left of a process that was killed", n)
	}
	root := t.TempDir()
	r := newRepository(t, root)
	var during atomic.Int64
	inner := backend(t, root)
	url := serve(t, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		during.Store(int64(entries()))
		inner.ServeHTTP(w, req)
	})) + "/app.git"
	got, err := resolve(t.Context(), &archfarmv1.GitContext{Url: url, Ref: "main"}, Auth{})
	if err != nil || got.GetCommit() != r.third {
		t.Errorf("%v, %v", got, err)
	}
	if during.Load() != 1 || entries() != 0 {
		t.Errorf("%d folders while git works, %d afterwards", during.Load(), entries())
	}
}
