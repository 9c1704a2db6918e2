package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	bk "github.com/moby/buildkit/client"
	"github.com/moby/buildkit/util/progress/progressui"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/client"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// jobError is a job that has ended, and not well.
type jobError struct {
	id    string
	state archfarmv1.Job_State
	why   string
}

func (e jobError) Error() string {
	text := "job " + e.id + " " + shortState(e.state)
	if e.state == archfarmv1.Job_STATE_CANCELLED {
		text = "job " + e.id + " was cancelled"
	}
	if e.why != "" {
		text += ": " + e.why
	}
	return text
}

// jobOutcome is nil for a job that has succeeded, a jobError for others.
func jobOutcome(job *archfarmv1.Job) error {
	if job.GetState() == archfarmv1.Job_STATE_SUCCEEDED {
		return nil
	}
	return jobError{printable(job.GetId()), job.GetState(), printableLines(job.GetError())}
}

func newWatch() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "watch JOB",
		Short: "Show a job's progress until it has ended",
		Long: `Show a job as docker buildx shows a build, from its beginning until it has ended, also
through restarts of the coordinator. Interrupting this command does not end the job.

Exit codes: 0 the job has succeeded; 1 it has failed, or cannot be watched; 2 the
command line makes no sense; 3 --timeout has passed, and the job goes on; 4 the job
was cancelled.`,
		Example: `  archfarm watch 01a20ae6-d469-7d03-9fcf-659b63e32bea
  archfarm watch 01a20ae6-d469 --progress plain --timeout 30m
  archfarm watch 01a20ae6-d469 --progress quiet --output json | jq .digest`,
		Args:              oneArg("the job's id, as archfarm jobs shows it"),
		ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			mode, err := progressOf(cmd)
			if err != nil {
				return err
			}
			timeout, _ := cmd.Flags().GetDuration("timeout")
			return withFarm(cmd, "watching job "+args[0], func(ctx context.Context, farm *client.Client) error {
				job, err := farm.Get(ctx, args[0])
				if err != nil {
					return err
				}
				return watchJob(ctx, cmd, farm, job.GetId(), jobWatch{mode, timeout, output})
			})
		},
	}
	flags := cmd.Flags()
	flags.Duration("timeout", 0, "how long to watch at most (default: for ever)")
	progressFlag(flags)
	outputFlag(flags)
	farmFlags(flags)
	completeProgress(cmd)
	return cmd
}

func progressFlag(flags *pflag.FlagSet) {
	flags.String("progress", "auto", "how to show it: auto, plain, tty, rawjson or quiet")
}

func completeProgress(cmd *cobra.Command) {
	_ = cmd.RegisterFlagCompletionFunc("progress", cobra.FixedCompletions(progressModes, cobra.ShellCompDirectiveNoFileComp)) // fails only for flags that are none
}

var progressModes = []string{"auto", "plain", "tty", "rawjson", "quiet"}

func progressOf(cmd *cobra.Command) (progressui.DisplayMode, error) {
	name, _ := cmd.Flags().GetString("progress")
	for _, mode := range progressModes {
		if name == mode {
			return progressui.DisplayMode(mode), nil
		}
	}
	return "", usageError{fmt.Errorf("--progress %q: use auto, plain, tty, rawjson or quiet", name)}
}

// jobWatch is how a job is watched.
type jobWatch struct {
	mode    progressui.DisplayMode
	timeout time.Duration // 0: for ever
	output  string        // json: the job is printed when it has ended
}

// watchJob shows a job until it has ended; a jobError tells that it did not do well,
// a timeoutError that it goes on.
func watchJob(ctx context.Context, cmd *cobra.Command, farm *client.Client, id string, w jobWatch) error {
	whole := ctx
	if w.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, w.timeout, timeoutError{fmt.Errorf("job %s has not ended after %s, and goes on: see archfarm watch %s", id, w.timeout, id)})
		defer cancel()
	}
	if err := show(ctx, cmd, w.mode, id, farm); err != nil {
		if whole.Err() != nil {
			return fmt.Errorf("interrupted: job %s goes on; archfarm watch %s shows it, archfarm cancel %s ends it: %w", id, id, id, whole.Err())
		}
		return err
	}
	job, err := farm.Wait(ctx, id)
	if err != nil {
		return err
	}
	if w.output == "json" {
		if err := printJSON(cmd.OutOrStdout(), jobOf(job)); err != nil {
			return err
		}
	}
	return jobOutcome(job)
}

// show draws a job's events on standard error until there are no more.
func show(ctx context.Context, cmd *cobra.Command, mode progressui.DisplayMode, id string, farm *client.Client) error {
	updates, shown, err := display(context.WithoutCancel(ctx), cmd, mode) // what is known is still drawn when ctx has ended
	if err != nil {
		return err
	}
	board := newBoard(id)
	elsewhere := farm.Retrying
	farm.Retrying = func(err error) { // by Watch, in this goroutine; in the picture, which other words would spoil
		updates <- board.lost(printable(status.Convert(err).Message()), time.Now())
	}
	defer func() { farm.Retrying = elsewhere }()
	var failed error
	for event, err := range farm.Watch(ctx, id, 0) {
		if err != nil {
			failed = err
			break
		}
		updates <- board.take(event)
	}
	close(updates)
	return errors.Join(failed, <-shown)
}

// display draws what it is sent on standard error, until the updates are closed; then
// it sends what has become of the drawing.
func display(ctx context.Context, cmd *cobra.Command, mode progressui.DisplayMode) (chan *bk.SolveStatus, <-chan error, error) {
	d, err := progressui.NewDisplay(cmd.ErrOrStderr(), mode)
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("--progress %s: %w", mode, err)}
	}
	updates, shown := make(chan *bk.SolveStatus), make(chan error, 1)
	go func() { // ends once updates is closed
		_, err := d.UpdateFrom(ctx, updates)
		for range updates { // a display that has failed holds up nobody
		}
		shown <- err
	}()
	return updates, shown, nil
}
