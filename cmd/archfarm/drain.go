package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// watchEvery is how often a farm is asked whether its workers have drained.
	watchEvery = time.Second
	// missedFor is how long a worker or the farm may be out of sight while its drain
	// is watched: longer than either takes to come back from a restart.
	missedFor = 30 * time.Second
)

// timeoutError is that what was waited for has not happened in time.
type timeoutError struct{ error }

func (e timeoutError) Unwrap() error { return e.error }

func newDrain() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drain NAME...",
		Short: "Let workers finish what runs, and give them nothing new",
		Long: `Drain workers: what runs there goes on to its end, and nothing new begins, for
whichever coordinator. They stay so, also through restarts of the agent, until
"archfarm uncordon".

With --wait the command ends when nothing runs there any more: with exit code 0, or
with 3 when --timeout has passed before; the workers go on draining then.`,
		Example: `  archfarm drain mac-2 --reason "a new disk"
  archfarm drain mac-1 mac-2 --wait --timeout 30m && ssh mac-1 sudo reboot`,
		Args:              someArgs("the workers' names, as archfarm workers shows them"),
		ValidArgsFunction: completeWorkers,
		RunE: func(cmd *cobra.Command, args []string) error {
			wait, _ := cmd.Flags().GetBool("wait")
			timeout, _ := cmd.Flags().GetDuration("timeout")
			if timeout < 0 || timeout > 0 && !wait {
				return usageError{fmt.Errorf("--timeout %s: it is how long --wait waits at most, 0 for ever", timeout)}
			}
			farm, err := dialFleet(cmd)
			if err != nil {
				return err
			}
			defer farm.conn.Close()
			running, err := farm.changeAll(cmd, args, archfarmv1.WorkerChange_ACTION_DRAIN)
			if !wait || len(running) == 0 {
				return err
			}
			watch := &drainWatch{list: farm.workers, out: cmd.OutOrStdout(), waiting: slices.Sorted(maps.Keys(running)), told: running, timeout: timeout}
			return errors.Join(err, watch.run(cmd.Context()))
		},
	}
	flags := cmd.Flags()
	flags.Bool("wait", false, "wait until nothing runs there any more")
	flags.Duration("timeout", 0, "how long to wait at most (default: for ever)")
	flags.String("reason", "", "why, for those who list the workers")
	farmFlags(flags)
	return cmd
}

func newCordon() *cobra.Command {
	return newChange(archfarmv1.WorkerChange_ACTION_CORDON, &cobra.Command{
		Use:   "cordon NAME...",
		Short: "Give workers nothing new",
		Long: `Cordon workers: what runs there goes on, and nothing new begins until
"archfarm uncordon".`,
		Example: `  archfarm cordon mac-2 --reason "looks slow today"`,
	})
}

func newUncordon() *cobra.Command {
	return newChange(archfarmv1.WorkerChange_ACTION_UNCORDON, &cobra.Command{
		Use:     "uncordon NAME...",
		Short:   "Have workers that were drained or cordoned take builds again",
		Example: `  archfarm uncordon mac-1 mac-2`,
	})
}

// newChange completes a command that changes workers.
func newChange(action archfarmv1.WorkerChange_Action, cmd *cobra.Command) *cobra.Command {
	cmd.Args = someArgs("the workers' names, as archfarm workers shows them")
	cmd.ValidArgsFunction = completeWorkers
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		farm, err := dialFleet(cmd)
		if err != nil {
			return err
		}
		defer farm.conn.Close()
		_, err = farm.changeAll(cmd, args, action)
		return err
	}
	if action != archfarmv1.WorkerChange_ACTION_UNCORDON {
		cmd.Flags().String("reason", "", "why, for those who list the workers")
	}
	farmFlags(cmd.Flags())
	return cmd
}

// someArgs wants at least one argument.
func someArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 || slices.Contains(args, "") {
			return usageError{fmt.Errorf("%q takes %s; see %q", cmd.CommandPath(), what, cmd.CommandPath()+" --help")}
		}
		return nil
	}
}

