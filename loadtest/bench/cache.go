package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// cachedDockerfile has steps in a stage whose cache mode=max alone keeps, and after it. What they make is random, so that
// nothing else can have it. Each names its architecture, but for the first two, which both platforms have in common.
var cachedDockerfile = `FROM scratch AS base
COPY busybox /bin/busybox
FROM base AS build
ARG TARGETARCH
COPY src /src
` + farmtest.Run("/bin/busybox head -c 8000000 /dev/urandom > /made && echo $TARGETARCH >> /made") + `
FROM base
ARG TARGETARCH
COPY --from=build /made /made-$TARGETARCH
` + farmtest.Run("/bin/busybox head -c 1000000 /dev/urandom > /after-$TARGETARCH") + `
`

// caches are builds on a fleet that has forgotten everything, with the cache that the same side has left in a registry
// before.
func caches(t farmtest.T, o options) []contest {
	r := newRig(t)
	dir := farmtest.Context(t, r.tools, map[string]string{"Dockerfile": cachedDockerfile, "src": "source"})
	run := func(t farmtest.T, builder, cacheFlag, attrs string) farmtest.Result {
		repo := repository(r.registry, "cache", builder)
		return r.run(t, builder, r.both, dir, "--push", "--tag", repo+":latest", "--provenance=false", cacheFlag, attrs+",ref="+repo+":cache")
	}
	sides := []string{theFarm, twoNodes}
	for _, side := range sides {
		r.forget(t)
		run(t, side, "--cache-to", "type=registry,mode=max")
	}
	found := map[string]hits{}
	return []contest{{
		name: "registry cache, cold fleet, two platforms, pushed", sides: sides, rounds: 2 * o.Turns, goal: goalTwo, // they are short
		prepare: r.forget,
		build: func(t farmtest.T, builder string) time.Duration {
			result := run(t, builder, "--cache-from", "type=registry")
			found[builder] = countHits(result.Output)
			return result.Took
		},
		note: func() string {
			return fmt.Sprintf("steps cached: %s %s (goal: all %s); %s %s", theFarm, found[theFarm], verdict(found[theFarm].complete()), twoNodes, found[twoNodes])
		},
	}}
}

// hits are how many steps came from a cache, and of how many, by architecture.
type hits map[string]struct{ cached, steps int }

var (
	// step is how buildx shows a step that a cache may have: #5 [linux/amd64 build 2/3] COPY src /src.
	step = regexp.MustCompile(`(?m)^#(\d+) (\[[^\]\n]*\] (?:RUN|COPY) .*)$`)
	// architecture is where a step has its own: with several nodes, that is not always between the brackets.
	architecture = regexp.MustCompile(`\b(?:amd64|arm64)\b`)
)

// countHits reads the plain progress of a build. What is fetched from a cache at once is not said to be cached, but it is.
func countHits(output string) hits {
	found := hits{}
	seen := map[string]bool{}
	for _, m := range step.FindAllStringSubmatch(output, -1) {
		number, of := m[1], architecture.FindString(m[2])
		if seen[number] {
			continue // it is shown again when others came between
		}
		seen[number] = true
		h := found[of]
		h.steps++
		if strings.Contains(output, "\n#"+number+" CACHED\n") || strings.Contains(output, "\n#"+number+" extracting sha256:") {
			h.cached++
		}
		found[of] = h
	}
	return found
}

// complete tells whether every step of both platforms was cached.
func (h hits) complete() bool {
	for _, of := range h {
		if of.cached < of.steps {
			return false
		}
	}
	return len(h) == 2
}

func (h hits) String() string {
	var all []string
	for _, of := range slices.Sorted(maps.Keys(h)) {
		all = append(all, fmt.Sprintf("%d of %d %s", h[of].cached, h[of].steps, of))
	}
	if len(all) == 0 {
		return "none"
	}
	return strings.Join(all, ", ")
}
