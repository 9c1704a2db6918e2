package e2e_test

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// What nobody may wait for longer than: a client for its own end after Ctrl-C, the queue for that build to be gone, the
// siblings of a failed leg, and a build that no worker can ever serve.
const (
	leaveLimit   = 3 * time.Second // on a busy machine; a tenth of that usually
	unqueueLimit = 2 * time.Second
	siblingLimit = 2 * time.Second
	refusalLimit = 10 * time.Second // with what a client takes to start; who waits, waits for 30 s
)

// since is the time that has passed, as it is told.
func since(at time.Time) time.Duration { return time.Since(at).Round(time.Millisecond) }

// timed is a context whose one step takes as long once it is at the gate.
func (r rig) timed(t *testing.T, gate *farmtest.Gate, takes time.Duration) string {
	t.Helper()
	run := farmtest.Run(fmt.Sprintf("/bin/busybox wget -q -O /gate %s; /bin/busybox sleep %d", gate.URL, int(takes.Seconds())))
	return r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + run + "\n"})
}

var estimated = regexp.MustCompile(`position 1 in the queue, starts in about (\d+) s: linux/amd64: 1 full`)

// TestQueue_TellsForHowLong has a farm of one slot build something twice: the second time it is known how long it takes.
func TestQueue_TellsForHowLong(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	const takes = 6 * time.Second
	gate := farmtest.NewGate(t)
	gate.Open()
	dir := r.timed(t, gate, takes)
	arguments := []string{"--platform", "linux/amd64", "--no-cache", dir}
	first := r.Client.StartBuild(t, arguments...)
	gate.WaitArrival(t, first, startLimit)

	unknown := r.Client.StartBuild(t, "--platform", "linux/amd64", r.legsContext(t))
	line := unknown.WaitOutput(t, startLimit, "where it stands", lineAbout("position 1 in the queue"))
	if !strings.HasSuffix(line, "position 1 in the queue: linux/amd64: 1 full") {
		t.Errorf("nothing like it has been built before, but who waits is told: %s", line)
	}
	for _, build := range []*farmtest.Process{first, unknown} {
		if code := build.Wait(t, buildLimit); code != 0 {
			t.Fatalf("exit code %d:\n%s", code, build.Output())
		}
	}

	again := r.Client.StartBuild(t, arguments...)
	gate.WaitArrival(t, again, startLimit)
	next := r.Client.StartBuild(t, "--platform", "linux/amd64", "--no-cache", r.legsContext(t))
	said := next.WaitOutput(t, startLimit, "for how long it will wait", estimated.FindString)
	asked := time.Now()
	table := r.archfarm(t, "queue")
	legs := jsonOf[[]queued](t, r, "queue")
	if len(legs) != 1 || legs[0].Estimate <= 0 || legs[0].Estimate > 2*takes.Seconds() || !strings.Contains(table, "about ") {
		t.Errorf("the queue says %+v\n%s", legs, table)
	}
	wantTexts(t, "archfarm explain", r.archfarm(t, "explain", legs[0].Build), "amd-1 frees up in about ")
	next.WaitOutput(t, startLimit, "where it runs", lineAbout("assigned to worker amd-1"))
	waited := time.Since(asked)
	seconds, err := strconv.Atoi(estimated.FindStringSubmatch(said)[1])
	if err != nil || seconds < 1 || seconds > 2*int(takes.Seconds()) {
		t.Errorf("%v: a step of %s was estimated to leave the slot in %d s", err, takes, seconds)
	}
	t.Logf("said: %s; waited: %s", said, waited.Round(time.Millisecond))
	for _, build := range []*farmtest.Process{again, next} {
		if code := build.Wait(t, buildLimit); code != 0 {
			t.Errorf("exit code %d:\n%s", code, build.Output())
		}
	}
	if told := strings.Count(next.Output(), "position 1 in the queue"); told > 2 { // once more where it took much longer
		t.Errorf("it was told %d times where it stands:\n%s", told, next.Output())
	}
}

// clients are the programs that build, with those arguments.
var clients = map[string]func(r rig, t *testing.T, args ...string) *farmtest.Process{
	"buildx": func(r rig, t *testing.T, args ...string) *farmtest.Process {
		t.Helper()
		return r.Client.StartBuild(t, args...)
	},
	"archfarm": func(r rig, t *testing.T, args ...string) *farmtest.Process {
		t.Helper()
		return farmtest.StartProcess(t, r.buildCommand(nil, nil, args...))
	},
}

