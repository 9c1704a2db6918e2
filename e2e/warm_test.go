package e2e_test

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// assignments are what the coordinator's log says of workers chosen: which, and why.
var assignments = regexp.MustCompile(`leg assigned.* worker=(\S+) why="?([^"\n]*)"?.* waited=`)

// TestWarm_TargetsOfOneRepositorySpreadAndStay builds ten targets of one repository, one after the other, on a farm of
// ten workers that are idle each time: where each is the first choice of nobody else. Then again from another checkout
// of the same repository, as CI has a fresh one each time.
func TestWarm_TargetsOfOneRepositorySpreadAndStay(t *testing.T) {
	t.Parallel()
	r, targets, checkouts := newMonorepo(t)
	var homes []string
	for _, target := range targets {
		worker, why := r.assignedTo(t, checkouts[0], target)
		wantTexts(t, "why "+target+" is built on "+worker, why, "least loaded")
		homes = append(homes, worker)
	}
	used := map[string]bool{}
	for _, worker := range homes {
		used[worker] = true
	}
	t.Logf("%d targets on %d workers: %s", len(targets), len(used), homes)
	if len(used) < 8 {
		t.Errorf("%d targets of one repository were built on %d workers only: %s", len(targets), len(used), slices.Sorted(maps.Keys(used)))
	}
	for i, target := range slices.Backward(targets) {
		worker, why := r.assignedTo(t, checkouts[1], target)
		wantEqual(t, "where "+target+" is built again", worker, homes[i])
		wantTexts(t, "why "+target+" is built on "+worker, why, "warm: last built this project")
	}
}

// newMonorepo is a farm of ten workers, two buildkitds with five agents each, and two checkouts of a repository with
// ten targets.
func newMonorepo(t *testing.T) (r rig, targets []string, checkouts [2]string) {
	t.Helper()
	const workers, daemons = 10, 2
	var specs []farmtest.WorkerSpec
	for i := range daemons {
		specs = append(specs, farmtest.WorkerSpec{Name: fmt.Sprintf("amd-%d", i), Slots: 2})
	}
	r = newFarmRig(t, specs...)
	for i := daemons; i < workers; i++ {
		w := &farmtest.FarmWorker{
			WorkerSpec: farmtest.WorkerSpec{Name: fmt.Sprintf("amd-%d", i), Slots: 2}, Buildkitd: r.Farm.Workers[i%daemons].Buildkitd,
		}
		r.Farm.Workers = append(r.Farm.Workers, w)
		r.Farm.RestartAgent(t, w)
	}
	r.Farm.WaitWorkers(t, "every worker is ready", func(list []farmtest.WorkerStatus) bool {
		notReady := func(w farmtest.WorkerStatus) bool { return w.State != farmtest.Ready }
		return len(list) == workers && !slices.ContainsFunc(list, notReady)
	})

	var dockerfile strings.Builder
	for i := range 10 {
		target := fmt.Sprintf("service-%d", i)
		targets = append(targets, target)
		fmt.Fprintf(&dockerfile, "FROM scratch AS %s\nCOPY app /%s\n", target, target)
	}
	files := map[string]string{"Dockerfile": dockerfile.String(), "app": "app of " + t.Name()}
	for i := range checkouts {
		dir := filepath.Join(farmtest.Folder(t), fmt.Sprintf("checkout-%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, content := range files {
			farmtest.WriteFile(t, dir, name, content)
		}
		commit(t, dir)
		git(t, dir, "remote", "add", "origin", "https://git.example.com/acme/monorepo.git")
		checkouts[i] = dir
	}
	return r, targets, checkouts
}

// assignedTo builds a target, and returns which worker did, and why that one.
func (r rig) assignedTo(t *testing.T, dir, target string) (worker, why string) {
	t.Helper()
	r.Farm.WaitWorkers(t, "all workers are idle", idle)
	before := len(assignments.FindAllString(r.Farm.Coordinator.Output(), -1))
	r.Client.Build(t, "--platform", "linux/amd64", "--target", target, dir)
	all := assignments.FindAllStringSubmatch(r.Farm.Coordinator.Output(), -1)
	if len(all) != before+1 {
		t.Fatalf("building %s made %d assignments: %s", target, len(all)-before, all[before:])
	}
	return all[before][1], all[before][2]
}
