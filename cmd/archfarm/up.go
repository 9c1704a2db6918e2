package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/worker"
)

func newUp(stop <-chan struct{}) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run a whole farm on this machine: a coordinator, a worker and its buildkitd",
		Long: `Run a coordinator and one worker in this process, with a buildkitd of their own.
More workers can join it. buildkitd must be installed; it needs root, or rootless
BuildKit's own set-up.`,
		Example: `  archfarm up
  docker buildx create --name farm --driver remote tcp://127.0.0.1:8372
  archfarm up --buildkitd /usr/local/bin/buildkitd --buildkitd-arg --oci-worker-net=host --slots 4`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return up(cmd, stop) },
	}
	coordinatorFlags(cmd)
	workerFlags(cmd)
	flags := cmd.Flags()
	flags.String("name", "", "this machine's name in the farm (default: the host's name)")
	flags.String("data-dir", defaultDataDir(), "folder for the state of coordinator, worker and buildkitd")
	managedFlags(flags)
	return cmd
}

func defaultDataDir() string {
	if os.Geteuid() == 0 {
		return "/var/lib/archfarm"
	}
	if dir, err := os.UserHomeDir(); err == nil {
		return filepath.Join(dir, ".local", "share", "archfarm")
	}
	return ""
}

func up(cmd *cobra.Command, stop <-chan struct{}) error {
	coordinatorCfg, err := coordinatorConfig(cmd, stop)
	if err != nil {
		return err
	}
	base := coordinatorCfg.DataDir
	coordinatorCfg.DataDir = filepath.Join(base, "coordinator")
	workerCfg, err := withWorkerFlags(cmd, worker.Config{Version: version, Stop: stop})
	if err != nil {
		return err
	}
	workerCfg.DataDir, workerCfg.Managed = filepath.Join(base, "worker"), managed(cmd)

	// The coordinator drains first; then the worker, idle by now, with its buildkitd.
	bound := make(chan coordinator.Bound, 1)
	coordinatorCfg.Ready = func(b coordinator.Bound) { bound <- b }
	workerCtx, stopWorker := context.WithCancel(context.WithoutCancel(cmd.Context())) // ends when the coordinator has drained
	defer stopWorker()
	coordinatorCtx, stopCoordinator := context.WithCancel(cmd.Context())
	defer stopCoordinator()

	var parts errgroup.Group
	parts.Go(func() error {
		defer stopWorker()
		return coordinator.Run(coordinatorCtx, coordinatorCfg)
	})
	parts.Go(func() error {
		defer stopCoordinator()
		select {
		case b := <-bound:
			workerCfg.Coordinators = []string{b.Listen[0].String()}
			return worker.Run(workerCtx, workerCfg)
		case <-workerCtx.Done():
			return nil
		}
	})
	return parts.Wait()
}
