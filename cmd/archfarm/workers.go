package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// callTimeout bounds a client's short calls, connecting included.
const callTimeout = 20 * time.Second

func newWorkers() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "workers",
		Short: "List the farm's workers",
		Example: `  archfarm workers
  archfarm workers --farm tcp://farm.example:8372 --output json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			farm, _ := cmd.Flags().GetString("farm")
			output, _ := cmd.Flags().GetString("output")
			if output != "table" && output != "json" {
				return usageError{fmt.Errorf("--output %q: use table or json", output)}
			}
			workers, err := listWorkers(cmd.Context(), farm)
			if err != nil {
				return err
			}
			return printWorkers(cmd.OutOrStdout(), output, workers, time.Now())
		},
	}
	cmd.Flags().String("farm", "tcp://127.0.0.1:8372", "the coordinator to ask: host:port, tcp://host:port or unix:///path")
	cmd.Flags().StringP("output", "o", "table", "table or json")
	return cmd
}

func listWorkers(ctx context.Context, farm string) ([]*archfarmv1.Worker, error) {
	target, err := addresses("farm", []string{farm})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///farm", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return target[0].Dial(ctx) }))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	response, err := archfarmv1.NewFleetServiceClient(conn).ListWorkers(ctx, &archfarmv1.ListWorkersRequest{})
	if err != nil {
		return nil, fmt.Errorf("listing the workers of %s: %s; is the coordinator running there?", farm, status.Convert(err).Message())
	}
	return response.GetWorkers(), nil
}

// workerJSON is a worker as --output json prints it.
type workerJSON struct {
	Name      string    `json:"name"`
	Platforms []string  `json:"platforms"`
	Slots     slotsJSON `json:"slots"`
	State     string    `json:"state"`
	Reason    string    `json:"reason,omitempty"`
	Version   string    `json:"version"`
	BuildKit  string    `json:"buildkit"`
	Machine   string    `json:"machine"`
	Since     time.Time `json:"since"`
}

type slotsJSON struct {
	Total uint32 `json:"total"`
	Used  uint32 `json:"used"`
}

func printWorkers(out io.Writer, output string, workers []*archfarmv1.Worker, now time.Time) error {
	list := []workerJSON{}
	for _, w := range workers {
		list = append(list, workerJSON{
			Name: w.GetName(), Platforms: append([]string{}, w.GetPlatforms()...), Slots: slotsJSON{w.GetSlots().GetTotal(), w.GetSlots().GetUsed()},
			State: stateName(w.GetState()), Reason: w.GetReason(), Version: w.GetVersion(), BuildKit: w.GetBuildkitVersion(), Machine: w.GetMachine(),
			Since: w.GetSince().AsTime(),
		})
	}
	if output == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	fmt.Fprintln(table, "NAME\tSTATE\tSLOTS\tPLATFORMS\tBUILDKIT\tSINCE")
	for _, w := range list {
		fmt.Fprintf(table, "%s\t%s\t%d/%d\t%s\t%s\t%s\n", printable(w.Name), w.State, w.Slots.Used, w.Slots.Total,
			printable(strings.Join(w.Platforms, ",")), printable(w.BuildKit), now.Sub(w.Since).Round(time.Second))
	}
	return table.Flush()
}

// printable keeps what workers say of themselves from steering the terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s)
}

// stateName is the state without the enumeration's prefix: "ready".
func stateName(s archfarmv1.Worker_State) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "STATE_"))
}
