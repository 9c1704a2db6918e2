package main

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// moments are when something happened, many times.
type moments struct {
	mu  sync.Mutex
	all []time.Time
}

func (m *moments) add(at time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all = append(m.all, at)
}

// between returns how long after begin each of those was that were before end.
func (m *moments) between(begin, end time.Time) (after []time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, at := range m.all {
		if !at.Before(begin) && at.Before(end) {
			after = append(after, at.Sub(begin))
		}
	}
	return after
}

// perSecond counts by whole seconds, from the first to the last.
func perSecond(after []time.Duration) []int {
	if len(after) == 0 {
		return nil
	}
	counts := make([]int, slices.Max(after)/time.Second+1)
	for _, d := range after {
		counts[d/time.Second]++
	}
	return counts
}

// busiest is the most that fell within any span of that length.
func busiest(after []time.Duration, span time.Duration) (most int) {
	sorted := slices.Sorted(slices.Values(after))
	first := 0
	for i, d := range sorted {
		for d-sorted[first] >= span {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}

// histogram draws a line for each second.
func histogram(after []time.Duration) string {
	const width = 50
	counts := perSecond(after)
	if len(counts) == 0 {
		return "  none\n"
	}
	most := slices.Max(counts)
	var out strings.Builder
	for second, n := range counts {
		line := fmt.Sprintf("  %3d s %5d %s", second, n, strings.Repeat("#", (n*width+most-1)/most))
		out.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	return out.String()
}
