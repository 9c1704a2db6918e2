// Package farmtest runs the real parts of a build farm for end-to-end tests: buildkitds, a registry, the
// archfarm binary, and the stock clients docker buildx and buildctl.
//
// Everything that a test starts ends with that test: processes are stopped by their id and waited for,
// containers they leave behind are deleted, mounts are taken off and folders removed. A failing test shows the
// tail of every log of the parts it used.
package farmtest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// T is the part of *testing.T that the harness needs. A Shared is one too, for parts that outlive one test.
type T interface {
	Helper()
	Name() string
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// RequireEnv is the environment variable that turns a missing tool from a skip into a failure when it is
// "require". CI=true does the same.
const RequireEnv = "ARCHFARM_E2E"

// BinaryEnv names the archfarm binary to test; without it bin/archfarm of the checkout is tested.
const BinaryEnv = "ARCHFARM_E2E_BINARY"

// Tools are the absolute paths of the programs that the tests drive. Docker is empty where there is no docker
// command: then buildx is run by itself.
type Tools struct {
	Root      string // of the checkout
	Archfarm  string
	Buildkitd string
	Buildctl  string
	Buildx    string
	Registry  string
	S3        string // a server of its protocol
	Docker    string
	Busybox   string // statically linked, so that it runs in an image FROM scratch
}

// FindTools returns the tools. Where the machine cannot run the tests (not root, a tool missing) it skips the test
// and says why, or fails it when CI or RequireEnv demands the tests. The archfarm binary is FindFarmTools' matter.
func FindTools(t T) Tools {
	t.Helper()
	tools, err := find()
	if err != nil {
		cannotRun(t, err)
	}
	return tools
}

// FindFarmTools is FindTools for tests of a farm, which need the archfarm binary too.
func FindFarmTools(t T) Tools {
	t.Helper()
	tools := FindTools(t)
	if _, err := os.Stat(tools.Archfarm); err != nil {
		cannotRun(t, fmt.Errorf("archfarm is missing, run make build: %w", err))
	}
	return tools
}

func cannotRun(t T, err error) {
	t.Helper()
	if os.Getenv("CI") == "true" || os.Getenv(RequireEnv) == "require" {
		t.Fatalf("end-to-end tests are required here but cannot run: %v", err)
	}
	t.Skipf("SKIPPED, nothing was tested end to end: %v", err)
}

var find = sync.OnceValues(func() (Tools, error) {
	if os.Geteuid() != 0 {
		return Tools{}, fmt.Errorf("buildkitd needs root: run the tests as root")
	}
	root, err := findRoot()
	if err != nil {
		return Tools{}, err
	}
	bin := filepath.Join(root, "bin")
	tools := Tools{
		Root:      root,
		Archfarm:  os.Getenv(BinaryEnv),
		Buildkitd: filepath.Join(bin, "tools", "buildkitd"),
		Buildctl:  filepath.Join(bin, "tools", "buildctl"),
		Buildx:    filepath.Join(bin, "tools", "buildx"),
		Registry:  filepath.Join(bin, "tools", "registry"),
		S3:        filepath.Join(bin, "tools", "gofakes3"),
	}
	if tools.Archfarm == "" {
		tools.Archfarm = filepath.Join(bin, "archfarm")
	}
	for _, file := range []string{tools.Buildkitd, tools.Buildctl, tools.Buildx, tools.Registry, tools.S3} {
		if _, err := os.Stat(file); err != nil {
			return Tools{}, fmt.Errorf("a tool is missing, run make tools: %w", err)
		}
	}
	if tools.Busybox, err = exec.LookPath("busybox"); err != nil {
		return Tools{}, fmt.Errorf("install busybox-static: %w", err)
	}
	if _, err := exec.LookPath("runc"); err != nil {
		return Tools{}, fmt.Errorf("install runc: %w", err)
	}
	tools.Docker, _ = exec.LookPath("docker") // buildx alone does as well
	return tools, nil
})

// findRoot walks up from the working folder, which go test sets to the tested package's, to the module's root.
func findRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the checkout: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("finding the checkout: no go.mod above %s", start)
		}
	}
}

// Eventually polls until check reports true, and fails the test with the state that check last told when it has not
// within the limit.
func Eventually(t T, limit time.Duration, what string, check func() (state string, ok bool)) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		state, ok := check()
		if ok {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within %v; last seen: %s", what, limit, state)
			return
		case <-tick.C:
		}
	}
}

// cleanEnv is this process's environment without what would steer the tested programs, plus extra.
func cleanEnv(extra ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		switch name, _, _ := strings.Cut(kv, "="); {
		case hasAnyPrefix(name, "ARCHFARM_", "BUILDKIT_", "BUILDX_", "BUILDCTL_", "DOCKER_", "OTEL_", "SSH_", "SOURCE_DATE_EPOCH"):
		case strings.HasSuffix(strings.ToLower(name), "_proxy"):
		default:
			env = append(env, kv)
		}
	}
	return append(env, extra...)
}

func hasAnyPrefix(s string, prefixes ...string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}
