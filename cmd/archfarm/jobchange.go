package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/client"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newCancel() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "cancel JOB",
		Short: "End a job that has not been published yet",
		Long: `Cancel a job: what runs is ended, and no tag moves. One that has ended is left as it
is; one whose tags are being pushed is not cancelled any more.`,
		Example:           `  archfarm cancel 01a20ae6-d469-7d03-9fcf-659b63e32bea`,
		Args:              oneArg("the job's id, as archfarm jobs shows it"),
		ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return changeJob(cmd, "cancelling job "+args[0], func(ctx context.Context, farm *client.Client) (*archfarmv1.Job, error) {
				return farm.Cancel(ctx, args[0])
			})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

func newRetry() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "retry JOB",
		Short: "Put a job that has ended back into the queue",
		Long: `Retry a job. Its legs that succeeded keep what they have built, unless their platform
is named with --platform.`,
		Example: `  archfarm retry 01a20ae6-d469-7d03-9fcf-659b63e32bea
  archfarm retry 01a20ae6-d469 --platform linux/arm64 && archfarm watch 01a20ae6-d469`,
		Args:              oneArg("the job's id, as archfarm jobs shows it"),
		ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			platforms, err := platformsOf(cmd)
			if err != nil {
				return err
			}
			return changeJob(cmd, "retrying job "+args[0], func(ctx context.Context, farm *client.Client) (*archfarmv1.Job, error) {
				return farm.Retry(ctx, args[0], platforms...)
			})
		},
	}
	cmd.Flags().StringSlice("platform", nil, "build this platform again although it succeeded; may repeat")
	_ = cmd.RegisterFlagCompletionFunc("platform", completePlatforms) // fails only for flags that are none
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// changeJob does something to a job, and tells its state then.
func changeJob(cmd *cobra.Command, what string, change func(context.Context, *client.Client) (*archfarmv1.Job, error)) error {
	output, err := outputOf(cmd)
	if err != nil {
		return err
	}
	return withFarm(cmd, what, func(ctx context.Context, farm *client.Client) error {
		job, err := change(ctx, farm)
		if err != nil {
			return err
		}
		if output == "json" {
			return printJSON(cmd.OutOrStdout(), jobOf(job))
		}
		legs := ""
		for _, l := range job.GetLegs() {
			legs += ", " + l.GetPlatform() + " " + shortState(l.GetState())
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s: %s%s\n", printable(job.GetId()), shortState(job.GetState()), printable(strings.TrimSuffix(legs, ", ")))
		return nil
	})
}
