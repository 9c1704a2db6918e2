// Command archfarm is a build farm of native machines behind one BuildKit
// endpoint: the coordinator, the agent beside each buildkitd, and the client side.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set when the binary is built.
var version = "dev"

// Exit codes, for scripts.
const (
	exitError = 1
	exitUsage = 2
)

func main() {
	ctx, stop, release := signals()
	defer release()
	root := newRoot(stop)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "archfarm: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		os.Exit(exitUsage)
	}
	os.Exit(exitError)
}

// signals turns the first SIGINT or SIGTERM into the end of the context, which
// drains, and the second into a closed channel, which stops at once.
func signals() (ctx context.Context, stop <-chan struct{}, release func()) {
	ctx, cancel := context.WithCancel(context.Background()) // the root of all
	received, now := make(chan os.Signal, 2), make(chan struct{})
	signal.Notify(received, syscall.SIGINT, syscall.SIGTERM)
	go func() { // lives as long as the process
		<-received
		cancel()
		<-received
		close(now)
	}()
	return ctx, now, func() { signal.Stop(received); cancel() }
}

// usageError is a command line that makes no sense.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func newRoot(stop <-chan struct{}) *cobra.Command {
	root := &cobra.Command{
		Use:   "archfarm",
		Short: "A build farm of native machines behind one BuildKit endpoint",
		Long: `archfarm makes a pile of mixed machines look like one BuildKit. A client asks for
several platforms; each is built on a machine that runs it natively, and the
results become one image index.

Every flag can also be given as an environment variable (--data-dir as
ARCHFARM_DATA_DIR) or in a YAML file named by --config (data-dir: /var/lib/archfarm).
The command line wins over the environment, and that over the file.`,
		Example: `  archfarm up                                     # try it: all on this machine
  docker buildx create --name farm --driver remote tcp://127.0.0.1:8372
  docker buildx build --builder farm --platform linux/amd64,linux/arm64 --push -t registry/app .`,
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := applySources(cmd, os.LookupEnv); err != nil {
				return usageError{err}
			}
			return nil
		},
	}
	root.PersistentFlags().String("config", "", "YAML file with settings, named like the flags")
	root.PersistentFlags().String("log-level", "info", "what to log: debug, info, warn or error")
	root.PersistentFlags().String("log-format", "text", "how to log: text or json")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")}
	})
	root.AddCommand(newCoordinator(stop), newWorker(stop), newUp(stop), newWorkers())
	return root
}
