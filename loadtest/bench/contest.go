package main

import (
	"context"
	"slices"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// contest lets builders do the same thing in turns.
type contest struct {
	name string
	// sides are builders: the first is compared with the second; what others take is shown too.
	sides  []string
	rounds int
	goal   float64       // the ratio that the first should not exceed; 0 for none
	note   func() string // what else is to be said once it was held, if set
	// prepare, if set, is called before each build and is not measured.
	prepare func(t farmtest.T)
	// build returns how long one build at a builder took; or whatever else is measured in seconds, and better when less.
	build func(t farmtest.T, builder string) time.Duration
}

// outcome is what a contest measured: by side, by round.
type outcome struct {
	contest
	took [][]time.Duration
}

// run holds the contest. Each round begins with another side, so that none profits from its place. No round begins
// once late reports true, but the first.
func (c contest) run(ctx context.Context, t farmtest.T, late func() bool) outcome {
	t.Helper()
	out := outcome{contest: c, took: make([][]time.Duration, len(c.sides))}
	for round := range c.rounds {
		if round > 0 && late() {
			t.Logf("%s: out of time after %d of %d rounds", c.name, round, c.rounds)
			break
		}
		for i := range c.sides {
			if ctx.Err() != nil {
				t.Fatalf("interrupted")
			}
			side := (round + i) % len(c.sides)
			if c.prepare != nil {
				c.prepare(t)
			}
			out.took[side] = append(out.took[side], c.build(t, c.sides[side]))
		}
	}
	return out
}

// absent is a contest that cannot be held here.
func absent(name, why string, sides ...string) contest {
	return contest{name: name, sides: sides, note: func() string { return why }}
}

// rounds is how many were held.
func (o outcome) rounds() int { return len(o.took[0]) }

// ratio is that of the first two sides' medians.
func (o outcome) ratio() float64 {
	return float64(median(o.took[0])) / float64(median(o.took[1]))
}

// spread is the least and the greatest ratio that a single round gave.
func (o outcome) spread() (least, greatest float64) {
	ratios := make([]float64, o.rounds())
	for i := range ratios {
		ratios[i] = float64(o.took[0][i]) / float64(o.took[1][i])
	}
	return slices.Min(ratios), slices.Max(ratios)
}

// median of at least one duration.
func median(of []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(of))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
