package main

import (
	"runtime"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

// The builders that compete. Their buildkitds are the same.
const (
	theFarm  = "farm"          // one endpoint, which splits
	twoNodes = "two nodes"     // buildx splits
	oneNode  = "one buildkitd" // nothing is split
	// The same behind a link; see rig.behind.
	linkedFarm, linkedNodes = "linked farm", "linked nodes"
)

// names are the builders' names at buildx; farmtest has created the farm's.
var names = map[string]string{theFarm: "farm", twoNodes: "nodes", oneNode: "one", linkedFarm: "linked-farm", linkedNodes: "linked-nodes"}

// slots let everything run at once, as buildkitds do.
const slots = 32

// rig is what every contest runs on.
type rig struct {
	tools    farmtest.Tools
	farm     *farmtest.Farm
	registry string // its host
	native   string // the platform of this machine
	foreign  string // the one that the second worker is told to be
	both     string
}

// platforms are this machine's, and another.
func platforms() (native, foreign string) {
	native, foreign = "linux/"+runtime.GOARCH, "linux/arm64"
	if native == foreign {
		foreign = "linux/amd64"
	}
	return native, foreign
}

// newRig starts a farm of two workers with enough slots, and creates builders that use their buildkitds without the farm.
func newRig(t farmtest.T) *rig {
	tools := farmtest.FindFarmTools(t)
	tools.Docker = "" // buildx by itself: the docker command's own time would be in both terms of each ratio
	native, foreign := platforms()
	r := &rig{tools: tools, native: native, foreign: foreign, both: native + "," + foreign}
	r.registry = load.StartRegistry(t, tools)
	r.farm = farmtest.StartFarm(t, tools, farmtest.FarmOptions{CoordinatorArgs: []string{"--pprof"}, Workers: []farmtest.WorkerSpec{
		{Name: "native", Platforms: []string{native}, Slots: slots},
		{Name: "told", Platforms: []string{foreign}, Slots: slots}, // its Dockerfiles must not execute anything
	}})
	first, second := r.farm.Workers[0].Buildkitd.Addr, r.farm.Workers[1].Buildkitd.Addr
	r.buildx(t, "create", "--name", names[oneNode], "--driver", "remote", first)
	r.nodes(t, twoNodes, first, second)
	t.Logf("the coordinator's profiles are at %s/debug/pprof/", r.farm.HTTP)
	return r
}

// nodes creates a builder of two nodes.
func (r *rig) nodes(t farmtest.T, builder, first, second string) {
	t.Helper()
	r.buildx(t, "create", "--name", names[builder], "--driver", "remote", "--platform", r.native, first)
	r.buildx(t, "create", "--name", names[builder], "--append", "--driver", "remote", "--platform", r.foreign, second)
}

// behind creates the builders that are reached by a link from the client: the farm, and the two nodes, which share it.
func (r *rig) behind(t farmtest.T, link *load.Link) {
	t.Helper()
	r.buildx(t, "create", "--name", names[linkedFarm], "--driver", "remote", link.To(t, r.farm.Addr))
	r.nodes(t, linkedNodes, link.To(t, r.farm.Workers[0].Buildkitd.Addr), link.To(t, r.farm.Workers[1].Buildkitd.Addr))
}

// buildx runs one buildx command, which must succeed, and returns how it went; it took its wall-clock time from start to
// exit.
func (r *rig) buildx(t farmtest.T, args ...string) (result farmtest.Result) {
	t.Helper()
	farmtest.Within(t, func(t farmtest.T) {
		start := time.Now()
		result = r.farm.Client.Run(t, args...)
		result.Took = time.Since(start)
		if result.Code != 0 {
			t.Fatalf("buildx %s: exit code %d:\n%s\n%s", strings.Join(args, " "), result.Code, result.Output, r.farm.Logs())
		}
	})
	return result
}

// run runs one build at a builder.
func (r *rig) run(t farmtest.T, builder, platforms, context string, args ...string) farmtest.Result {
	t.Helper()
	all := append([]string{"build", "--builder", names[builder], "--progress=plain", "--platform", platforms}, args...)
	return r.buildx(t, append(all, context)...)
}

// build is run for its wall-clock time.
func (r *rig) build(t farmtest.T, builder, platforms, context string, args ...string) time.Duration {
	t.Helper()
	return r.run(t, builder, platforms, context, args...).Took
}

// forget makes the buildkitds forget everything that they have built.
func (r *rig) forget(t farmtest.T) {
	t.Helper()
	for _, w := range r.farm.Workers {
		for _, command := range [][]string{{"prune-histories"}, {"prune", "--all"}} { // histories keep layers alive
			farmtest.Within(t, func(t farmtest.T) {
				if result := farmtest.Buildctl(t, r.tools, w.Buildkitd.Addr, command...); result.Code != 0 {
					t.Fatalf("buildctl %s at worker %s: exit code %d:\n%s", strings.Join(command, " "), w.Name, result.Code, result.Output)
				}
			})
		}
	}
}

// repository names a repository: a side's own, lest one side finds in the registry what another has pushed.
func repository(registry, contest, builder string) string {
	clean := strings.NewReplacer(" ", "-", ",", "", "(", "", ")", "")
	return registry + "/" + clean.Replace(strings.ToLower(contest)) + "/" + clean.Replace(builder)
}