// changeAll gives the workers an order, each as if it were alone, and tells what has
// become of them. It returns what runs on those that took it.
func (f *fleetClient) changeAll(cmd *cobra.Command, names []string, action archfarmv1.WorkerChange_Action) (map[string]uint32, error) {
	reason, _ := cmd.Flags().GetString("reason") // none of uncordon
	changed := map[string]uint32{}
	var failed []error
	for _, name := range slices.Compact(slices.Sorted(slices.Values(names))) {
		answer, err := ask(cmd.Context(), f, cmd.Name()+" "+name, f.ChangeWorker, &archfarmv1.ChangeWorkerRequest{
			Name: name, Change: &archfarmv1.WorkerChange{Action: action, Reason: reason},
		})
		if err != nil {
			failed = append(failed, err)
			continue
		}
		w := answer.GetWorker()
		changed[name] = w.GetSlots().GetUsed()
		fmt.Fprintf(cmd.OutOrStdout(), "%s: %s, %s\n", name, shortState(w.GetState()), running(w.GetSlots().GetUsed()))
	}
	return changed, errors.Join(failed...)
}

func running(n uint32) string {
	switch n {
	case 0:
		return "nothing runs there"
	case 1:
		return "1 attempt still runs"
	}
	return fmt.Sprintf("%d attempts still run", n)
}

// drainWatch follows workers until nothing runs on them.
type drainWatch struct {
	list    func(context.Context) ([]*archfarmv1.Worker, error)
	out     io.Writer
	waiting []string          // by name
	told    map[string]uint32 // what runs on each, as last printed
	timeout time.Duration

	seen map[string]time.Time // when each was last listed
}

// run returns nil once every worker has drained; a timeoutError when that takes too
// long; and another error when a worker takes builds again, or has left.
func (d *drainWatch) run(ctx context.Context) error {
	d.seen = map[string]time.Time{}
	for _, name := range d.waiting {
		d.seen[name] = time.Now()
	}
	if d.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, d.timeout, timeoutError{fmt.Errorf("after %s", d.timeout)})
		defer cancel()
	}
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	answered, failed := time.Now(), []error(nil)
	for {
		workers, err := d.list(ctx)
		switch {
		case ctx.Err() != nil:
		case err == nil:
			answered = time.Now()
			if failed = append(failed, d.look(workers)...); len(d.waiting) == 0 {
				return errors.Join(failed...)
			}
		case !passing(err) || time.Since(answered) > missedFor:
			return errors.Join(append(failed, err)...)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return errors.Join(append(failed, fmt.Errorf("%w: %s; draining goes on", context.Cause(ctx), d.rest()))...)
		}
	}
}

// passing tells whether the farm may answer the next time: it may be restarting, and it
// may have noticed the end of the waiting before it is noticed here.
func passing(err error) bool {
	code := status.Code(err)
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}

// look takes those that have drained, or will not, off the list.
func (d *drainWatch) look(workers []*archfarmv1.Worker) (failed []error) {
	listed := map[string]*archfarmv1.Worker{}
	for _, w := range workers {
		listed[w.GetName()] = w
	}
	d.waiting = slices.DeleteFunc(d.waiting, func(name string) bool {
		w, attached := listed[name]
		used, known := d.told[name]
		switch {
		case !attached && time.Since(d.seen[name]) <= missedFor: // between two coordinators, or after one's restart
			return false
		case !attached && known && used == 0:
			fmt.Fprintf(d.out, "%s: drained, and has left the farm\n", name)
			return true
		case !attached:
			failed = append(failed, fmt.Errorf("worker %s has left the farm while it was draining; what ran there may have failed", name))
			return true
		}
		d.seen[name] = time.Now()
		now := w.GetSlots().GetUsed()
		if s := w.GetState(); s == archfarmv1.Worker_STATE_READY {
			failed = append(failed, fmt.Errorf("worker %s is draining no more: somebody has uncordoned it", name))
			return true
		}
		if now == 0 {
			fmt.Fprintf(d.out, "%s: drained\n", name)
			return true
		}
		if !known || used != now {
			fmt.Fprintf(d.out, "%s: %s\n", name, running(now))
			d.told[name] = now
		}
		return false
	})
	return failed
}

// rest tells what is still waited for.
func (d *drainWatch) rest() string {
	var out []string
	for _, name := range d.waiting {
		if used, known := d.told[name]; known {
			name += " (" + running(used) + ")"
		}
		out = append(out, name)
	}
	return strings.Join(out, ", ")
}
