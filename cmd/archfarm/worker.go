package main

import (
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/worker"
	"github.com/archfarm/archfarm/worker/native"
)

func newWorker(stop <-chan struct{}) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "worker",
		Short: "Offer this machine's buildkitd to the farm",
		Long: `Run the agent beside a buildkitd. It finds the coordinators by gossip, or is told
of them, and dials out to each: the machine needs no open port. What it offers is
what the machine runs natively, never what it could emulate.`,
		Example: `  archfarm worker --name amd-1 --join farm.example:7946 --gossip :7946 \
      --buildkit unix:///run/buildkit/buildkitd.sock --slots 2
  archfarm worker --name mac-1 --coordinator farm.example:8372 --buildkit tcp://127.0.0.1:1234   # behind NAT`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := workerConfig(cmd, stop)
			if err != nil {
				return err
			}
			return worker.Run(cmd.Context(), cfg)
		},
	}
	flags := cmd.Flags()
	flags.String("name", "", "this worker's name, unique in the farm (default: the host's name)")
	flags.String("buildkit", "unix:///run/buildkit/buildkitd.sock", "the buildkitd to offer: unix:///path or tcp://host:port")
	flags.StringArray("coordinator", nil, "coordinator to dial, for machines that gossip cannot reach; may repeat")
	flags.String("gossip", "", "host:port, TCP and UDP, for gossip; needed with --join, port 0 takes a free one")
	workerFlags(cmd)
	gossipFlags(flags)
	return cmd
}

func workerFlags(cmd *cobra.Command) {
	flags := cmd.Flags()
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
	cfg.BuildKit = list[0]
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
	return cfg, nil
}
