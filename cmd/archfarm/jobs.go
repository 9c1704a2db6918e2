package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/client"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// farAhead is a page of completions, and more than anybody reads.
	farAhead = 100
	// defaultJobs is how many jobs are listed when nobody says.
	defaultJobs = 50
)

func newJobs() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "jobs",
		Short: "List jobs, the newest first",
		Long: `List the jobs that have been submitted, the newest first. A client with a certificate
sees those of its tenant.`,
		Example: `  archfarm jobs
  archfarm jobs --state queued --state running
  archfarm jobs --repo registry.example.com/app --since 24h --limit 0
  archfarm jobs --state failed --output json | jq '.[].id'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			question, limit, err := jobsRequest(cmd, time.Now())
			if err != nil {
				return err
			}
			return withFarm(cmd, "listing the jobs", func(ctx context.Context, farm *client.Client) error {
				jobs, err := take(farm.List(ctx, question), limit)
				if err != nil {
					return err
				}
				return printJobs(cmd.OutOrStdout(), output, jobs, time.Now())
			})
		},
	}
	flags := cmd.Flags()
	flags.StringSlice("state", nil, "only jobs that are "+strings.Join(jobStates(), ", ")+"; may repeat")
	flags.String("repo", "", "only jobs that publish to this repository, named without a tag")
	flags.String("since", "", "only jobs submitted since: a duration back (24h), or a time (2026-02-03T15:04:05Z, 2026-02-03)")
	flags.Int("limit", defaultJobs, "how many at most; 0 for all")
	outputFlag(flags)
	farmFlags(flags)
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(jobStates(), cobra.ShellCompDirectiveNoFileComp)) // fails only for flags that are none
	return cmd
}

func jobsRequest(cmd *cobra.Command, now time.Time) (*archfarmv1.ListRequest, int, error) {
	flags := cmd.Flags()
	states, _ := flags.GetStringSlice("state")
	repo, _ := flags.GetString("repo")
	since, _ := flags.GetString("since")
	limit, _ := flags.GetInt("limit")
	req := &archfarmv1.ListRequest{Repository: repo, PageSize: 1000}
	if limit < 0 {
		return nil, 0, usageError{fmt.Errorf("--limit %d: it is how many jobs to list at most, 0 for all", limit)}
	}
	if limit > 0 {
		req.PageSize = int32(min(limit, 1000))
	}
	for _, s := range states {
		i := slices.Index(jobStates(), strings.ToLower(s))
		if i < 0 {
			return nil, 0, usageError{fmt.Errorf("--state %q: use one of %s", s, strings.Join(jobStates(), ", "))}
		}
		req.States = append(req.States, archfarmv1.Job_State(i+1))
	}
	if since != "" {
		at, err := parseSince(since, now)
		if err != nil {
			return nil, 0, usageError{err}
		}
		req.Since = timestamppb.New(at)
	}
	return req, limit, nil
}

// parseSince reads a duration back from now, or a time.
func parseSince(text string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(text); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if at, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return at, nil
		}
	}
	return time.Time{}, fmt.Errorf("--since %q: use a duration as 90m or 24h, or a time as 2026-02-03T15:04:05Z or 2026-02-03", text)
}

// take collects up to n elements, 0 for all.
func take[T any](all func(func(T, error) bool), n int) ([]T, error) {
	var out []T
	for item, err := range all {
		if err != nil {
			return out, err
		}
		if out = append(out, item); len(out) == n {
			break
		}
	}
	return out, nil
}

// withFarm calls f with the farm that the flags name, and words its error.
func withFarm(cmd *cobra.Command, what string, f func(context.Context, *client.Client) error) error {
	conn, err := dialFarm(cmd)
	if err != nil {
		return err
	}
	defer conn.Close()
	farm := client.New(conn)
	farm.Retrying = func(err error) {
		fmt.Fprintf(cmd.ErrOrStderr(), "archfarm: %v; trying again\n", &farmError{what, farmName(cmd), err})
	}
	return farmFault(cmd, what, f(cmd.Context(), farm))
}

// farmFault words an error: as the farm's, unless it is about something else.
func farmFault(cmd *cobra.Command, what string, err error) error {
	var usage usageError
	var late timeoutError
	var ended jobError
	var own *farmError
	switch {
	case err == nil, errors.As(err, &usage), errors.As(err, &late), errors.As(err, &ended), errors.As(err, &own):
		return err
	case errors.Is(err, context.Canceled) && cmd.Context().Err() != nil:
		return err
	}
	return &farmError{what, farmName(cmd), err}
}

// jobStates are the states that a job can be in, as they are shown, in the order of
// their numbers from 1.
func jobStates() []string {
	var out []string
	for _, number := range slices.Sorted(maps.Keys(archfarmv1.Job_State_name)) {
		if s := archfarmv1.Job_State(number); s != archfarmv1.Job_STATE_UNSPECIFIED {
			out = append(out, shortState(s))
		}
	}
	return out
}

// shortState is a state without its enumeration's prefix: "running".
func shortState(s fmt.Stringer) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}

// completeJobs offers the ids of jobs to a shell: only one is taken.
func completeJobs(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	if err := applySources(cmd, os.LookupEnv); err != nil { // a completion does not run what runs before commands
		return nil, cobra.ShellCompDirectiveError
	}
	var out []cobra.Completion
	err := withFarm(cmd, "completing", func(ctx context.Context, farm *client.Client) error {
		jobs, err := take(farm.List(ctx, &archfarmv1.ListRequest{PageSize: farAhead}), farAhead)
		for _, j := range jobs {
			if strings.HasPrefix(j.GetId(), typed) {
				out = append(out, cobra.CompletionWithDesc(printable(j.GetId()), printable(shortState(j.GetState())+" "+strings.Join(j.GetTags(), " "))))
			}
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return out, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
}

// completePlatforms offers those of the farm's workers for --platform.
func completePlatforms(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if err := applySources(cmd, os.LookupEnv); err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	workers, err := listWorkers(cmd)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []cobra.Completion
	for _, w := range workers {
		for _, p := range w.GetPlatforms() {
			out = append(out, printable(p))
		}
	}
	slices.Sort(out)
	return slices.Compact(out), cobra.ShellCompDirectiveNoFileComp
}

func printJobs(out io.Writer, output string, jobs []*archfarmv1.Job, now time.Time) error {
	list := []jobJSON{}
	for _, j := range jobs {
		list = append(list, jobOf(j))
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "ID\tSTATE\tPLATFORMS\tAGE\tTOOK\tTAGS\tERROR")
	for _, j := range list {
		firstLine, _, _ := strings.Cut(j.Error, "\n")
		printRow(table, []string{j.ID, j.State, strings.Join(j.Platforms, ","), ago(now, j.Created), j.took(now), strings.Join(j.Tags, ","), firstLine})
	}
	return table.Flush()
}

// ago is how long ago something was, in whole seconds; nothing for what has not been.
func ago(now time.Time, t *time.Time) string {
	if t == nil {
		return ""
	}
	return max(now.Sub(*t), 0).Round(time.Second).String()
}

// took is how long the job has been running, or did.
func (j jobJSON) took(now time.Time) string {
	if j.Started == nil {
		return ""
	}
	return ago(*cmp.Or(j.Ended, &now), j.Started)
}
