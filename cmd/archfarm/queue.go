package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newQueue() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "queue",
		Short: "List what waits for a worker",
		Long: `List the legs of builds that wait for a worker, in the order of the queue. A client
with a certificate sees those of its tenant. When a leg starts is estimated by how long
the projects that run, and those ahead, took before; nothing is said where one of them
is new.`,
		Example: `  archfarm queue
  archfarm queue --output json | jq 'group_by(.platform) | map({(.[0].platform): length}) | add'`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			farm, err := dialFleet(cmd)
			if err != nil {
				return err
			}
			defer farm.conn.Close()
			answer, err := ask(cmd.Context(), farm, "listing the queue", farm.ListQueue, &archfarmv1.ListQueueRequest{})
			if err != nil {
				return err
			}
			return printQueue(cmd.OutOrStdout(), output, answer.GetLegs(), time.Now())
		},
	}
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// queuedJSON is a waiting leg as --output json prints it.
type queuedJSON struct {
	Build    string    `json:"build"`
	Platform string    `json:"platform"`
	Pools    []string  `json:"pools"`
	Tenant   string    `json:"tenant,omitempty"`
	Since    time.Time `json:"since"`
	Ahead    uint32    `json:"ahead"`
	Reason   string    `json:"reason"`
	Estimate float64   `json:"estimate_seconds,omitempty"` // unless it is not known
}

func printQueue(out io.Writer, output string, legs []*archfarmv1.QueuedLeg, now time.Time) error {
	list := []queuedJSON{}
	for _, l := range legs {
		list = append(list, queuedJSON{
			Build: l.GetBuild(), Platform: l.GetPlatform(), Pools: append([]string{}, l.GetPools()...), Tenant: l.GetTenant(),
			Since: l.GetSince().AsTime(), Ahead: l.GetAhead(), Reason: l.GetReason(),
			Estimate: l.GetEstimate().AsDuration().Seconds(),
		})
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "BUILD\tPLATFORM\tPOOLS\tTENANT\tWAITING\tAHEAD\tSTARTS IN\tREASON")
	for _, l := range list {
		pools := strings.Join(l.Pools, ",")
		if pools == "" {
			pools = "any"
		}
		printRow(table, []string{l.Build, l.Platform, pools, l.Tenant, now.Sub(l.Since).Round(time.Second).String(), fmt.Sprint(l.Ahead), startsIn(l.Estimate), l.Reason})
	}
	return table.Flush()
}

// startsIn is an estimate in seconds for people; 0 is one that is not known.
func startsIn(seconds float64) string {
	if seconds == 0 {
		return "-"
	}
	return "about " + time.Duration(seconds*float64(time.Second)).Round(time.Second).String()
}
