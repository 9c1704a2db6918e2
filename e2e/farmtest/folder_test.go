package farmtest_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// TestFolder_NothingOfAKilledBuildkitdIsLeft checks the harness: a step whose buildkitd is killed would run on, and its
// mounts would keep the folder.
func TestFolder_NothingOfAKilledBuildkitdIsLeft(t *testing.T) {
	t.Parallel()
	tools := farmtest.FindTools(t)
	gate := farmtest.NewGate(t)
	var socket string
	t.Run("killed", func(t *testing.T) {
		daemon := farmtest.StartBuildkitd(t, tools, "a test")
		socket = strings.TrimPrefix(daemon.Addr, "unix://")
		client := farmtest.NewClient(t, tools, daemon.Addr)
		dir := farmtest.Context(t, tools, map[string]string{
			"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + gate.Run() + "\n",
		})
		build := client.StartBuild(t, dir)
		gate.WaitArrival(t, build, time.Minute)
		daemon.Kill()
		if code := build.Wait(t, time.Minute); code == 0 {
			t.Errorf("the build succeeded without its buildkitd:\n%s", build.Output())
		}
	})
	gate.WaitKilled(t, 10*time.Second)
	if _, err := os.Stat(filepath.Dir(socket)); !os.IsNotExist(err) {
		t.Errorf("the folder of the killed buildkitd is still there: %v", err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), filepath.Dir(socket)) {
		t.Errorf("mounts are left:\n%s", mounts)
	}
}
