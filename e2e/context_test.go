package e2e_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	// contextSize is that of a context whose bytes are counted: large beside what else a client sends.
	contextSize = 24 << 20
	// onceMore is how much more than one platform several may make a client send.
	onceMore = 1.02
)

// fourArchitectures are a farm's workers, each a buildkitd of its own. What is built there must not execute anything.
func fourArchitectures() []farmtest.WorkerSpec {
	var specs []farmtest.WorkerSpec
	for _, arch := range []string{"amd64", "arm64", "riscv64", "s390x"} {
		specs = append(specs, farmtest.WorkerSpec{Name: arch, Platforms: []string{"linux/" + arch}, Slots: 4})
	}
	return specs
}

// metered is a farm behind a meter, with its client.
type metered struct {
	rig
	meter *farmtest.Meter
}

func newMetered(t *testing.T, args ...string) metered {
	t.Helper()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fourArchitectures(), CoordinatorArgs: args})
	m := metered{rig: rigAt(t, tools, &farm.Endpoint, registry), meter: farmtest.NewMeter(t, farm.Addr)}
	m.Client = farmtest.NewClient(t, tools, m.meter.Addr)
	return m
}

// noise fills a file with what cannot be guessed nor compressed.
func noise(t *testing.T, path string, seed byte, size int) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{seed}), int64(size)); err != nil {
		t.Fatal(err)
	}
}

// sources is a context of about contextSize.
func (m metered) sources(t *testing.T, seed byte) string {
	t.Helper()
	dir := farmtest.Folder(t)
	farmtest.WriteFile(t, dir, "Dockerfile", "FROM scratch\nCOPY . /\n")
	noise(t, filepath.Join(dir, "large"), seed, contextSize-100*100_000)
	for i := range 100 {
		noise(t, filepath.Join(dir, fmt.Sprint("part", i)), seed+byte(i), 100_000)
	}
	return dir
}

// build builds, pushes nothing, and returns what the client sent.
func (m metered) build(t *testing.T, dir, platforms string) int64 {
	t.Helper()
	before := m.meter.Sent()
	m.Client.Build(t, "--platform", platforms, "--provenance=false", dir)
	return m.meter.Sent() - before
}

func TestContext_ItsBytesLeaveTheClientOnce(t *testing.T) {
	t.Parallel()
	m := newMetered(t)
	one := m.build(t, m.sources(t, 1), "linux/amd64")
	for platforms, seed := range map[string]byte{"linux/amd64,linux/arm64": 2, "linux/amd64,linux/arm64,linux/riscv64,linux/s390x": 3} {
		several := m.build(t, m.sources(t, seed), platforms)
		ratio := float64(several) / float64(one)
		t.Logf("%s: %d bytes, for one platform %d: %.4f", platforms, several, one, ratio)
		if ratio > onceMore {
			t.Errorf("%s: the client sent %.4f times what it sends for one platform, at most %.2f is wanted", platforms, ratio, onceMore)
		}
	}
	if spooled := m.metric(t, `archfarm_context_bytes_total{source="spool"}`); spooled < 4*contextSize {
		t.Errorf("%.0f bytes came from the spool", spooled)
	}
	farmtest.Eventually(t, goneLimit, "the spool is empty", func() (string, bool) {
		used := m.metric(t, "archfarm_context_spool_bytes")
		return fmt.Sprint(used), used == 0
	})
}

// TestContext_SwitchedOffItIsSentForEachPlatform shows that what the test above counts is the spool's doing.
func TestContext_SwitchedOffItIsSentForEachPlatform(t *testing.T) {
	t.Parallel()
	m := newMetered(t, "--context-spool-max-size", "0")
	if sent := m.build(t, m.sources(t, 1), "linux/amd64,linux/arm64"); sent < 2*contextSize {
		t.Errorf("the client sent %d bytes", sent)
	}
}

