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
	fmt.Fprintln(w, "case\trounds\tA\tmedian\tB\tmedian\tA/B\tof single rounds\tgoal\t\tfor reference")
	for _, o := range outcomes {
		least, greatest := o.spread()
		var others []string
		for i, side := range o.sides[2:] {
			others = append(others, fmt.Sprintf("%s %s", side, milliseconds(median(o.took[i+2]))))
		}
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%.3f\t%.2f..%.2f\t%.2f\t%s\t%s\n", o.name, o.rounds(), o.sides[0], milliseconds(median(o.took[0])),
			o.sides[1], milliseconds(median(o.took[1])), o.ratio(), least, greatest, o.goal, verdict(o.ratio() <= o.goal), strings.Join(others, ", "))
	}
	if err := w.Flush(); err != nil {
		t.Errorf("writing the table: %v", err)
	}
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%d ms", d.Milliseconds()) }

func verdict(ok bool) string {
	if ok {
		return "ok"
	}
	return "MISS"
}
