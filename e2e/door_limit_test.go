package e2e_test

import (
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

func TestDoor_MoreBuildsThanTheLimitAreRefused(t *testing.T) {
	t.Parallel()
	r := newFarm(t, farmtest.FarmOptions{
		Workers:         []farmtest.WorkerSpec{{Name: "amd-1", Slots: 4}},
		CoordinatorArgs: []string{"--max-builds", "1"},
	})
	build, gate := r.atGate(t, "v1", "linux/amd64")
	refused := r.Client.TryBuild(t, "--platform", "linux/amd64", r.legsContext(t))
	wantFailure(t, refused, "1 are running or waiting, as many as this coordinator takes; try again later")
	if refused.Took > goneLimit {
		t.Errorf("refused after %v", refused.Took)
	}
	gate.Open()
	if code := build.Wait(t, startLimit); code != 0 {
		t.Errorf("the first build: exit code %d:\n%s", code, build.Output())
	}
	r.buildsAMD64(t, "after")
}
