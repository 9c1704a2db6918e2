// Command bench measures a farm beside buildx on its own: both build at the same two buildkitds, in turns, in one run.
// What counts is the ratio; milliseconds are those of the machine that it ran on. It also measures what a lost worker, the
// relaying itself and emulation cost, each beside the same without; and jobs: submissions,
// events, lists and a restart, beside what they are made of. Run it with make bench, as root.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

func main() {
	o, err := parse(os.Args[1:])
	if err != nil {
		os.Exit(2) // the flag package has said why
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	p := &farmtest.Program{Title: "bench", Log: os.Stderr}
	ok := p.Run(func() { bench(ctx, p, o, os.Stdout) })
	stop()
	if !ok {
		os.Exit(1)
	}
}

// options say how much is measured.
type options struct {
	Rounds       int           // of the builds with the large context
	CachedRounds int           // of the cached builds, which are short
	Size         int64         // of the large context, in bytes
	ImageRounds  int           // of the exports of the large image
	ImageSize    int64         // of that image, in bytes
	AtOnce       int           // builds that run at the same time
	Turns        int           // rounds of each of the other contests
	Files        int           // in the context of many small files
	Step         time.Duration // that is long enough to lose a worker
	Burn         int           // how often the work of the emulated step is done
	Limit        time.Duration // no round of a part begins after that
	// Only names the one part to measure; empty: all.
	Only     string
	Window   time.Duration // that jobs are submitted, or watched
	Watchers int           // of one job
	History  int           // ended jobs to list
	Queued   int           // jobs at a restart
}

// selects tells whether a part is to be measured.
func (o options) selects(part string) bool { return o.Only == "" || o.Only == part }

// parse reads the command line.
func parse(args []string) (options, error) {
	var o options
	var megabytes, image int64
	var short bool
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&o.Rounds, "rounds", 10, "rounds of builds with the large context")
	flags.IntVar(&o.CachedRounds, "cached-rounds", 30, "rounds of cached builds")
	flags.Int64Var(&megabytes, "megabytes", 200, "size of the large context, in units of 1000000 bytes")
	flags.IntVar(&o.ImageRounds, "image-rounds", 3, "rounds of exports of the large image")
	flags.Int64Var(&image, "image-megabytes", 2000, "size of the large image, half of it for each platform")
	flags.IntVar(&o.AtOnce, "at-once", 20, "builds that run at the same time, for the coordinator's memory")
	flags.IntVar(&o.Turns, "turns", 3, "rounds of each contest of the other parts that measure builds")
	flags.IntVar(&o.Files, "files", 20_000, "small files of a context")
	flags.DurationVar(&o.Step, "step", 6*time.Second, "how long a step takes whose worker is killed at half time")
	flags.IntVar(&o.Burn, "burn", 4, "how often the work of the emulated step is done, at some 200 ms")
	flags.DurationVar(&o.Limit, "limit", 7*time.Minute, "begin no round of a part after this time: what is measured by then is shown")
	flags.StringVar(&o.Only, "only", "", "measure only this: "+strings.Join(parts(), ", "))
	flags.DurationVar(&o.Window, "seconds", 10*time.Second, "how long jobs are submitted, and watched")
	flags.IntVar(&o.Watchers, "watchers", 1000, "watchers of one job")
	flags.IntVar(&o.History, "history", 1_000_000, "ended jobs to list pages of")
	flags.IntVar(&o.Queued, "queued", 10_000, "queued jobs to start with")
	flags.BoolVar(&short, "short", false, "one round of everything and 5 megabytes, to see that it runs; of the other flags, only -only counts")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	least := min(o.Rounds, o.CachedRounds, o.ImageRounds, o.AtOnce, o.Turns, o.Files, o.Burn, o.Watchers, o.Queued)
	if flags.NArg() > 0 || least < 1 || megabytes < 1 || image < 2 || o.Limit <= 0 || o.Step < time.Second ||
		o.Only != "" && !slices.Contains(parts(), o.Only) || o.Window < time.Second || o.History <= fewJobs {
		err := fmt.Errorf("bench takes no arguments, flags greater than 0, a history of more than %d jobs, and one of its parts; see bench -help", fewJobs)
		fmt.Fprintln(flags.Output(), err)
		return o, err
	}
	o.Size, o.ImageSize = megabytes*1_000_000, image*1_000_000
	if short {
		only := o.Only
		o = shortly()
		o.Only = only
	}
	return o, nil
}

// shortly is enough to see that everything works, and too little to conclude anything from.
func shortly() options {
	return options{Rounds: 1, CachedRounds: 1, Size: 5_000_000, ImageRounds: 1, ImageSize: 10_000_000, AtOnce: 3, Limit: 5 * time.Minute,
		Turns: 1, Files: 500, Step: 2 * time.Second, Burn: 1,
		Window: time.Second, Watchers: 20, History: 20_000, Queued: 200}
}