// TestGone_AWaitingBuildThatIsInterruptedLeavesAtOnce presses Ctrl-C while a build of two legs waits for one of them.
func TestGone_AWaitingBuildThatIsInterruptedLeavesAtOnce(t *testing.T) {
	t.Parallel()
	for name, start := range clients {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := alone(t)
			first, gate := r.atGate(t, "first", both)
			waiting := start(r, t, "--platform", both, "--push", "-t", r.ref("waiting"), r.legsContext(t))
			waiting.WaitOutput(t, startLimit, "that its amd64 leg waits", lineAbout("position 1 in the queue: linux/amd64: 1 full"))
			r.waitQueue(t, startLimit, 1)

			waiting.SignalGroup(syscall.SIGINT)
			interrupted := time.Now()
			if code := waiting.Wait(t, leaveLimit); code == 0 {
				t.Errorf("an interrupted build succeeds:\n%s", waiting.Output())
			}
			left := since(interrupted)
			r.waitQueue(t, max(unqueueLimit-time.Since(interrupted), time.Millisecond), 0)
			t.Logf("the client was gone after %s, its legs after %s", left, since(interrupted))
			gate.Open()
			if code := first.Wait(t, buildLimit); code != 0 {
				t.Errorf("exit code %d:\n%s", code, first.Output())
			}
			wantList(t, "tags", r.registry.Tags(t, r.repo), "first")
		})
	}
}

// TestGone_ARunningBuildThatIsInterruptedLeavesAtOnce presses Ctrl-C while a step runs.
func TestGone_ARunningBuildThatIsInterruptedLeavesAtOnce(t *testing.T) {
	t.Parallel()
	for name, start := range clients {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := alone(t)
			gate := farmtest.NewGate(t)
			running := start(r, t, "--platform", "linux/amd64", "--push", "-t", r.ref("v1"), r.step(t, gate.Run(), name))
			gate.WaitArrival(t, running, startLimit)
			running.SignalGroup(syscall.SIGINT)
			interrupted := time.Now()
			if code := running.Wait(t, leaveLimit); code == 0 {
				t.Errorf("an interrupted build succeeds:\n%s", running.Output())
			}
			left := since(interrupted)
			gate.WaitKilled(t, goneLimit)
			t.Logf("the client was gone after %s, its step after %s", left, since(interrupted))
			r.Farm.WaitWorkersWithin(t, goneLimit, "the slot is free", idle)
			r.wantNoTags(t)
		})
	}
}

// waitQueue waits until as many legs are in the queue.
func (r rig) waitQueue(t *testing.T, limit time.Duration, legs int) {
	t.Helper()
	farmtest.Eventually(t, limit, fmt.Sprintf("%d legs wait", legs), func() (string, bool) {
		list := jsonOf[[]queued](t, r, "queue")
		return fmt.Sprintf("%+v", list), len(list) == legs
	})
}

// TestQueue_WhatNobodyCanEverServeIsRefusedAtOnce asks for workers that there are none of: by pool, before anything is
// built, and by what a step turns out to need. Only while a coordinator has just started may they still be coming.
func TestQueue_WhatNobodyCanEverServeIsRefusedAtOnce(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, oneSlot())
	const afterStart = 45 * time.Second // what the coordinator allows workers to come in is 30 s of it
	pool := []string{"--platform", "linux/amd64", "--build-arg", "archfarm.pool=nowhere", r.legsContext(t)}
	early := r.Client.StartBuild(t, pool...)
	early.WaitOutput(t, startLimit, "that it waits", lineAbout("no worker attached"))
	early.WaitOutput(t, afterStart, "why it is refused", lineAbout("no native worker"))
	if code := early.Wait(t, leaveLimit); code == 0 {
		t.Errorf("a build in a pool without workers succeeded:\n%s", early.Output())
	}
	step := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + farmtest.Run("make") + "\n"})
	for name, args := range map[string][]string{
		"a pool without workers":                   pool,
		"a platform that nobody runs":              {"--platform", "linux/s390x", step},
		"a platform that nobody runs, and another": {"--platform", "linux/amd64,linux/s390x", step},
	} {
		result := r.Client.TryBuild(t, args...)
		wantFailure(t, result, "no native worker")
		if strings.Contains(result.Output, "queue") {
			t.Errorf("%s: it waited:\n%s", name, result.Output)
		}
		if result.Took > refusalLimit {
			t.Errorf("%s: refused after %s, want %s at most", name, result.Took, refusalLimit)
		}
		t.Logf("%s: refused after %s", name, result.Took.Round(time.Millisecond))
	}
}
