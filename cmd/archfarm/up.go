package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/coordinator"
	"github.com/archfarm/archfarm/worker"
)

// buildkitStop is how long buildkitd has to end by itself.
const buildkitStop = 15 * time.Second

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
	flags.String("data-dir", defaultDataDir(), "folder for the state of coordinator and buildkitd")
	flags.String("buildkitd", "buildkitd", "the buildkitd to start, by path or by name in PATH")
	flags.StringArray("buildkitd-arg", nil, "further argument for buildkitd; may repeat")
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
	coordinatorCfg.DataDir = filepath.Join(coordinatorCfg.DataDir, "coordinator")
	workerCfg, err := withWorkerFlags(cmd, worker.Config{Version: version, Stop: stop})
	if err != nil {
		return err
	}
	base, _ := cmd.Flags().GetString("data-dir")
	workerCfg.BuildKit = address.Address{Network: "unix", Addr: filepath.Join(base, "buildkitd.sock")}

	// The coordinator drains first; then the worker, idle by now; then buildkitd.
	daemon, err := startBuildkitd(cmd, base, workerCfg.BuildKit)
	if err != nil {
		return err
	}
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
	parts.Go(func() error {
		select {
		case <-daemon.ended:
			stopCoordinator()
			if cmd.Context().Err() != nil { // a terminal's Ctrl-C has reached it too
				return nil
			}
			return fmt.Errorf("buildkitd ended by itself: %w", errors.Join(daemon.err, errors.New("see its messages above")))
		case <-workerCtx.Done():
			return nil
		}
	})
	err = parts.Wait()
	return errors.Join(err, daemon.stop())
}

// daemon is the buildkitd that "up" has started. It is in this process's group,
// so that a terminal's Ctrl-C and a supervisor's kill reach it too.
type daemon struct {
	cmd   *exec.Cmd
	ended chan struct{}
	err   error
}

func startBuildkitd(cmd *cobra.Command, base string, socket address.Address) (*daemon, error) {
	program, _ := cmd.Flags().GetString("buildkitd")
	extra, _ := cmd.Flags().GetStringArray("buildkitd-arg")
	if err := os.MkdirAll(base, 0o700); err != nil {
		return nil, fmt.Errorf("making the data folder: %w", err)
	}
	path, err := exec.LookPath(program)
	if err != nil {
		return nil, fmt.Errorf("finding buildkitd: %w; install BuildKit or name it with --buildkitd", err)
	}
	args := append([]string{"--addr", socket.String(), "--root", filepath.Join(base, "buildkit")}, extra...)
	d := &daemon{cmd: exec.Command(path, args...), ended: make(chan struct{})} //nolint:gosec // the operator's own choice
	d.cmd.Stdout, d.cmd.Stderr = os.Stderr, os.Stderr
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", path, err)
	}
	go func() { // ends with the process
		defer close(d.ended)
		d.err = d.cmd.Wait()
	}()
	return d, nil
}

func (d *daemon) stop() error {
	_ = d.cmd.Process.Signal(os.Interrupt) // it may have ended
	select {
	case <-d.ended:
		return nil
	case <-time.After(buildkitStop):
		_ = d.cmd.Process.Kill()
		<-d.ended
		return errors.New("buildkitd did not end by itself and was killed")
	}
}
