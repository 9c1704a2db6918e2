package main

import (
	"fmt"
	"regexp"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

const (
	// goalFailover is how much longer than an undisturbed build one may take whose worker is killed at half time: half
	// the step is done again, and what the lost worker knew is sent again.
	goalFailover        = 1.8
	killed, undisturbed = "killed at half time", "undisturbed"
)

// failovers are builds of two platforms with a step that takes a while, each on a farm of its own, with two workers for
// the platform that loses one.
func failovers(t farmtest.T, o options) []contest {
	tools := farmtest.FindFarmTools(t)
	tools.Docker = ""
	native, foreign := platforms()
	registry := load.StartRegistry(t, tools)
	dir := farmtest.Context(t, tools, map[string]string{
		"Dockerfile": "FROM scratch\nCOPY busybox /bin/busybox\n" + farmtest.Run(fmt.Sprintf("/bin/busybox sleep %g", o.Step.Seconds())) + "\n",
	})
	runs := farmtest.Contains(" 2/2] RUN") // of either platform: buildx shows one running step at a time
	place := regexp.MustCompile(`\[` + regexp.QuoteMeta(native) + `\] assigned to worker (\S+)`)
	build := func(t farmtest.T, side string) (took time.Duration) {
		farmtest.Within(t, func(t farmtest.T) {
			farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: []farmtest.WorkerSpec{
				{Name: "first", Platforms: []string{native}, Slots: 1}, {Name: "second", Platforms: []string{native}, Slots: 1},
				{Name: "told", Platforms: []string{foreign}, Slots: 1},
			}})
			start := time.Now()
			b := farm.Client.StartBuild(t, "--platform", native+","+foreign, "--push", "--tag", registry+"/failover:latest", dir)
			if side == killed {
				b.WaitOutput(t, o.Limit, "the step runs", runs)
				time.Sleep(o.Step / 2)
				lost := place.FindStringSubmatch(b.Output())
				for _, w := range farm.Workers {
					if lost != nil && w.Name == lost[1] {
						w.Buildkitd.Kill()
						w.Agent.Kill()
					}
				}
			}
			if code := b.Wait(t, o.Limit); code != 0 {
				t.Fatalf("%s: exit code %d:\n%s", side, code, b.Output())
			}
			took = time.Since(start)
			if lost := regexp.MustCompile(`worker \S+ was lost; continuing on`).MatchString(b.Output()); lost != (side == killed) {
				t.Fatalf("%s: a worker was lost: %v:\n%s", side, lost, b.Output())
			}
		})
		return took
	}
	return []contest{{
		name:  fmt.Sprintf("a worker lost during a step of %s, two platforms", o.Step),
		sides: []string{killed, undisturbed}, rounds: o.Turns, goal: goalFailover, build: build,
	}}
}
