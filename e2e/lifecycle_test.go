package e2e_test

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

func TestDrain_TheCoordinatorFinishesWhatRuns(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	build, gate := r.atGate(t, "v1", "linux/amd64")
	r.Farm.Coordinator.Signal(syscall.SIGTERM)
	farmtest.Eventually(t, goneLimit, "a draining coordinator is not ready for more", func() (string, bool) {
		status, body, err := get(r.Farm.HTTP + "/readyz")
		return fmt.Sprintf("status %d, %v: %s", status, err, body), status == http.StatusServiceUnavailable
	})
	refused := r.Client.TryBuild(t, "--platform", "linux/amd64", "--push", "-t", r.ref("late"), r.legsContext(t))
	wantFailure(t, refused)
	if !r.Farm.Coordinator.Running() || !build.Running() {
		t.Fatalf("the coordinator did not wait for the running build:\n%s\n%s", r.Farm.Coordinator.Tail(), build.Tail())
	}
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Errorf("the build that ran: exit code %d:\n%s", code, build.Output())
	}
	wantEqual(t, "exit code of the coordinator", r.Farm.Coordinator.Wait(t, startLimit), 0)
	wantList(t, "tags", r.registry.Tags(t, r.repo), "v1")
	image := r.registry.Image(t, r.repo, r.registry.Index(t, r.repo, "v1").For(t, "linux/amd64"))
	wantEqual(t, "/gate", image.Files["gate"], "open\n")
}

func TestDrain_AWorkerFinishesWhatRuns(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	agent := r.Farm.Workers[0].Agent
	build, gate := r.atGate(t, "v1", "linux/amd64")
	agent.Signal(syscall.SIGTERM)
	r.Farm.WaitWorkersWithin(t, goneLimit, "the worker is draining", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return known && w.State == "draining" && w.Slots.Used == 1
	})
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Errorf("the build that ran: exit code %d:\n%s", code, build.Output())
	}
	wantEqual(t, "exit code of the agent", agent.Wait(t, startLimit), 0)
	wantList(t, "tags", r.registry.Tags(t, r.repo), "v1")
	r.Farm.WaitWorkersWithin(t, goneLimit, "the worker has left", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "amd-1")
		return !known || w.State != farmtest.Ready && w.State != "draining"
	})
}

func TestDrain_ASecondSIGTERMStopsAtOnce(t *testing.T) {
	t.Parallel()
	for name, process := range map[string]func(*farmtest.Farm) *farmtest.Process{
		"coordinator": func(f *farmtest.Farm) *farmtest.Process { return f.Coordinator },
		"worker":      func(f *farmtest.Farm) *farmtest.Process { return f.Workers[0].Agent },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newFarm(t, farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{oneSlot()}, CoordinatorArgs: []string{"--failover-wait", "0"}})
			build, gate := r.atGate(t, "v1", "linux/amd64")
			stopping := process(r.Farm)
			stopping.Signal(syscall.SIGTERM)
			stopping.WaitOutput(t, goneLimit, "a log line about draining", lineAbout("drain"))
			stopping.Signal(syscall.SIGTERM)
			if code := stopping.Wait(t, goneLimit); code == 0 {
				t.Errorf("a %s that gave up a build ended with exit code 0:\n%s", name, stopping.Tail())
			}
			if code := build.Wait(t, 20*time.Second); code == 0 {
				t.Errorf("the build succeeded without its %s:\n%s", name, build.Output())
			}
			gate.WaitKilled(t, goneLimit)
			r.wantNoTags(t)
		})
	}
}

func TestHTTP_HealthReadinessAndMetrics(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	for _, path := range []string{"/healthz", "/readyz"} {
		status, body, err := get(r.Farm.HTTP + path)
		if err != nil || status != http.StatusOK {
			t.Errorf("%s: status %d, %v: %s", path, status, err, body)
		}
	}
	_, body, err := get(r.Farm.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\ngo_goroutines ", "\narchfarm_"} {
		if !strings.Contains(body, want) {
			t.Errorf("/metrics has no %q:\n%s", want, body)
		}
	}
	if status, _, err := get(r.Farm.HTTP + "/no-such-page"); err != nil || status != http.StatusNotFound {
		t.Errorf("/no-such-page: status %d, %v", status, err)
	}
}

