package e2e_test

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// backendEnv chooses what the scenarios build at: "farm" (the default) or "direct", one plain buildkitd.
const backendEnv = "ARCHFARM_E2E_BACKEND"

var (
	suite  farmtest.Shared
	common struct {
		once     sync.Once
		endpoint *farmtest.Endpoint
		registry *farmtest.Registry
	}
	repos atomic.Int64
)

func TestMain(m *testing.M) {
	code := m.Run()
	if !suite.Close() && code == 0 {
		code = 1
	}
	os.Exit(code)
}

// rig is what most scenarios use: the shared endpoint and registry, and a repository of its own.
type rig struct {
	*farmtest.Endpoint
	tools    farmtest.Tools
	registry *farmtest.Registry
	repo     string // without the registry's host
}

// newRig returns the shared parts, started by the first test that asks.
func newRig(t *testing.T) rig {
	t.Helper()
	tools := findTools(t)
	common.once.Do(func() {
		suite.Start(t, func(s farmtest.T) {
			registry := farmtest.StartRegistry(s, tools, farmtest.RegistryOptions{})
			common.endpoint, common.registry = startEndpoint(s, tools, fleet()), registry
		})
	})
	if common.endpoint == nil {
		t.Fatal("the shared farm did not start; the first test that asked for it shows why")
	}
	return rigAt(t, tools, common.endpoint, common.registry)
}

// newFarmRig returns a farm of the test's own, for what would disturb others.
func newFarmRig(t *testing.T, workers ...farmtest.WorkerSpec) rig {
	t.Helper()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: workers})
	return rigAt(t, tools, &farm.Endpoint, registry)
}

func rigAt(t *testing.T, tools farmtest.Tools, endpoint *farmtest.Endpoint, registry *farmtest.Registry) rig {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(endpoint.Logs())
		}
	})
	return rig{Endpoint: endpoint, tools: tools, registry: registry, repo: newRepo(t)}
}

// fleet is the shared farm: two real amd64 buildkitds, one of them told that it is arm64. What is built for arm64 there
// must not execute anything of that architecture.
func fleet() []farmtest.WorkerSpec {
	return []farmtest.WorkerSpec{
		{Name: "amd-1", Slots: 4},
		{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 4},
	}
}

func startEndpoint(t farmtest.T, tools farmtest.Tools, workers []farmtest.WorkerSpec) *farmtest.Endpoint {
	if direct() {
		return farmtest.StartDirect(t, tools)
	}
	return &farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: workers}).Endpoint
}

func findTools(t *testing.T) farmtest.Tools {
	t.Helper()
	if direct() {
		return farmtest.FindTools(t)
	}
	return farmtest.FindFarmTools(t)
}

func direct() bool { return os.Getenv(backendEnv) == "direct" }

// farmOnly skips a scenario that a plain buildkitd cannot play.
func farmOnly(t *testing.T) {
	t.Helper()
	if direct() {
		t.Skip("about the farm itself: a plain buildkitd has nothing of the kind")
	}
}

// newRepo makes a repository name for the test.
func newRepo(t *testing.T) string {
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '/' {
			return r
		}
		return '-'
	}, strings.ToLower(t.Name()))
	return fmt.Sprintf("t%d/%s", repos.Add(1), strings.Trim(clean, "-"))
}

// ref is the full reference of a tag in the rig's repository.
func (r rig) ref(tag string) string { return r.registry.Host + "/" + r.repo + ":" + tag }

// context makes a build context with a static busybox and the files.
func (r rig) context(t *testing.T, files map[string]string) string {
	t.Helper()
	return farmtest.Context(t, r.tools, files)
}

// wantNoTags checks that a build that failed left nothing that a user could pull by name.
func (r rig) wantNoTags(t *testing.T) {
	t.Helper()
	if tags := r.registry.Tags(t, r.repo); len(tags) != 0 {
		t.Errorf("a failed build left the tags %v in %s", tags, r.repo)
	}
}

// wantFailure checks that a build failed and said each of the texts.
func wantFailure(t *testing.T, result farmtest.Result, texts ...string) {
	t.Helper()
	if result.Code == 0 {
		t.Fatalf("the build succeeded:\n%s", result.Output)
	}
	for _, text := range texts {
		if !strings.Contains(result.Output, text) {
			t.Errorf("the output does not say %q:\n%s", text, result.Output)
		}
	}
}

// wantEqual compares two values of a named thing.
func wantEqual[V comparable](t *testing.T, what string, got, want V) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// wantList compares two lists of a named thing.
func wantList(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

// legs is a Dockerfile that runs something on amd64 and only copies on any other architecture.
var legs = `FROM scratch AS base
COPY busybox /bin/busybox
FROM base AS leg-amd64
` + farmtest.Run("/bin/busybox uname -m > /uname") + `
FROM base AS leg-arm64
COPY told /uname
FROM leg-${TARGETARCH}
ARG TARGETPLATFORM
LABEL built.for=${TARGETPLATFORM}
COPY app /app
`

// legsContext is a context for the Dockerfile legs.
func (r rig) legsContext(t *testing.T) string {
	t.Helper()
	return r.context(t, map[string]string{"Dockerfile": legs, "told": "told\n", "app": "app of " + t.Name()})
}

// checkLeg checks one platform's image built from legs.
func (r rig) checkLeg(t *testing.T, index farmtest.Index, platform, uname string) {
	t.Helper()
	r.checkImage(t, r.registry.Image(t, index.Repo, index.For(t, platform)), platform, uname)
}

func (r rig) checkImage(t *testing.T, image farmtest.Image, platform, uname string) {
	t.Helper()
	wantEqual(t, "configured platform", farmtest.PlatformName(&image.Config.Platform), platform)
	wantEqual(t, platform+": label", image.Config.Config.Labels["built.for"], platform)
	wantEqual(t, platform+": /uname", image.Files["uname"], uname)
	wantEqual(t, platform+": /app", image.Files["app"], "app of "+t.Name())
	if image.Files["bin/busybox"] == "" {
		t.Errorf("%s: no /bin/busybox in the image: %d files", platform, len(image.Files))
	}
}
