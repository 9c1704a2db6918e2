package e2e_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// pair is two coordinators, which share nothing but one machine with one slot and, in a secured farm, the authority.
type pair struct{ a, b rig }

// worker is the one machine.
const worker = "amd-1"

// newPair starts both. The machine is told of the first's gossip only, and finds the second by it.
func newPair(t *testing.T, secured bool) pair {
	t.Helper()
	first, second := farmtest.FarmOptions{CoordinatorArgs: []string{"--name", "first"}}, farmtest.FarmOptions{}
	spec := farmtest.WorkerSpec{Name: worker, Slots: 1}
	if secured {
		first.Host, second.Host = "127.0.0.1", "127.0.0.1"
	}
	p := pair{a: newFarm(t, first)}
	second.CoordinatorArgs = []string{"--name", "second", "--join", p.a.Farm.Gossip}
	if secured {
		ca := filepath.Join(filepath.Dir(strings.TrimPrefix(p.a.Farm.Admin, "unix://")), "ca")
		second.CoordinatorArgs = append(second.CoordinatorArgs, "--ca-cert", filepath.Join(ca, "ca.pem"), "--ca-key", filepath.Join(ca, "ca.key"))
		spec.Args = []string{"--join", p.a.Farm.Gossip, "--gossip", "127.0.0.1:0"}
	}
	p.b = rigAt(t, p.a.tools, &farmtest.StartFarm(t, p.a.tools, second).Endpoint, p.a.registry)
	if secured {
		p.a.Client, _ = p.a.Farm.Secured(t)
		p.b.Client, _ = p.b.Farm.Secured(t)
	}
	p.a.Farm.AddWorker(t, spec)
	p.a.Farm.WaitWorkers(t, "the first coordinator has the worker", ready(worker))
	p.b.Farm.WaitWorkers(t, "the second coordinator has found the worker", ready(worker))
	return p
}

// each runs a scenario in plaintext, where everybody on this machine is trusted, and with TLS.
func each(t *testing.T, scenario func(t *testing.T, p pair)) {
	t.Parallel()
	farmOnly(t)
	for name, secured := range map[string]bool{"plaintext": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			scenario(t, newPair(t, secured))
		})
	}
}

// turnstile counts the RUN steps that pass it: each is one request, which takes a while.
type turnstile struct {
	url string

	mu           sync.Mutex
	inside, most int
	passed       int
}

// pass is how long a step takes: long enough that two which may run at once would meet.
const pass = 200 * time.Millisecond

func newTurnstile(t *testing.T) *turnstile {
	t.Helper()
	s := &turnstile{}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

func (s *turnstile) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.inside++
	s.most = max(s.most, s.inside)
	s.mu.Unlock()
	over := time.NewTimer(pass)
	defer over.Stop()
	select {
	case <-over.C:
	case <-r.Context().Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inside-- // before the step knows that it may end
	s.passed++
	_, _ = w.Write([]byte("passed\n"))
}

// run is the Dockerfile instruction that passes.
func (s *turnstile) run() string { return farmtest.Run("/bin/busybox wget -q -O /passed " + s.url) }

// step is a context whose one step is that instruction; content makes it another than others.
func (r rig) step(t *testing.T, run, content string) string {
	t.Helper()
	return r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\nCOPY app /app\n" + run + "\n", "app": content})
}

// TestCoordinators_OneSlotIsNeverBookedTwice builds through both coordinators at once, many times.
func TestCoordinators_OneSlotIsNeverBookedTwice(t *testing.T) {
	each(t, func(t *testing.T, p pair) {
		const builds = 6 // at each
		stile := newTurnstile(t)
		var running []*farmtest.Process
		for i := range builds {
			for name, r := range map[string]rig{"first": p.a, "second": p.b} {
				dir := r.step(t, stile.run(), fmt.Sprintf("build %d at the %s of %s", i, name, t.Name()))
				running = append(running, r.Client.StartBuild(t, "--platform", "linux/amd64", dir))
			}
		}
		for i, build := range running {
			if code := build.Wait(t, buildLimit); code != 0 {
				t.Errorf("build %d: exit code %d:\n%s", i, code, build.Output())
			}
		}
		stile.mu.Lock()
		defer stile.mu.Unlock()
		wantEqual(t, "steps that ran", stile.passed, 2*builds)
		wantEqual(t, "steps that ran at the same time", stile.most, 1)
		for _, r := range []rig{p.a, p.b} {
			r.Farm.WaitWorkersWithin(t, goneLimit, "the slot is free", idle)
		}
	})
}

// TestCoordinators_AKilledOneFreesItsSlot kills one in the middle of a build, while a build at the other waits for the
// slot.
func TestCoordinators_AKilledOneFreesItsSlot(t *testing.T) {
	each(t, func(t *testing.T, p pair) {
		first, second := farmtest.NewGate(t), farmtest.NewGate(t)
		cut := p.a.Client.StartBuild(t, "--platform", "linux/amd64", p.a.step(t, first.Run(), "first of "+t.Name()))
		first.WaitArrival(t, cut, startLimit)
		queued := p.b.Client.StartBuild(t, "--platform", "linux/amd64", p.b.step(t, second.Run(), "second of "+t.Name()))
		queued.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))

		p.a.Farm.Coordinator.Kill()
		killed := time.Now()
		second.WaitArrival(t, queued, goneLimit)
		t.Logf("the other coordinator's step runs %s after the kill", time.Since(killed).Round(time.Millisecond))
		first.WaitKilled(t, goneLimit)
		if code := cut.Wait(t, goneLimit); code == 0 {
			t.Errorf("the build of the killed coordinator succeeded:\n%s", cut.Output())
		}

		p.a.Farm.RestartCoordinator(t)
		p.a.Farm.WaitWorkers(t, "the worker is back, and its slot still taken", func(list []farmtest.WorkerStatus) bool {
			return ready(worker)(list) && farmtest.UsedSlots(list) == 1
		})
		waiting := p.a.Client.StartBuild(t, "--platform", "linux/amd64", p.a.step(t, second.Run(), "third of "+t.Name()))
		waiting.WaitOutput(t, startLimit, "a progress step about the queue", lineAbout("queue"))
		second.Open()
		for name, build := range map[string]*farmtest.Process{"queued": queued, "after the restart": waiting} {
			if code := build.Wait(t, buildLimit); code != 0 {
				t.Errorf("the build %s: exit code %d:\n%s", name, code, build.Output())
			}
		}
	})
}
