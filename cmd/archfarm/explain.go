package main

import (
	"errors"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func newExplain() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain BUILD|PLATFORM",
		Short: "Tell what a build waits for, or where one would run",
		Long: `Tell where the legs of a running build stand (archfarm queue shows the references of
those that wait), or where a leg of a platform would run if it came now, and what
each worker has to do with it.`,
		Example: `  archfarm explain linux/arm64
  archfarm explain linux/arm64 --pool office
  archfarm explain x3v0zl2kq5n8m7d1`,
		Args: oneArg("a build's reference, or a platform"),
		RunE: func(cmd *cobra.Command, args []string) error {
			output, err := outputOf(cmd)
			if err != nil {
				return err
			}
			question, err := explainRequest(cmd, args[0])
			if err != nil {
				return err
			}
			farm, err := dialFleet(cmd)
			if err != nil {
				return err
			}
			defer farm.conn.Close()
			answer, err := ask(cmd.Context(), farm, "explaining "+args[0], farm.Explain, question)
			if err != nil {
				return err
			}
			return printExplanations(cmd.OutOrStdout(), output, answer.GetLegs())
		},
	}
	cmd.Flags().String("pool", "", "the pool that a leg of the platform would ask for (default: any that you may use)")
	outputFlag(cmd.Flags())
	farmFlags(cmd.Flags())
	return cmd
}

// explainRequest asks about a platform where the word is one, else about a build.
func explainRequest(cmd *cobra.Command, subject string) (*archfarmv1.ExplainRequest, error) {
	pool, _ := cmd.Flags().GetString("pool")
	if platform, err := parsePlatform(subject); err == nil {
		return &archfarmv1.ExplainRequest{Subject: &archfarmv1.ExplainRequest_Platform{Platform: platform}, Pool: pool}, nil
	}
	if pool != "" {
		return nil, usageError{errors.New("--pool goes with a platform: a build has asked for its pool already")}
	}
	return &archfarmv1.ExplainRequest{Subject: &archfarmv1.ExplainRequest_Build{Build: subject}}, nil
}

// explanationJSON is where a leg stands, as --output json prints it.
type explanationJSON struct {
	Platform string        `json:"platform"`
	Worker   string        `json:"worker,omitempty"`
	Summary  string        `json:"summary"`
	Workers  []verdictJSON `json:"workers"`
}

type verdictJSON struct {
	Worker   string `json:"worker"`
	Eligible bool   `json:"eligible"`
	Reason   string `json:"reason"`
}

func printExplanations(out io.Writer, output string, legs []*archfarmv1.LegExplanation) error {
	list := []explanationJSON{}
	for _, l := range legs {
		leg := explanationJSON{Platform: l.GetPlatform(), Worker: l.GetWorker(), Summary: l.GetSummary(), Workers: []verdictJSON{}}
		for _, v := range l.GetWorkers() {
			leg.Workers = append(leg.Workers, verdictJSON{v.GetWorker(), v.GetEligible(), v.GetReason()})
		}
		list = append(list, leg)
	}
	if output == "json" {
		return printJSON(out, list)
	}
	if len(list) == 0 {
		fmt.Fprintln(out, "The build has no legs yet: its frontend has not said for which platforms it is.")
	}
	for i, l := range list {
		if i > 0 {
			fmt.Fprintln(out)
		}
		fmt.Fprintf(out, "%s: %s\n", printable(l.Platform), printable(l.Summary))
		if len(l.Workers) == 0 {
			continue
		}
		table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
		fmt.Fprintln(table, "  WORKER\tELIGIBLE\tREASON")
		for _, v := range l.Workers {
			eligible := "no"
			if v.Eligible {
				eligible = "yes"
			}
			printRow(table, []string{"  " + v.Worker, eligible, v.Reason})
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	return nil
}
