// Command buildkitd is a farm under the name of the daemon that it stands for, so that test suites which
// start a buildkitd from PATH meet a coordinator with real buildkitds behind it. It takes buildkitd's own
// arguments: they go to the real daemons, except for the address, which is the coordinator's, and the
// folder, of which each part gets one of its own.
//
// ARCHFARM_CONFORMANCE_BUILDKITD names the real buildkitd, ARCHFARM_CONFORMANCE_ARCHFARM the archfarm to
// test. ARCHFARM_CONFORMANCE_WORKERS is how many workers there are, 2 by default: the second one poses as
// another architecture, as far as builds without RUN steps can tell. ARCHFARM_CONFORMANCE_SLOTS is how many
// slots each has.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	startWithin = 14 * time.Second // the suites give a buildkitd 15 s
	killAfter   = 10 * time.Second
	poll        = 10 * time.Millisecond
	// manySlots are what an unbounded buildkitd compares to.
	manySlots = "64"
)

func main() {
	runtime.LockOSThread() // the parts are told to die with the thread that started them
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "buildkitd (archfarm):", err)
		os.Exit(1)
	}
}

// farm is a coordinator and its workers, as processes.
type farm struct {
	arguments
	buildkitd, archfarm string
	environment         []string
	ended               chan error // of the first process that ended by itself
	running             []process
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

func run(ctx context.Context, args []string) error {
	buildkitd := os.Getenv("ARCHFARM_CONFORMANCE_BUILDKITD")
	parsed := parse(args)
	if parsed.address == "" || parsed.root == "" { // --version, --help
		cmd := exec.CommandContext(ctx, buildkitd, args...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		return cmd.Run()
	}
	f := &farm{arguments: parsed, buildkitd: buildkitd, archfarm: os.Getenv("ARCHFARM_CONFORMANCE_ARCHFARM"), ended: make(chan error, 1)}
	defer f.stop()
	workers := 2
	if n, err := strconv.Atoi(os.Getenv("ARCHFARM_CONFORMANCE_WORKERS")); err == nil && n > 0 {
		workers = n
	}
	if err := f.start(ctx, workers); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return nil
	case err := <-f.ended:
		return fmt.Errorf("a part of the farm ended by itself: %w", err)
	}
}

// arguments are buildkitd's, as far as they concern the farm.
type arguments struct {
	address, root, config string
	rest                  []string
}

func parse(args []string) arguments {
	var out arguments
	known := map[string]*string{"--addr": &out.address, "--root": &out.root, "--config": &out.config}
	for i := 0; i < len(args); i++ {
		name, value, inline := strings.Cut(args[i], "=")
		into, ok := known[name]
		switch {
		case !ok:
			out.rest = append(out.rest, args[i])
		case inline:
			*into = value
		case i+1 < len(args):
			i++
			*into = args[i]
		}
	}
	return out
}

func (f *farm) start(ctx context.Context, workers int) error {
	ctx, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	config := ""
	if f.config != "" {
		raw, err := os.ReadFile(f.config)
		if err != nil {
			return err
		}
		config = string(raw)
	}
	// The suite waits for the address to appear: it gets its name once the workers are there.
	door := filepath.Join(f.root, "farm.sock")
	f.environment = environ(coordinatorSettings(config)...)
	if err := f.process(f.archfarm, "coordinator", "--listen", "unix://"+door, "--data-dir", filepath.Join(f.root, "coordinator"),
		"--http=", "--gossip=", "--drain-timeout=1s"); err != nil {
		return err
	}
	for i := range workers {
		if err := f.worker(i, config, door); err != nil {
			return err
		}
	}
	if err := f.attached(ctx, door, workers); err != nil {
		return err
	}
	return os.Symlink(door, strings.TrimPrefix(f.address, "unix://"))
}

// slots of each worker; few show what a queue does to the suites.
func slots() string {
	if n := os.Getenv("ARCHFARM_CONFORMANCE_SLOTS"); n != "" {
		return n
	}
	return manySlots
}

// worker starts a buildkitd and its agent.
func (f *farm) worker(i int, config, door string) error {
	dir := filepath.Join(f.root, "worker-"+strconv.Itoa(i))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	own := filepath.Join(dir, "buildkitd.toml")
	if err := os.WriteFile(own, []byte(daemonConfig(config, dir)), 0o600); err != nil {
		return err
	}
	socket := "unix://" + filepath.Join(dir, "buildkitd.sock")
	args := append([]string{"--addr", socket, "--root", filepath.Join(dir, "root"), "--config", own}, f.rest...)
	if err := f.process(f.buildkitd, args...); err != nil {
		return err
	}
	agent := []string{"worker", "--name", "worker-" + strconv.Itoa(i), "--buildkit", socket, "--coordinator", "unix://" + door, "--slots", slots(), "--worker-drain-timeout=1s", "--data-dir", filepath.Join(dir, "agent")}
	if i > 0 {
		agent = append(agent, "--platform", "linux/arm64")
	}
	return f.process(f.archfarm, agent...)
}

var (
	tracing = regexp.MustCompile(`(?m)^(\s*socketPath\s*=\s*).*$`)
	entries = regexp.MustCompile(`(?m)^\s*maxEntries\s*=\s*(\d+)`)
)

// daemonConfig gives each daemon a socket of its own where they all would listen.
func daemonConfig(config, dir string) string {
	return tracing.ReplaceAllString(config, "${1}"+strconv.Quote(filepath.Join(dir, "otel.sock")))
}

// coordinatorSettings are those of buildkitd that the coordinator has too, as its environment.
func coordinatorSettings(config string) []string {
	if m := entries.FindStringSubmatch(config); m != nil {
		return []string{"ARCHFARM_HISTORY_MAX_ENTRIES=" + m[1]}
	}
	return nil
}

// attached waits until every worker takes builds.
func (f *farm) attached(ctx context.Context, door string, workers int) error {
	conn, err := grpc.NewClient("unix://"+door, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := archfarmv1.NewFleetServiceClient(conn)
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		list, err := client.ListWorkers(ctx, &archfarmv1.ListWorkersRequest{}, grpc.WaitForReady(true))
		ready := 0
		for _, w := range list.GetWorkers() {
			if w.GetState() == archfarmv1.Worker_STATE_READY {
				ready++
			}
		}
		if ready == workers {
			return nil
		}
		select {
		case <-tick.C:
		case err := <-f.ended:
			return err
		case <-ctx.Done():
			return fmt.Errorf("%d of %d workers are ready after %s: %w", ready, workers, startWithin, errors.Join(err, ctx.Err()))
		}
	}
}

// process starts a part of the farm. It must be called on the main thread, with which the part dies.
func (f *farm) process(program string, args ...string) error {
	cmd := exec.Command(program, args...) //nolint:gosec // the test run's own choice
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Env = f.environment
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", program, err)
	}
	p := process{cmd: cmd, done: make(chan struct{})}
	f.running = append(f.running, p)
	go func() { // ends with the process
		defer close(p.done)
		err := cmd.Wait()
		select {
		case f.ended <- fmt.Errorf("%s: %w", program, errors.Join(err, errEnded)):
		default:
		}
	}()
	return nil
}

var errEnded = errors.New("it has ended")

// stop ends the parts: the agents drain while the coordinator does, the daemons have nothing to do by then.
func (f *farm) stop() {
	for _, p := range f.running {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
	}
	for _, p := range f.running {
		killer := time.AfterFunc(killAfter, func() { _ = p.cmd.Process.Kill() })
		<-p.done
		killer.Stop()
	}
}

// environ is this process's environment without what only one daemon could use, and with more.
func environ(more ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "BUILDKITD_DEBUGADDR=") })
	return append(env, more...)
}
