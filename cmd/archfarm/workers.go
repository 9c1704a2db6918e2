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
	"unicode"

	"github.com/containerd/platforms"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/enroll"
)

const (
	// callTimeout bounds a client's short calls, connecting included.
	callTimeout = 20 * time.Second
	// maxList bounds what a coordinator may answer with, in bytes: 1,000 workers with
	// all the labels that they may have.
	maxList = 32 << 20
)

func newWorkers() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "workers",
		Short: "List the farm's workers",
		Long: `List the workers that are attached, with what they run natively and the slots that
are taken there. A client with a certificate sees those of the pools that it may use.`,
		Example: `  archfarm workers
  archfarm workers --pool office --platform linux/arm64 --output wide
  archfarm workers --state draining --state cordoned
  archfarm workers --farm tcp://farm.example:8372 --cert-dir ~/.archfarm --output json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			output, _ := cmd.Flags().GetString("output")
			if output != "table" && output != "wide" && output != "json" {
				return usageError{fmt.Errorf("--output %q: use table, wide or json", output)}
			}
			wanted, err := workerFilter(cmd)
			if err != nil {
				return err
			}
			workers, err := listWorkers(cmd)
			if err != nil {
				return err
			}
			return printWorkers(cmd.OutOrStdout(), output, slices.DeleteFunc(workers, func(w *archfarmv1.Worker) bool { return !wanted(w) }), time.Now())
		},
	}
	flags := cmd.Flags()
	flags.StringP("output", "o", "table", "table, wide or json")
	flags.StringArray("pool", nil, "only workers of this pool; may repeat")
	flags.StringArray("platform", nil, "only workers that run this platform natively; may repeat, all count")
	flags.StringArray("state", nil, "only workers that are ready, draining, cordoned or unavailable; may repeat")
	flags.StringArray("label", nil, "only workers with this label, as key=value, or key for any value; may repeat, all count")
	farmFlags(flags)
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions(states(), cobra.ShellCompDirectiveNoFileComp)) // fails only for flags that are none
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "wide", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// workerFilter is which workers the flags ask for.
func workerFilter(cmd *cobra.Command) (func(*archfarmv1.Worker) bool, error) {
	flags := cmd.Flags()
	pools, _ := flags.GetStringArray("pool")
	wanted, _ := flags.GetStringArray("platform")
	in, _ := flags.GetStringArray("state")
	labels, _ := flags.GetStringArray("label")
	for i, name := range wanted {
		p, err := parsePlatform(name)
		if err != nil {
			return nil, usageError{fmt.Errorf("--platform: %w", err)}
		}
		wanted[i] = p
	}
	for _, s := range in {
		if !slices.Contains(states(), s) {
			return nil, usageError{fmt.Errorf("--state %q: use one of %s", s, strings.Join(states(), ", "))}
		}
	}
	return func(w *archfarmv1.Worker) bool {
		return (len(pools) == 0 || slices.Contains(pools, w.GetPool())) && (len(in) == 0 || slices.Contains(in, shortState(w.GetState()))) &&
			!slices.ContainsFunc(wanted, func(p string) bool { return !slices.Contains(w.GetPlatforms(), p) }) &&
			!slices.ContainsFunc(labels, func(l string) bool { return !labelled(w, l) })
	}, nil
}

// labelled tells whether a worker has a label: key=value, or key with any value.
func labelled(w *archfarmv1.Worker, label string) bool {
	key, value, exact := strings.Cut(label, "=")
	got, ok := w.GetLabels()[key]
	return ok && (!exact || got == value)
}

// parsePlatform reads a platform as the farm writes it. An architecture alone is
// Linux's, whatever this machine runs.
func parsePlatform(name string) (string, error) {
	p, err := platforms.Parse(name)
	if err != nil {
		return "", fmt.Errorf("%q is no platform: %w", name, err)
	}
	if !strings.Contains(name, "/") {
		p.OS = "linux"
	}
	return platforms.FormatAll(platforms.Normalize(p)), nil
}

// states are the states that a worker can be in, as they are shown.
func states() []string {
	var out []string
	for _, number := range slices.Sorted(maps.Keys(archfarmv1.Worker_State_name)) {
		if s := archfarmv1.Worker_State(number); s != archfarmv1.Worker_STATE_UNSPECIFIED {
			out = append(out, shortState(s))
		}
	}
	return out
}

// fleetClient is a farm that is asked about its workers and its queue.
type fleetClient struct {
	archfarmv1.FleetServiceClient
	farm string // as messages name it
	conn *grpc.ClientConn
}

// dialFleet connects to the farm that the flags name. The connection is the caller's
// to close.
func dialFleet(cmd *cobra.Command) (*fleetClient, error) {
	conn, err := dialFarm(cmd)
	if err != nil {
		return nil, err
	}
	return &fleetClient{archfarmv1.NewFleetServiceClient(conn), farmName(cmd), conn}, nil
}

// farmError is a call that the farm refused, or that did not reach it.
type farmError struct {
	what, farm string
	err        error
}

func (e *farmError) Error() string {
	hint := ""
	if message := status.Convert(e.err).Message(); status.Code(e.err) == codes.Unavailable && strings.HasPrefix(message, "connection error") { // gRPC's words for what is no answer of the farm
		hint = "; is the coordinator running there?"
	}
	return fmt.Sprintf("%s at %s: %v%s", e.what, e.farm, enroll.Explain(errors.New(printable(status.Convert(e.err).Message()))), hint)
}

func (e *farmError) Unwrap() error { return e.err }

// ask calls one method within the time that there is for it.
func ask[Q, A any](ctx context.Context, f *fleetClient, what string, call func(context.Context, *Q, ...grpc.CallOption) (*A, error), question *Q) (*A, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := call(ctx, question, grpc.MaxCallRecvMsgSize(maxList))
	if err != nil {
		return nil, &farmError{what, f.farm, err}
	}
	return answer, nil
}

func (f *fleetClient) workers(ctx context.Context) ([]*archfarmv1.Worker, error) {
	answer, err := ask(ctx, f, "listing the workers", f.ListWorkers, &archfarmv1.ListWorkersRequest{})
	return answer.GetWorkers(), err
}

func listWorkers(cmd *cobra.Command) ([]*archfarmv1.Worker, error) {
	farm, err := dialFleet(cmd)
	if err != nil {
		return nil, err
	}
	defer farm.conn.Close()
	return farm.workers(cmd.Context())
}

// completeWorkers offers the workers' names to a shell. Several commands take
// several, each once.
func completeWorkers(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if err := applySources(cmd, os.LookupEnv); err != nil { // a completion does not run what runs before commands
		return nil, cobra.ShellCompDirectiveError
	}
	workers, err := listWorkers(cmd)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []cobra.Completion
	for _, w := range workers {
		if !slices.Contains(args, w.GetName()) {
			out = append(out, cobra.CompletionWithDesc(printable(w.GetName()), fmt.Sprintf("%s, %d of %d slots used", shortState(w.GetState()), w.GetSlots().GetUsed(), w.GetSlots().GetTotal())))
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// workerJSON is a worker as --output json prints it.
type workerJSON struct {
	Name      string            `json:"name"`
	Pool      string            `json:"pool"`
	Labels    map[string]string `json:"labels"`
	Platforms []string          `json:"platforms"`
	Emulated  []string          `json:"emulated"`
	Slots     slotsJSON         `json:"slots"`
	State     string            `json:"state"`
	Reason    string            `json:"reason,omitempty"`
	Load      *loadJSON         `json:"load,omitempty"`
	Version   string            `json:"version"`
	BuildKit  string            `json:"buildkit"`
	Machine   string            `json:"machine"`
	Since     time.Time         `json:"since"`
}

type slotsJSON struct {
	Total uint32 `json:"total"`
	Used  uint32 `json:"used"`
}

// loadJSON is a machine's load: shares are 0 to 1, and what it does not tell is absent.
type loadJSON struct {
	CPU                  *float64 `json:"cpu,omitempty"`
	MemoryTotalBytes     uint64   `json:"memoryTotalBytes,omitempty"`
	MemoryAvailableBytes uint64   `json:"memoryAvailableBytes,omitempty"`
	DiskTotalBytes       uint64   `json:"diskTotalBytes,omitempty"`
	DiskFreeBytes        uint64   `json:"diskFreeBytes,omitempty"`
	CacheBytes           *uint64  `json:"cacheBytes,omitempty"`
	CPUPressure          *float64 `json:"cpuPressure,omitempty"`
	MemoryPressure       *float64 `json:"memoryPressure,omitempty"`
	IOPressure           *float64 `json:"ioPressure,omitempty"`
	OOMKills             *uint64  `json:"oomKills,omitempty"`
}

func workerOf(w *archfarmv1.Worker) workerJSON {
	out := workerJSON{
		Name: w.GetName(), Pool: w.GetPool(), Labels: map[string]string{}, Platforms: append([]string{}, w.GetPlatforms()...), Emulated: append([]string{}, w.GetEmulated()...),
		Slots: slotsJSON{w.GetSlots().GetTotal(), w.GetSlots().GetUsed()}, State: shortState(w.GetState()), Reason: w.GetReason(),
		Version: w.GetVersion(), BuildKit: w.GetBuildkitVersion(), Machine: w.GetMachine(), Since: w.GetSince().AsTime(),
	}
	maps.Copy(out.Labels, w.GetLabels())
	if l := w.GetLoad(); l != nil {
		out.Load = &loadJSON{
			CPU: l.Cpu, MemoryTotalBytes: l.GetMemoryTotalBytes(), MemoryAvailableBytes: l.GetMemoryAvailableBytes(),
			DiskTotalBytes: l.GetDiskTotalBytes(), DiskFreeBytes: l.GetDiskFreeBytes(), CacheBytes: l.CacheBytes,
			CPUPressure: l.CpuPressure, MemoryPressure: l.MemoryPressure, IOPressure: l.IoPressure, OOMKills: l.OomKills,
		}
	}
	return out
}

func printWorkers(out io.Writer, output string, workers []*archfarmv1.Worker, now time.Time) error {
	list := []workerJSON{}
	for _, w := range workers {
		list = append(list, workerOf(w))
	}
	if output == "json" {
		return printJSON(out, list)
	}
	table := tabwriter.NewWriter(out, 0, 4, 3, ' ', 0)
	header := "NAME\tPOOL\tPLATFORMS\tSLOTS\tSTATE\tAGE\t"
	if output == "wide" {
		header += "EMULATED\tLABELS\tCPU\tMEMORY\tDISK\tMACHINE\tBUILDKIT\tVERSION\t"
	}
	fmt.Fprintln(table, header+"REASON")
	for _, w := range list {
		row := []string{
			w.Name, w.Pool, strings.Join(w.Platforms, ","), fmt.Sprintf("%d/%d", w.Slots.Used, w.Slots.Total), w.State, now.Sub(w.Since).Round(time.Second).String(),
		}
		if output == "wide" {
			row = append(row, strings.Join(w.Emulated, ","), joinLabels(w.Labels))
			row = append(row, w.Load.columns()...)
			row = append(row, w.Machine, w.BuildKit, w.Version)
		}
		printRow(table, append(row, w.Reason))
	}
	return table.Flush()
}

// printRow writes one line of a table; what is empty is a dash, but for the last column.
func printRow(table io.Writer, cells []string) {
	last := len(cells) - 1
	for i, c := range cells {
		if cells[i] = printable(c); i < last {
			cells[i] = orDash(cells[i])
		}
	}
	fmt.Fprintln(table, strings.Join(cells, "\t"))
}

// columns are CPU, MEMORY and DISK: what is busy, and what is taken.
func (l *loadJSON) columns() []string {
	out := make([]string, 3)
	if l == nil {
		return out
	}
	if l.CPU != nil {
		out[0] = fmt.Sprintf("%.0f%%", *l.CPU*100)
	}
	out[1] = taken(l.MemoryTotalBytes, l.MemoryAvailableBytes)
	out[2] = taken(l.DiskTotalBytes, l.DiskFreeBytes)
	return out
}

// taken is what of a total is not free: "37% of 16.0 GiB".
func taken(total, free uint64) string {
	if total == 0 {
		return ""
	}
	return fmt.Sprintf("%.0f%% of %.1f GiB", 100*(1-float64(min(free, total))/float64(total)), float64(total)/(1<<30))
}

func joinLabels(labels map[string]string) string {
	var out []string
	for _, key := range slices.SortedFunc(maps.Keys(labels), cmp.Compare[string]) {
		out = append(out, key+"="+labels[key])
	}
	return strings.Join(out, ",")
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
