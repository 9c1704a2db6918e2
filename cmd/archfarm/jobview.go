package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/client"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newJob() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "job",
		Short:   "Show one job",
		Example: `  archfarm job show 01a20ae6-d469-7d03-9fcf-659b63e32bea`,
		Args:    cobra.ArbitraryArgs, // RunE tells what it does not know
	}
	cmd.RunE = group(cmd)
	cmd.AddCommand(newJobShow())
	return cmd
}

func newJobShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "show JOB",
		Aliases: []string{"get"},
		Short:   "Show one job: its state, its legs and their attempts",
		Long: `Show a job. It is named by its id, or by the beginning of it that no other job has.
The exit code is 0 whatever the job's state is.`,
		Example: `  archfarm job show 01a20ae6-d469-7d03-9fcf-659b63e32bea
  archfarm job show 01a20ae6-d469 --output json | jq .digest`,
		Args:              oneArg("the job's id, as archfarm jobs shows it"),
		ValidArgsFunction: completeJobs,
		RunE: func(cmd *cobra.Command, args []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			return withFarm(cmd, "looking for job "+args[0], func(ctx context.Context, farm *client.Client) error {
				job, err := farm.Get(ctx, args[0])
				if err != nil {
					return err
				}
				return printJob(cmd.OutOrStdout(), output, job, time.Now())
			})
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// jobJSON is a job as --output json prints it.
type jobJSON struct {
	ID          string            `json:"id"`
	State       string            `json:"state"`
	Tags        []string          `json:"tags"`
	Platforms   []string          `json:"platforms"`
	Context     string            `json:"context,omitempty"`
	Source      *sourceJSON       `json:"source,omitempty"`
	Digest      string            `json:"digest,omitempty"`
	Error       string            `json:"error,omitempty"`
	Legs        []legJSON         `json:"legs"`
	Metadata    map[string]string `json:"metadata,omitempty"`
	RequestID   string            `json:"requestId,omitempty"`
	Tenant      string            `json:"tenant,omitempty"`
	SubmittedBy string            `json:"submittedBy,omitempty"`
	Priority    int32             `json:"priority,omitempty"`
	Retries     int32             `json:"retries,omitempty"`
	Coordinator string            `json:"coordinator,omitempty"`
	Created     *time.Time        `json:"created,omitempty"`
	Started     *time.Time        `json:"started,omitempty"`
	Ended       *time.Time        `json:"ended,omitempty"`
	// Existed is told by submit: an earlier submission of the request id made the job.
	Existed *bool `json:"existed,omitempty"`
}

type sourceJSON struct {
	URL        string     `json:"url,omitempty"`
	Commit     string     `json:"commit,omitempty"`
	Branch     string     `json:"branch,omitempty"`
	Tag        string     `json:"tag,omitempty"`
	CommitTime *time.Time `json:"commitTime,omitempty"`
	Dirty      bool       `json:"dirty,omitempty"`
}

type legJSON struct {
	Platform string        `json:"platform"`
	State    string        `json:"state"`
	Worker   string        `json:"worker,omitempty"`
	Digest   string        `json:"digest,omitempty"`
	Error    string        `json:"error,omitempty"`
	Attempts []attemptJSON `json:"attempts"`
}

type attemptJSON struct {
	Number      int32      `json:"number"`
	Worker      string     `json:"worker,omitempty"`
	Coordinator string     `json:"coordinator,omitempty"`
	Error       string     `json:"error,omitempty"`
	Started     *time.Time `json:"started,omitempty"`
	Ended       *time.Time `json:"ended,omitempty"`
}

func jobOf(j *archfarmv1.Job) jobJSON {
	spec := j.GetSpec()
	out := jobJSON{
		ID: j.GetId(), State: shortState(j.GetState()), Tags: append([]string{}, j.GetTags()...), Platforms: append([]string{}, spec.GetPlatforms()...),
		Context: contextName(spec.GetContext()), Source: sourceOf(spec.GetContext().GetSource()), Digest: j.GetDigest(), Error: j.GetError(),
		Legs: []legJSON{}, Metadata: spec.GetMetadata(), RequestID: j.GetRequestId(), Tenant: j.GetTenant(), SubmittedBy: j.GetSubmittedBy(),
		Priority: spec.GetPriority(), Retries: j.GetRetries(), Coordinator: j.GetCoordinator(),
		Created: timeOf(j.GetCreateTime()), Started: timeOf(j.GetStartTime()), Ended: timeOf(j.GetEndTime()),
	}
	for _, l := range j.GetLegs() {
		out.Legs = append(out.Legs, legOf(l))
	}
	return out
}

func legOf(l *archfarmv1.JobLeg) legJSON {
	out := legJSON{Platform: l.GetPlatform(), State: shortState(l.GetState()), Worker: l.GetWorker(), Digest: l.GetDigest(), Error: l.GetError(), Attempts: []attemptJSON{}}
	for _, a := range l.GetAttempts() {
		out.Attempts = append(out.Attempts, attemptJSON{a.GetNumber(), a.GetWorker(), a.GetCoordinator(), a.GetError(), timeOf(a.GetStartTime()), timeOf(a.GetEndTime())})
	}
	return out
}

func sourceOf(s *archfarmv1.Source) *sourceJSON {
	if s == nil {
		return nil
	}
	return &sourceJSON{s.GetUrl(), s.GetCommit(), s.GetBranch(), s.GetTag(), timeOf(s.GetCommitTime()), s.GetDirty()}
}

// contextName is a context as --context would name it; an uploaded one by its digest.
func contextName(c *archfarmv1.BuildContext) string {
	git := c.GetGit()
	if git == nil {
		return c.GetDigest()
	}
	name := git.GetUrl()
	if git.GetRef() != "" || git.GetSubdir() != "" {
		name += "#" + git.GetRef()
	}
	if git.GetSubdir() != "" {
		name += ":" + git.GetSubdir()
	}
	return name
}

func timeOf(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

func printJob(out io.Writer, output string, job *archfarmv1.Job, now time.Time) error {
	j := jobOf(job)
	if output == "json" {
		return printJSON(out, j)
	}
	lines := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	tell := func(name, value string) {
		if value != "" {
			fmt.Fprintf(lines, "%s:\t%s\n", name, printable(value))
		}
	}
	tell("Job", j.ID)
	tell("State", j.State)
	tell("Error", strings.ReplaceAll(j.Error, "\n", " "))
	tell("Digest", j.Digest)
	for _, t := range j.Tags {
		tell("Tag", t)
	}
	tell("Context", j.Context)
	if j.Source != nil {
		tell("Commit", j.Source.Commit)
	}
	tell("Submitted", submitted(j, now))
	tell("Took", j.took(now))
	for _, key := range slices.SortedFunc(maps.Keys(j.Metadata), cmp.Compare[string]) {
		tell("Metadata", key+"="+j.Metadata[key])
	}
	if err := lines.Flush(); err != nil || len(j.Legs) == 0 {
		return err
	}
	fmt.Fprintln(out)
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "PLATFORM\tSTATE\tATTEMPTS\tWORKER\tDIGEST\tERROR")
	for _, l := range j.Legs {
		firstLine, _, _ := strings.Cut(l.Error, "\n")
		printRow(table, []string{l.Platform, l.State, fmt.Sprint(len(l.Attempts)), l.Worker, l.Digest, firstLine})
	}
	return table.Flush()
}

func submitted(j jobJSON, now time.Time) string {
	if j.Created == nil {
		return ""
	}
	text := fmt.Sprintf("%s (%s ago)", j.Created.Format(time.RFC3339), ago(now, j.Created))
	if j.SubmittedBy != "" {
		text += " by " + j.SubmittedBy
	}
	return text
}
