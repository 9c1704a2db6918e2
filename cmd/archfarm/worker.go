package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/worker"
	"github.com/archfarm/archfarm/worker/native"
)

func newWorker(stop <-chan struct{}) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "worker",
		Short: "Offer this machine's buildkitd to the farm",
		Long: `Run the agent beside a buildkitd, or, with --managed, with a buildkitd of its own.
It finds the coordinators by gossip, or is told of them, and dials out to each: the
machine needs no open port. What it offers is what the machine runs natively, never
what it could emulate. It offers less while memory or disks are under pressure, and
nothing while the disk is nearly full.`,
		Example: `  archfarm worker --name amd-1 --join farm.example:7946 --gossip :7946 \
      --buildkit unix:///run/buildkit/buildkitd.sock --slots 2
  archfarm worker --name mac-1 --coordinator farm.example:8372 --buildkit tcp://127.0.0.1:1234   # behind NAT
  archfarm worker --name graviton-1 --coordinator farm.example:8372 --managed --pool cloud --label zone=eu-1a`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := workerConfig(cmd, stop)
			if err != nil {
				return err
			}
			return runWorker(cmd, cfg)
		},
	}
	cmd.AddCommand(newWorkerRevoke())
	flags := cmd.Flags()
	flags.String("name", "", "this worker's name, unique in the farm (default: the host's name)")
	flags.String("buildkit", "unix:///run/buildkit/buildkitd.sock", "the buildkitd to offer: unix:///path or tcp://host:port")
	flags.StringArray("coordinator", nil, "coordinator to dial, for machines that gossip cannot reach; may repeat")
	flags.String("gossip", "", "host:port, TCP and UDP, for gossip; needed with --join, port 0 takes a free one")
	flags.String("data-dir", defaultWorkerDir(), "folder for what this agent keeps, and no other: its certificate, whether it is drained, its own buildkitd")
	flags.Bool("managed", false, "run a buildkitd of its own in --data-dir, instead of --buildkit")
	flags.String("buildkit-root", "", "a folder on the disk with BuildKit's state, to watch (default: /var/lib/buildkit if it exists)")
	managedFlags(flags)
	credentialFlags(flags)
	workerFlags(cmd)
	gossipFlags(flags)
	return cmd
}

// managedFlags say which buildkitd to run.
func managedFlags(flags *pflag.FlagSet) {
	flags.String("buildkitd", "buildkitd", "the buildkitd to start, by path or by name in PATH")
	flags.StringArray("buildkitd-arg", nil, "further argument for buildkitd, such as --config and then a file, instead of the one made for it; may repeat")
}

func managed(cmd *cobra.Command) *worker.Managed {
	program, _ := cmd.Flags().GetString("buildkitd")
	args, _ := cmd.Flags().GetStringArray("buildkitd-arg")
	return &worker.Managed{Program: program, Args: args}
}

func defaultWorkerDir() string {
	if dir := defaultDataDir(); dir != "" {
		return filepath.Join(dir, "worker")
	}
	return ""
}

// systemBuildKitRoot is where a buildkitd keeps its state that root runs as it is.
const systemBuildKitRoot = "/var/lib/buildkit"

// buildkitRoot is the folder whose disk to watch: none for a buildkitd that is not
// known to be on this machine.
func buildkitRoot(cmd *cobra.Command, buildkit address.Address) string {
	if dir, _ := cmd.Flags().GetString("buildkit-root"); dir != "" {
		return dir
	}
	if _, err := os.Stat(systemBuildKitRoot); err == nil && buildkit.Network == "unix" {
		return systemBuildKitRoot
	}
	return ""
}