func TestWorkers_ListsTheFleet(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	list, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 {
		t.Fatalf("want two workers: %+v", list)
	}
	for name, platform := range map[string]string{"amd-1": "linux/amd64", "arm-1": "linux/arm64"} {
		w, known := farmtest.Find(list, name)
		if !known {
			t.Errorf("no %s among %+v", name, list)
			continue
		}
		if !slices.Contains(w.Platforms, platform) {
			t.Errorf("%s does not build %s: %v", name, platform, w.Platforms)
		}
		wantEqual(t, name+": slots", w.Slots.Total, 4)
		wantEqual(t, name+": state", w.State, farmtest.Ready)
		if w.Version == "" || w.Since.IsZero() || w.Since.After(time.Now().Add(time.Minute)) {
			t.Errorf("%s: version %q, since %v", name, w.Version, w.Since)
		}
	}
	told, _ := farmtest.Find(list, "arm-1")
	wantList(t, "the operator's word overrides what the machine is", told.Platforms, "linux/arm64")

	table := r.Farm.Archfarm(t, "workers")
	for _, want := range []string{"amd-1", "arm-1", "linux/amd64", "linux/arm64", farmtest.Ready} {
		if table.Code != 0 || !strings.Contains(table.Output, want) {
			t.Errorf("archfarm workers does not say %q (exit code %d):\n%s", want, table.Code, table.Output)
		}
	}
}

func TestWorkers_NoFarmThereIsSaid(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	nobody := *r.Farm
	nobody.Addr = "tcp://127.0.0.1:1"
	result := nobody.Archfarm(t, "workers", "--output", "json")
	wantFailure(t, result, "127.0.0.1:1")
	if result.Took > startLimit {
		t.Errorf("it took %v to say so", result.Took)
	}
}

func TestInspect_TheFarmLooksLikeOneBuildkitd(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newRig(t)
	result := r.Client.Run(t, "inspect", "farm")
	if result.Code != 0 {
		t.Fatalf("exit code %d:\n%s", result.Code, result.Output)
	}
	platforms := regexp.MustCompile(`(?m)^Platforms:\s+(.*)$`).FindStringSubmatch(result.Output)
	if platforms == nil || !strings.Contains(platforms[1], "linux/amd64") || !strings.Contains(platforms[1], "linux/arm64") {
		t.Errorf("buildx inspect does not list both platforms:\n%s", result.Output)
	}
	if !strings.Contains(result.Output, "running") {
		t.Errorf("buildx inspect does not call it running:\n%s", result.Output)
	}
}

// TestLeak_GoroutinesOfTheCoordinatorGoBackToTheirBase lets builds succeed, fail and be killed.
func TestLeak_GoroutinesOfTheCoordinatorGoBackToTheirBase(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 2},
		farmtest.WorkerSpec{Name: "arm-1", Platforms: []string{"linux/arm64"}, Slots: 2})
	dir := r.legsContext(t)
	bad := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY does-not-exist /\n"})
	round := func(name string) {
		r.Client.Build(t, "--platform", both, "--push", "-t", r.ref(name), dir)
		wantFailure(t, r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("bad"), bad))
		build, gate := r.atGate(t, "killed", both)
		build.Kill()
		gate.WaitKilled(t, goneLimit)
	}
	round("warm-up") // connections to the registry and the like are there to stay
	r.Farm.WaitWorkersWithin(t, goneLimit, "all slots are free", idle)
	base := r.settledGoroutines(t)
	const rounds, slack = 4, 3 // a goroutine that each build leaks is more than the slack
	for i := range rounds {
		round(fmt.Sprintf("v%d", i))
	}
	farmtest.Eventually(t, 15*time.Second, "goroutines go back to their base", func() (string, bool) {
		now := r.goroutines(t)
		return fmt.Sprintf("%d goroutines, %d before %d more rounds", now, base, rounds), now <= base+slack
	})
}

// settledGoroutines is the coordinator's number of goroutines at rest: the least of a second, once that stays the same for
// another. Between its rests there are those that gossip and these questions need for a moment.
func (r rig) settledGoroutines(t *testing.T) int {
	t.Helper()
	const second = 20 // questions
	least, last, asked := math.MaxInt, math.MaxInt, 0
	farmtest.Eventually(t, startLimit, "the number of goroutines settles", func() (string, bool) {
		now := r.goroutines(t)
		least = min(least, now)
		if asked++; asked < second {
			return strconv.Itoa(now), false
		}
		settled := least == last
		last, least, asked = least, math.MaxInt, 0
		return strconv.Itoa(now), settled
	})
	return last
}

func (r rig) goroutines(t *testing.T) int {
	t.Helper()
	_, body, err := get(r.Farm.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(strings.NewReader(body)); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "go_goroutines "); ok {
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no go_goroutines in /metrics:\n%s", body)
	return 0
}

// get fetches a page over a connection of its own, which leaves nothing behind at the server.
func get(url string) (status int, body string, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	raw, err := io.ReadAll(response.Body)
	return response.StatusCode, string(raw), err
}
