package main

import (
	"fmt"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
)

const (
	// uplink is 100 Mbit/s, in bytes a second: a client at home or in another region. Then the farm, which is sent each
	// file once, should take little more than half of what two nodes take.
	uplink, goalNarrow = 100_000_000 / 8, 0.55
	// smallFile and largeFile are sizes in bytes, of files in contexts of many.
	smallFile, largeFile = 512, 1_000_000
)

// narrow is the large context from behind a narrow line.
func narrow(t farmtest.T, o options) []contest {
	r, s := newRig(t), newSource(t, o.Size)
	r.behind(t, load.NewLink(uplink))
	return []contest{{
		name:  fmt.Sprintf("%d MB context, two platforms, uplink of 100 Mbit/s", o.Size/1_000_000),
		sides: []string{linkedFarm, linkedNodes}, rounds: o.Turns, goal: goalNarrow,
		prepare: func(t farmtest.T) {
			r.forget(t)
			s.change(t)
		},
		build: func(t farmtest.T, builder string) time.Duration { return r.build(t, builder, r.both, s.dir) },
	}}
}

// files is a context of many small files that nobody has seen before.
func files(t farmtest.T, o options) []contest {
	r, s := newRig(t), newTree(t, o.Files, smallFile)
	return []contest{{
		name:  fmt.Sprintf("%d small files, two platforms", o.Files),
		sides: []string{theFarm, twoNodes}, rounds: o.Turns, goal: goalTwo,
		prepare: func(t farmtest.T) {
			r.forget(t)
			s.touch(t)
		},
		build: func(t farmtest.T, builder string) time.Duration { return r.build(t, builder, r.both, s.dir) },
	}}
}

// rebuilds are of a large context of which one file has changed.
func rebuilds(t farmtest.T, o options) []contest {
	r, s := newRig(t), newTree(t, int(o.Size/largeFile), largeFile)
	r.build(t, twoNodes, r.both, s.dir) // the buildkitds are everybody's, and what they know
	return []contest{{
		name:  fmt.Sprintf("rebuild, one of %d files of 1 MB changed, two platforms", s.files),
		sides: []string{theFarm, twoNodes}, rounds: 2 * o.Turns, goal: goalTwo, // they are short
		prepare: func(t farmtest.T) { s.renew(t, 1) },
		build:   func(t farmtest.T, builder string) time.Duration { return r.build(t, builder, r.both, s.dir) },
	}}
}