func workerFlags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.String("pool", "", "pool that this worker belongs to (default: that of its certificate, else \"default\")")
	flags.StringArray("label", nil, "what to tell of this worker, KEY=VALUE; may repeat")
	flags.Int("disk-high", 95, "percentage at which the disk counts as full: nothing new is taken, and the cache is pruned")
	flags.Int("disk-low", 90, "percentage below which the disk counts as not full again")
	flags.Int("slots", 2, "how many builds may run here at a time")
	flags.StringArray("platform", nil, "platform that this machine runs natively, instead of what it is found to run; may repeat")
	flags.Duration("worker-drain-timeout", 10*time.Minute, "how long running builds may take to end after SIGTERM")
}

func workerConfig(cmd *cobra.Command, stop <-chan struct{}) (worker.Config, error) {
	flags := cmd.Flags()
	cfg := worker.Config{Version: version, Stop: stop}
	buildkit, _ := flags.GetString("buildkit")
	list, err := addresses("buildkit", []string{buildkit})
	if err != nil {
		return cfg, err
	}
	cfg.BuildKit, cfg.BuildKitRoot = list[0], buildkitRoot(cmd, list[0])
	if own, _ := flags.GetBool("managed"); own {
		if flags.Changed("buildkit") {
			return cfg, usageError{errors.New("--managed runs a buildkitd of its own, and --buildkit names another: use one of them")}
		}
		cfg.Managed = managed(cmd)
	}
	if cfg.DataDir, _ = flags.GetString("data-dir"); cfg.DataDir == "" {
		return cfg, usageError{errors.New("--data-dir is empty: name a folder for what the agent keeps")}
	}
	cfg.Coordinators, _ = flags.GetStringArray("coordinator")
	if cfg.Gossip.Key, err = gossipKey(cmd); err != nil {
		return cfg, err
	}
	cfg.Gossip.Bind, _ = flags.GetString("gossip")
	cfg.Gossip.Advertise, _ = flags.GetString("gossip-advertise")
	cfg.Gossip.Join, _ = flags.GetStringArray("join")
	return withWorkerFlags(cmd, cfg)
}

func withWorkerFlags(cmd *cobra.Command, cfg worker.Config) (worker.Config, error) {
	flags := cmd.Flags()
	var err error
	if cfg.Logger, err = logger(cmd); err != nil {
		return cfg, err
	}
	cfg.Name, _ = flags.GetString("name")
	if cfg.Name == "" {
		if cfg.Name, err = os.Hostname(); err != nil {
			return cfg, err
		}
	}
	if cfg.Slots, _ = flags.GetInt("slots"); cfg.Slots < 1 {
		return cfg, usageError{fmt.Errorf("--slots %d: a worker has at least one", cfg.Slots)}
	}
	cfg.Platforms, _ = flags.GetStringArray("platform")
	if _, err := native.Parse(cfg.Platforms); err != nil {
		return cfg, usageError{fmt.Errorf("--platform: %w", err)}
	}
	cfg.DrainTimeout, _ = flags.GetDuration("worker-drain-timeout")
	if cfg.Labels, err = labels(cmd); err != nil {
		return cfg, usageError{err}
	}
	cfg.Pool, _ = flags.GetString("pool")
	high, _ := flags.GetInt("disk-high")
	low, _ := flags.GetInt("disk-low")
	if low < 1 || low >= high || high > 100 {
		return cfg, usageError{fmt.Errorf("--disk-high %d and --disk-low %d: use percentages, the first the larger", high, low)}
	}
	cfg.DiskHigh, cfg.DiskLow = float64(high)/100, float64(low)/100
	return cfg, nil
}

// labels reads --label KEY=VALUE.
func labels(cmd *cobra.Command) (map[string]string, error) {
	list, _ := cmd.Flags().GetStringArray("label")
	out := map[string]string{}
	for _, item := range list {
		key, value, found := strings.Cut(item, "=")
		if _, twice := out[key]; !found || twice {
			return nil, fmt.Errorf("--label %q: write KEY=VALUE, each key once", item)
		}
		out[key] = value
	}
	if err := worker.CheckLabels(out); err != nil {
		return nil, fmt.Errorf("--label: %w", err)
	}
	return out, nil
}