func TestContext_OnlyWhatHasChangedIsSentAgain(t *testing.T) {
	t.Parallel()
	m := newMetered(t)
	dir := m.sources(t, 1)
	m.build(t, dir, "linux/amd64,linux/arm64")
	noise(t, filepath.Join(dir, "part7"), 200, 2_000_000)
	sent := m.build(t, dir, "linux/amd64,linux/arm64")
	t.Logf("after a change of 2000000 bytes the client sent %d", sent)
	if sent < 2_000_000 || sent > 2_200_000 {
		t.Errorf("after a change of 2000000 bytes the client sent %d", sent)
	}
}

// TestContext_TheFetchingWorkerIsKilled kills a worker while the client sends a file to it. Its leg goes on elsewhere, and
// both have all of the context.
func TestContext_TheFetchingWorkerIsKilled(t *testing.T) {
	t.Parallel()
	m := newMetered(t)
	m.Farm.AddWorker(t, farmtest.WorkerSpec{Name: "spare", Platforms: []string{"linux/amd64"}, Slots: 4})
	m.Farm.WaitWorkers(t, "the spare worker is ready", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "spare")
		return known && w.State == farmtest.Ready
	})
	dir := m.sources(t, 1)
	noise(t, filepath.Join(dir, "large"), 1, 10*contextSize)
	out := farmtest.Folder(t)
	build := m.Client.StartBuild(t, "--platform", "linux/amd64,linux/arm64", "--provenance=false", "--output", "type=local,dest="+out, dir)
	before := m.meter.Sent()
	farmtest.Eventually(t, startLimit, "a part of the context is sent", func() (string, bool) {
		sent := m.meter.Sent() - before
		return fmt.Sprint(sent), sent > contextSize || !build.Running()
	})
	m.killBuilding(t, "amd64", "spare")
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	for _, arch := range []string{"amd64", "arm64"} {
		sameFile(t, filepath.Join(dir, "large"), filepath.Join(out, "linux_"+arch, "large"))
	}
	// The coordinator is as good as before.
	sent := m.build(t, m.sources(t, 9), "linux/arm64,linux/riscv64")
	if float64(sent) > onceMore*1.01*contextSize {
		t.Errorf("the client sent %d bytes", sent)
	}
}

// killBuilding kills that one of the workers that has something to do.
func (m metered) killBuilding(t *testing.T, names ...string) {
	t.Helper()
	list, err := m.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range m.Farm.Workers {
		if status, known := farmtest.Find(list, w.Name); known && slices.Contains(names, w.Name) && status.Slots.Used > 0 {
			w.Buildkitd.Kill()
			return
		}
	}
	t.Fatalf("none of %v builds: %+v", names, list)
}

func sameFile(t *testing.T, want, got string) {
	t.Helper()
	a, errA := os.ReadFile(want)
	b, errB := os.ReadFile(got)
	if errA != nil || errB != nil || !bytes.Equal(a, b) {
		t.Errorf("%s has %d bytes, %s has %d, or others; %v, %v", want, len(a), got, len(b), errA, errB)
	}
}

// TestContext_BakeSharesLocalSources has several targets of two platforms build from one folder.
func TestContext_BakeSharesLocalSources(t *testing.T) {
	t.Parallel()
	m := newMetered(t)
	dir := m.sources(t, 1)
	farmtest.WriteFile(t, dir, "two.Dockerfile", "FROM scratch\nCOPY large part1 /two/\n")
	farmtest.WriteFile(t, dir, "docker-bake.hcl", `group "default" { targets = ["one", "two"] }
target "one" { platforms = ["linux/amd64", "linux/arm64"] }
target "two" {
  dockerfile = "two.Dockerfile"
  platforms = ["linux/amd64", "linux/arm64"]
}
`)
	before := m.meter.Sent()
	if result := m.Client.Bake(t, dir, "docker-bake.hcl", "--provenance=false"); result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	sent := m.meter.Sent() - before
	t.Logf("the client sent %d bytes", sent)
	if float64(sent) > onceMore*1.01*contextSize {
		t.Errorf("the client sent %d bytes of %d", sent, contextSize)
	}
}

// metric reads one of the coordinator's metrics.
func (r rig) metric(t *testing.T, name string) float64 {
	t.Helper()
	resp, err := http.Get(r.Farm.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if value, found := strings.CutPrefix(line, name+" "); found {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("the coordinator has no %s", name)
	return 0
}
