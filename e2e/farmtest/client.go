package farmtest

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// buildLimit is how long one build may take in these tests, queueing on a busy machine included.
const buildLimit = 2 * time.Minute

// Client is a stock docker buildx with a private configuration and one remote builder.
type Client struct {
	tools  Tools
	env    []string
	before []string // arguments before buildx's own
	path   string
}

// Login is what a client's docker configuration knows about a registry.
type Login struct{ Host, User, Password string }

// NewClient sets up docker buildx (buildx alone where there is no docker) for the BuildKit endpoint at addr.
func NewClient(t T, tools Tools, addr string, logins ...Login) *Client {
	t.Helper()
	return newClient(t, tools, []string{addr}, logins)
}

// NewClientOf is NewClient for a builder that needs options, such as a certificate: create are the last arguments of
// docker buildx create.
func NewClientOf(t T, tools Tools, create ...string) *Client {
	t.Helper()
	return newClient(t, tools, create, nil)
}

func newClient(t T, tools Tools, create []string, logins []Login) *Client {
	t.Helper()
	dir := Folder(t)
	auths := map[string]any{}
	for _, login := range logins {
		auth := base64.StdEncoding.EncodeToString([]byte(login.User + ":" + login.Password))
		auths[login.Host] = map[string]string{"auth": auth}
	}
	config, err := json.Marshal(map[string]any{"auths": auths})
	if err != nil {
		t.Fatalf("writing docker's configuration: %v", err)
	}
	WriteFile(t, dir, "docker/config.json", string(config))
	docker := filepath.Join(dir, "docker")
	c := &Client{
		tools: tools,
		path:  tools.Buildx,
		env:   []string{"HOME=" + dir, "DOCKER_CONFIG=" + docker, "BUILDX_CONFIG=" + filepath.Join(dir, "buildx")},
	}
	if tools.Docker != "" {
		plugin := filepath.Join(docker, "cli-plugins", "docker-buildx")
		if err := os.MkdirAll(filepath.Dir(plugin), 0o755); err != nil {
			t.Fatalf("making docker's plugin folder: %v", err)
		}
		if err := os.Symlink(tools.Buildx, plugin); err != nil {
			t.Fatalf("giving docker its buildx: %v", err)
		}
		c.path, c.before = tools.Docker, []string{"buildx"}
	}
	if result := c.Run(t, append([]string{"create", "--name", "farm", "--driver", "remote", "--use"}, create...)...); result.Code != 0 {
		t.Fatalf("creating a builder for %s: exit code %d:\n%s", create, result.Code, result.Output)
	}
	return c
}

// Result is how a command ended.
type Result struct {
	Output string // both streams
	Code   int
	Took   time.Duration
}

// Run runs one buildx command to its end.
func (c *Client) Run(t T, args ...string) Result {
	t.Helper()
	return finish(t, c.start(t, args))
}

// Build builds and fails the test unless that succeeds.
func (c *Client) Build(t T, args ...string) Result {
	t.Helper()
	result := c.TryBuild(t, args...)
	if result.Code != 0 {
		t.Fatalf("docker buildx build %s: exit code %d:\n%s", strings.Join(args, " "), result.Code, result.Output)
	}
	return result
}

// TryBuild builds and returns how that went.
func (c *Client) TryBuild(t T, args ...string) Result {
	t.Helper()
	return finish(t, c.StartBuild(t, args...))
}

// StartBuild starts a build that is killed at the end of the test if it still runs.
func (c *Client) StartBuild(t T, args ...string) *Process {
	t.Helper()
	return c.start(t, append([]string{"build", "--builder", "farm", "--progress=plain"}, args...))
}

// Bake runs buildx bake for the targets of a file in the folder dir, which is also where it runs.
func (c *Client) Bake(t T, dir, file string, args ...string) Result {
	t.Helper()
	return finish(t, c.StartBake(t, dir, file, args...))
}

// StartBake is Bake that does not wait.
func (c *Client) StartBake(t T, dir, file string, args ...string) *Process {
	t.Helper()
	return c.startIn(t, dir, append([]string{"bake", "--builder", "farm", "--progress=plain", "--file", file}, args...))
}

func (c *Client) start(t T, args []string) *Process { return c.startIn(t, "", args) }

func (c *Client) startIn(t T, dir string, args []string) *Process {
	return StartProcess(t, Spec{
		Name: "docker buildx " + args[0], Path: c.path, Args: append(append([]string{}, c.before...), args...), Env: c.env, Dir: dir, Keep: true,
	})
}

// Buildctl runs one buildctl command against addr to its end.
func Buildctl(t T, tools Tools, addr string, args ...string) Result {
	t.Helper()
	return BuildctlInput(t, tools, addr, nil, args...)
}

// BuildctlInput is Buildctl with something on its standard input.
func BuildctlInput(t T, tools Tools, addr string, in io.Reader, args ...string) Result {
	t.Helper()
	home := Folder(t)
	return finish(t, StartProcess(t, Spec{
		Name: "buildctl", Path: tools.Buildctl, Args: append([]string{"--addr", addr}, args...),
		Env: []string{"HOME=" + home, "DOCKER_CONFIG=" + home}, In: in, Keep: true,
	}))
}

func finish(t T, p *Process) Result {
	t.Helper()
	start := time.Now()
	code := p.Wait(t, buildLimit)
	return Result{Output: p.Output(), Code: code, Took: time.Since(start)}
}

// Context makes a build context of the files, plus a static busybox for the steps of an image FROM scratch.
func Context(t T, tools Tools, files map[string]string) string {
	t.Helper()
	dir := Folder(t)
	for name, content := range files {
		WriteFile(t, dir, name, content)
	}
	if err := copyFile(tools.Busybox, filepath.Join(dir, "busybox")); err != nil {
		t.Fatalf("putting busybox into the context: %v", err)
	}
	return dir
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("copying %s: %w", from, err)
	}
	return os.WriteFile(to, content, 0o755)
}
