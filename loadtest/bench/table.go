package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// table writes what the contests gave, a line each.
func table(t farmtest.T, out io.Writer, outcomes []outcome) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "case\trounds\tA\tmedian\tB\tmedian\tA/B\tof single rounds\tgoal\tfor reference")
	for _, o := range outcomes {
		if o.rounds() == 0 {
			fmt.Fprintf(w, "%s\t0\t%s\t-\t%s\t-\t-\t-\t%s\t%s\n", o.name, o.sides[0], o.sides[1], o.against(), o.others())
			continue
		}
		least, greatest := o.spread()
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%.3f\t%.2f..%.2f\t%s\t%s\n", o.name, o.rounds(),
			o.sides[0], milliseconds(o.took[0]), o.sides[1], milliseconds(o.took[1]), o.ratio(), least, greatest, o.against(), o.others())
	}
	if err := w.Flush(); err != nil {
		t.Errorf("writing the table: %v", err)
	}
}

// against tells whether the goal was reached.
func (o outcome) against() string {
	if o.goal == 0 || o.rounds() == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f %s", o.goal, verdict(o.ratio() <= o.goal))
}

// others are the medians of the sides that are not compared, and what else is to be said.
func (o outcome) others() string {
	var all []string
	for i, side := range o.sides[2:] {
		all = append(all, side+" "+milliseconds(o.took[i+2]))
	}
	if o.note != nil {
		all = append(all, o.note())
	}
	return strings.Join(all, ", ")
}

func milliseconds(took []time.Duration) string {
	return fmt.Sprintf("%d ms", median(took).Milliseconds())
}

func verdict(ok bool) string {
	if ok {
		return "ok"
	}
	return "MISS"
}
