package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/client"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newTags() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tags REPOSITORY",
		Short: "Show what the farm has published to a repository",
		Long: `Show the ledger of a repository's tags, the newest first: which digest each has been
bound to, by which job or build, of which commit, and when. A star marks what a tag
means now.`,
		Example: `  archfarm tags registry.example.com/app
  archfarm tags registry.example.com/app --tag latest --limit 10
  archfarm tags registry.example.com/app --output json | jq '.[] | select(.current) | "\(.tag) \(.digest)"'`,
		Args: oneArg("a repository, as registry.example.com/app"),
		RunE: func(cmd *cobra.Command, args []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			tag, _ := cmd.Flags().GetString("tag")
			limit, _ := cmd.Flags().GetInt("limit")
			if limit < 0 {
				return usageError{fmt.Errorf("--limit %d: it is how many bindings to show at most, 0 for all", limit)}
			}
			return withFarm(cmd, "reading the tags of "+args[0], func(ctx context.Context, farm *client.Client) error {
				bindings, err := take(farm.Tags(ctx, &archfarmv1.ListTagsRequest{Repository: args[0], Tag: tag}), limit)
				if err != nil {
					return err
				}
				return printTags(cmd.OutOrStdout(), output, bindings, time.Now())
			})
		},
	}
	flags := cmd.Flags()
	flags.String("tag", "", "only this tag's")
	flags.Int("limit", defaultJobs, "how many at most; 0 for all")
	outputFlag(flags)
	farmFlags(flags)
	return cmd
}

// tagJSON is what a tag was bound to, as --output json prints it.
type tagJSON struct {
	Repository string      `json:"repository"`
	Tag        string      `json:"tag"`
	Digest     string      `json:"digest"`
	State      string      `json:"state"`
	Immutable  bool        `json:"immutable"`
	Current    bool        `json:"current"`
	Job        string      `json:"job,omitempty"`
	Build      string      `json:"build,omitempty"`
	Source     *sourceJSON `json:"source,omitempty"`
	Bound      *time.Time  `json:"bound,omitempty"`
	Published  *time.Time  `json:"published,omitempty"`
}

func printTags(out io.Writer, output string, bindings []*archfarmv1.TagBinding, now time.Time) error {
	list := []tagJSON{}
	for _, b := range bindings {
		list = append(list, tagJSON{
			Repository: b.GetRepository(), Tag: b.GetTag(), Digest: b.GetDigest(), State: shortState(b.GetState()), Immutable: b.GetImmutable(), Current: b.GetCurrent(),
			Job: b.GetJob(), Build: b.GetBuild(), Source: sourceOf(b.GetSource()), Bound: timeOf(b.GetBindTime()), Published: timeOf(b.GetPublishTime()),
		})
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "TAG\tDIGEST\tSTATE\tCOMMIT\tJOB OR BUILD\tAGE\tIMMUTABLE")
	for _, t := range list {
		tag, immutable, from, commit := t.Tag, "no", t.Job, ""
		if t.Current {
			tag += " *"
		}
		if t.Immutable {
			immutable = "yes"
		}
		if from == "" {
			from = t.Build
		}
		if t.Source != nil {
			commit = t.Source.Commit[:min(len(t.Source.Commit), 12)]
		}
		printRow(table, []string{tag, t.Digest, t.State, commit, from, ago(now, t.Bound), immutable})
	}
	return table.Flush()
}
