package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// stepLine is a line that a step of the job below has printed: which run of the step, and which of its lines. Of a step
// that was interrupted, the display shows the last ones once more in its end, without a number.
var stepLine = regexp.MustCompile(`(?m)^#\d+ \S+ ([0-9a-f]{8}-[0-9a-f-]{27}) of (\S+), line (\d+)$`)

// TestJobARM64_WatchedThroughARestart has a job built in a real arm64 machine and beside it, and kills the coordinator in
// the middle of the arm64 leg: the watcher sees every line once, and what was done is not done again.
func TestJobARM64_WatchedThroughARestart(t *testing.T) {
	farmOnly(t)
	if os.Getenv(arm64Env) != "1" {
		t.Skipf("SKIPPED the arm64 machine: run make test, or set %s=1 after make arm64vm", arm64Env)
	}
	t.Parallel()
	r := newJobRig(t, farmtest.FarmOptions{
		Workers: []farmtest.WorkerSpec{{Name: "amd-1", Slots: 1, Dials: true}}, CoordinatorArgs: []string{"--job-lease", "3s"},
	})
	startARM64(t, r.rig)
	gate := farmtest.NewGate(t)
	dir := r.arm64Context(t, gate)
	sha := commit(t, dir)
	id := r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("{{.GitSHA}}"))
	watcher := farmtest.StartProcess(t, farmtest.Spec{
		Name: "archfarm watch", Path: r.tools.Archfarm, Args: []string{"watch", "--farm", r.Farm.Addr, "--progress", "plain", id}, Keep: true,
	})
	events := r.watch(t, id)

	gate.WaitArrival(t, r.Farm.Coordinator, jobLimit)
	watcher.WaitOutput(t, jobLimit, "what the step has printed so far", farmtest.Contains(" of aarch64, line 20\n"))
	farmtest.Eventually(t, jobLimit, "the amd64 leg is done", func() (string, bool) {
		job, err := r.client.Get(t.Context(), id)
		return job.String(), err == nil && legOf(job, "linux/amd64").GetState() == archfarmv1.JobLeg_STATE_SUCCEEDED
	})
	r.Farm.Coordinator.Signal(syscall.SIGKILL)
	r.Farm.Coordinator.Wait(t, jobLimit)
	gate.WaitKilled(t, jobLimit)
	r.Farm.StartCoordinator(t)
	gate.WaitArrival(t, r.Farm.Coordinator, jobLimit)
	gate.Open()

	if code := watcher.Wait(t, jobLimit); code != 0 {
		t.Fatalf("archfarm watch: exit code %d:\n%s", code, watcher.Output())
	}
	if err := <-events; err != nil {
		t.Error(err)
	}
	job := r.ended(t, id, archfarmv1.Job_STATE_SUCCEEDED)
	for platform, attempts := range map[string]int{"linux/amd64": 1, "linux/arm64": 2} {
		wantEqual(t, "attempts of "+platform, len(legOf(job, platform).GetAttempts()), attempts)
	}
	wantLinesOnce(t, watcher.Output(), map[string][]int{"x86_64": {40}, "aarch64": {20, 40}})

	index := r.registry.Index(t, r.repo, sha)
	wantEqual(t, "the tag", index.Digest.String(), job.GetDigest())
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
	for platform, machine := range map[string]string{"linux/amd64": "x86_64\n", "linux/arm64": "aarch64\n"} {
		wantEqual(t, "uname -m of "+platform, r.registry.Image(t, r.repo, index.For(t, platform)).Files["uname"], machine)
	}
}

// arm64Context is a build whose step prints forty lines, and waits at the gate after twenty where it is arm64.
func (r rig) arm64Context(t *testing.T, gate *farmtest.Gate) string {
	t.Helper()
	script := `run=$(/bin/busybox cat /proc/sys/kernel/random/uuid); machine=$(/bin/busybox uname -m); ` +
		`lines() { for i in $(/bin/busybox seq $1 $2); do echo "$run of $machine, line $i"; done; }; lines 1 20; ` +
		`if [ $machine = aarch64 ]; then /bin/busybox wget -q -O /gate ` + guestURL(gate) +
		`; fi; lines 21 40; echo $machine > /uname`
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nARG TARGETARCH\nCOPY busybox-$TARGETARCH /bin/busybox\n" + farmtest.Run(script) + "\n"})
	if err := os.Rename(filepath.Join(dir, "busybox"), filepath.Join(dir, "busybox-amd64")); err != nil {
		t.Fatal(err)
	}
	copyARM64Busybox(t, r, filepath.Join(dir, "busybox-arm64"))
	return dir
}

// wantLinesOnce checks that of each run of the step every line was shown once, in order, from the first to the last one:
// runs has the numbers of lines of each machine's runs.
func wantLinesOnce(t *testing.T, output string, runs map[string][]int) {
	t.Helper()
	lines, machine := map[string]int{}, map[string]string{}
	var order []string
	for _, m := range stepLine.FindAllStringSubmatch(output, -1) {
		if lines[m[1]] == 0 {
			order = append(order, m[1])
		}
		machine[m[1]] = m[2]
		if lines[m[1]]++; m[3] != fmt.Sprint(lines[m[1]]) {
			t.Errorf("line %s of %s is shown where line %d should be", m[3], m[2], lines[m[1]])
		}
	}
	got := map[string][]int{}
	for _, run := range order {
		got[machine[run]] = append(got[machine[run]], lines[run])
	}
	wantEqual(t, "lines of each run of the step", fmt.Sprint(got), fmt.Sprint(runs))
	if t.Failed() {
		t.Log(output)
	}
}
