package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// figure is something that was measured of jobs, beside what it is compared with.
type figure struct {
	name string
	got  float64
	unit string // "/s": more is better; else less is
	goal float64
	// beside is what the peer is, peer what was measured of it; empty: there is none.
	beside string
	peer   float64
	note   string
}

// verdict tells whether the goal was reached.
func (f figure) verdict() string {
	switch {
	case f.goal == 0:
		return "-"
	case f.unit == "/s":
		return fmt.Sprintf("≥ %s %s", f.format(f.goal), verdict(f.got >= f.goal))
	}
	return fmt.Sprintf("< %s %s", f.format(f.goal), verdict(f.got < f.goal))
}

func (f figure) format(v float64) string {
	if v >= 100 || v == float64(int(v)) {
		return fmt.Sprintf("%.0f %s", v, f.unit)
	}
	return fmt.Sprintf("%.1f %s", v, f.unit)
}

// ratio is the figure by its peer's.
func (f figure) ratio() string {
	if f.beside == "" || f.peer == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", f.got/f.peer)
}

func (f figure) peers() string {
	if f.beside == "" {
		return "-"
	}
	return f.beside + " " + f.format(f.peer)
}

// showFigures writes a line for each.
func showFigures(t farmtest.T, out io.Writer, all []figure) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "jobs\tmeasured\tgoal\tbeside\tratio\tnote")
	for _, f := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", f.name, f.format(f.got), f.verdict(), f.peers(), f.ratio(), f.note)
	}
	if err := w.Flush(); err != nil {
		t.Errorf("writing the table: %v", err)
	}
}
