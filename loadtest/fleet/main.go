// Command fleet measures what one coordinator makes of a large fleet: many agents, the real ones with TLS, certificates,
// heartbeats and back-off, join it all at once, idle, and come back after it was killed. They live in this process, before
// one BuildKit that does nothing. Run it with make loadtest-fleet, as root.
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
	p := &farmtest.Program{Title: "fleet", Log: os.Stderr}
	reached := false
	ok := p.Run(func() { reached = measure(ctx, p, o, os.Stdout) })
	stop()
	if !ok || !reached {
		os.Exit(1)
	}
}

// options say what is measured.
type options struct {
	Workers int
	Down    time.Duration // from the coordinator's end to its next start
	Idle    time.Duration // how long its CPU use is measured
	Limit   time.Duration // for the fleet to be complete
	Goals   goals
}

// goals are what has to be reached, whatever the number of workers.
type goals struct {
	Join   time.Duration // all start at once: until all are listed as ready
	Return time.Duration // the coordinator is killed: until all are listed again, its absence included
	Memory int64         // the coordinator's, in bytes
}

var usual = goals{Join: time.Minute, Return: 30 * time.Second, Memory: 500 << 20}

// maxWorkers is what one address can dial from, by its ports.
const maxWorkers = 10_000

// parse reads the command line.
func parse(args []string) (options, error) {
	o := options{Goals: usual}
	var short bool
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	flags.IntVar(&o.Workers, "workers", 1000, "number of workers")
	flags.DurationVar(&o.Down, "down", 2*time.Second, "how long the coordinator is away after it was killed")
	flags.DurationVar(&o.Idle, "idle", 15*time.Second, "how long the coordinator's use of the CPU is measured while nothing is built")
	flags.DurationVar(&o.Limit, "limit", 3*time.Minute, "give up when the fleet is not complete within this time")
	flags.BoolVar(&short, "short", false, "few workers and short times, to see that it runs; the other flags are ignored")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 || o.Workers < 1 || o.Workers > maxWorkers || o.Down < 0 || o.Idle <= 0 || o.Limit <= 0 {
		err := fmt.Errorf("fleet takes no arguments, times greater than 0 and 1 to %d workers; see fleet -help", maxWorkers)
		fmt.Fprintln(flags.Output(), err)
		return o, err
	}
	if short {
		o = shortly()
	}
	return o, nil
}

// shortly is enough to see that everything works, and too little to conclude anything from.
func shortly() options {
	return options{Workers: 20, Down: time.Second, Idle: time.Second, Limit: time.Minute, Goals: usual}
}
