// Command jobs submits many jobs to one coordinator, whose workers are stubs: real agents before a BuildKit that builds
// nothing. It checks that nothing of them is lost, done twice or told with a gap, and measures what that takes. Images are
// published to a real registry. Run it with make loadtest-jobs, as root.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
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
	ctx, cancel := context.WithTimeoutCause(ctx, o.Limit, fmt.Errorf("it took longer than %s", o.Limit))
	p := &farmtest.Program{Title: "jobs", Log: os.Stderr}
	ok := p.Run(func() { measure(ctx, p, o, os.Stdout) })
	cancel()
	stop()
	if !ok {
		os.Exit(1)
	}
}

// options say what is done.
type options struct {
	Jobs, Clients  int
	Workers, Slots int
	Platforms      int  // of each job, 1 or 2
	Publish        bool // to a registry
	Watched        int  // jobs that are watched from their first event on
	Kill           bool // the coordinator, once a third of the legs is at work
	History        bool // the builds' records are kept
	Limit          time.Duration
}

// parse reads the command line.
func parse(args []string) (options, error) {
	var o options
	var short bool
	flags := flag.NewFlagSet("jobs", flag.ContinueOnError)
	flags.IntVar(&o.Jobs, "jobs", 10_000, "number of jobs")
	flags.IntVar(&o.Clients, "clients", 64, "clients that submit them, each one at a time")
	flags.IntVar(&o.Workers, "workers", 4, "number of workers")
	flags.IntVar(&o.Slots, "slots", 16, "slots of each")
	flags.IntVar(&o.Platforms, "platforms", 2, "platforms of each job, 1 or 2")
	flags.BoolVar(&o.Publish, "publish", true, "publish each job's image, by a tag of its own")
	flags.IntVar(&o.Watched, "watched", 200, "jobs that are watched")
	flags.BoolVar(&o.Kill, "kill", false, "kill the coordinator on the way, and start it again")
	flags.BoolVar(&o.History, "history", true, "keep records of the builds, as coordinators do unless told otherwise")
	flags.DurationVar(&o.Limit, "limit", 15*time.Minute, "give up after this time")
	flags.BoolVar(&short, "short", false, "few jobs, to see that it runs; the other flags are ignored")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 || o.Jobs < 1 || o.Clients < 1 || o.Workers < 1 || o.Slots < 1 || o.Platforms < 1 || o.Platforms > 2 || o.Watched < 0 || o.Limit <= 0 {
		err := fmt.Errorf("jobs takes no arguments, and flags greater than 0; see jobs -help")
		fmt.Fprintln(flags.Output(), err)
		return o, err
	}
	if short {
		o = shortly()
	}
	return o, nil
}

// shortly is enough to see that everything works.
func shortly() options {
	return options{Jobs: 60, Clients: 8, Workers: 2, Slots: 4, Platforms: 2, Publish: true, Watched: 20, Kill: true, History: true, Limit: 2 * time.Minute}
}
