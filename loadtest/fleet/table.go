package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// write writes the results, a line each, and reports whether every goal was reached.
func (r results) write(t farmtest.T, out io.Writer, o options) (reached bool) {
	reached = true
	verdict := func(ok bool) string {
		if ok {
			return "ok"
		}
		reached = false
		return "MISS"
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "what\tmeasured\tgoal\t")
	fmt.Fprintf(w, "all join at once, until all are ready\t%s\t< %s\t%s\n", seconds(r.join), seconds(o.Goals.Join), verdict(r.join < o.Goals.Join))
	fmt.Fprintf(w, "coordinator killed, started %s later, until all are back\t%s\t< %s\t%s\n", seconds(o.Down), seconds(r.back), seconds(o.Goals.Return), verdict(r.back < o.Goals.Return))
	fmt.Fprintf(w, "coordinator's peak resident memory\t%.0f MiB\t< %d MiB\t%s\n", float64(r.memory)/(1<<20), o.Goals.Memory>>20, verdict(r.memory < o.Goals.Memory))
	fmt.Fprintf(w, "CPU time while they join\tcoordinator %s, agents %s\t\t\n", seconds(r.joining.coordinator), seconds(r.joining.agents))
	fmt.Fprintf(w, "coordinator's CPU use while idle\t%.1f %% of one CPU\t\t\n", r.idle.percent(r.idle.coordinator))
	fmt.Fprintf(w, "an idle agent's, BuildKit's answers included\t%.2f %% of one CPU\t\t\n", r.idle.percent(r.idle.agents)/float64(o.Workers))
	fmt.Fprintf(w, "tries that came to nothing, after the kill\t%.1f per worker, at most %d within 0.1 s\t\t\n",
		float64(len(r.refused))/float64(o.Workers), busiest(r.refused, 100*time.Millisecond))
	fmt.Fprintf(w, "connections made to the new coordinator\t%.1f per worker, at most %d within 1 s\t\t\n",
		float64(len(r.arrivals))/float64(o.Workers), busiest(r.arrivals, time.Second))
	if err := w.Flush(); err != nil {
		t.Errorf("writing the table: %v", err)
	}
	fmt.Fprintf(out, "tries that came to nothing, by time after the kill:\n%sconnections, by time after the new start:\n%s", histogram(r.refused), histogram(r.arrivals))
	return reached
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
