// Command archfarm is a build farm of native machines behind one BuildKit
// endpoint: the coordinator, the agent beside each buildkitd, and the client side.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// version is set when the binary is built.
var version = "dev"

// Exit codes, for scripts.
const (
	exitError = 1
	exitUsage = 2
	// exitTimeout is that --wait has waited in vain.
	exitTimeout = 3
	// exitCancelled is that the job that was watched was cancelled.
	exitCancelled = 4
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
	os.Exit(exitCode(err))
}

func exitCode(err error) int {
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	var late timeoutError
	if errors.As(err, &late) {
		return exitTimeout
	}
	var ended jobError
	if errors.As(err, &ended) && ended.state == archfarmv1.Job_STATE_CANCELLED {
		return exitCancelled
	}
	return exitError
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

// noArgs is cobra.NoArgs with the exit code of a command line that makes no sense.
func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usageError{fmt.Errorf("%q takes no argument %q; see %q", cmd.CommandPath(), args[0], cmd.CommandPath()+" --help")}
	}
	return nil
}

func unknownCommand(root *cobra.Command, name string) error {
	hint := fmt.Sprintf("see %q", root.CommandPath()+" --help")
	if like := root.SuggestionsFor(name); len(like) > 0 {
		hint = "did you mean " + strings.Join(like, " or ") + "?"
	}
	return usageError{fmt.Errorf("there is no command %q; %s", name, hint)}
}

func newRoot(stop <-chan struct{}) *cobra.Command {
	root := &cobra.Command{
		Use:   "archfarm",
		Short: "A build farm of native machines behind one BuildKit endpoint",
		Long: `archfarm makes a pile of mixed machines look like one BuildKit. A client asks for
several platforms; each is built on a machine that runs it natively, and the
results become one image index.

Every flag can also be given as an environment variable (--data-dir as
ARCHFARM_DATA_DIR) or in a YAML file named by --config (data-dir: /var/lib/archfarm).
The command line wins over the environment, and that over the file. The values of a list
are separated by commas in the environment; those that have commas of their own, as
ARCHFARM_SECRET and ARCHFARM_TAG_POLICY, stand on a line each.`,
		Example: `  archfarm up                                     # try it: all on this machine
  docker buildx create --name farm --driver remote tcp://127.0.0.1:8372
  docker buildx build --builder farm --platform linux/amd64,linux/arm64 --push -t registry/app .`,
		Version:       version,
		Args:          cobra.ArbitraryArgs, // RunE tells what it does not know
		SilenceErrors: true,
		SilenceUsage:  true,
		// As many mistyped letters as cobra's own suggestions allow.
		SuggestionsMinimumDistance: 2,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := applySources(cmd, os.LookupEnv); err != nil {
				return usageError{err}
			}
			return nil
		},
	}
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return cmd.Help()
		}
		return unknownCommand(cmd, args[0])
	}
	root.PersistentFlags().String("config", "", "YAML file with settings, named like the flags")
	root.PersistentFlags().String("log-level", "info", "what to log: debug, info, warn or error")
	root.PersistentFlags().String("log-format", "text", "how to log: text or json")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %q", err, cmd.CommandPath()+" --help")}
	})
	root.AddCommand(newCoordinator(stop), newWorker(stop), newUp(stop), newWorkers(), newDrain(), newCordon(), newUncordon(), newQueue(), newExplain(), newToken(), newGossipKey(), newClient(), newClientCert(),
		newSubmit(), newJobs(), newJob(), newWatch(), newLogs(), newCancel(), newRetry(), newBuild(), newTags(), newSecret(), newBackup())
	completeAll(root)
	return root
}
