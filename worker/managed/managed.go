// Package managed starts and supervises the buildkitd of a worker that has none of
// its own: on a private socket, with a configuration made for the machine's disk.
//
// A buildkitd that ends by itself is started again, ever more slowly while it does
// so again and again. What it ran is lost; its cache is not.
package managed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/archfarm/archfarm/address"
)

// timing is the patience with buildkitd.
type timing struct {
	// firstPause and lastPause bound the time before a buildkitd that has ended is
	// started again; it doubles each time.
	firstPause, lastPause time.Duration
	// soundAfter is how long a buildkitd has run that starts at firstPause again.
	soundAfter time.Duration
	// stopWithin is how long a buildkitd may take to end when it is told to. It has
	// nothing to do by then.
	stopWithin time.Duration
}

var usual = timing{firstPause: 500 * time.Millisecond, lastPause: 30 * time.Second, soundAfter: time.Minute, stopWithin: 10 * time.Second}

const (
	// outputWithin is how long its output may be held open by something else.
	outputWithin = 2 * time.Second
	// maxSocket is the longest path of a unix socket that every system accepts.
	maxSocket = 103
)

// Config says what to start.
type Config struct {
	// Program is buildkitd, by path or by name in PATH.
	Program string
	// Args are further arguments for it: "--config", FILE replaces the generated
	// configuration. Where it keeps its state, and that it listens on its socket, is
	// not for them to say.
	Args []string
	// Dir holds socket, configuration and state. It is made, for its owner only.
	Dir string
	// Logger gets what happens, and what buildkitd logs; nil discards it.
	Logger *slog.Logger
}

// Daemon is a supervised buildkitd.
type Daemon struct {
	program  string
	args     []string
	dir      string
	log      *slog.Logger
	timing   timing
	output   *output
	stopping chan struct{} // closed by Close
	ended    chan struct{} // closed at the end of supervise
	stop     sync.Once
	unclean  error // that it had to be killed; read after ended

	mu      sync.Mutex
	failure string
	changed chan struct{} // closed, and replaced, when failure changes
}

// Start checks buildkitd's version, writes its configuration and starts it. That
// it answers is for the caller to find out. It fails if there is no buildkitd, or
// one that is too old, or the folder cannot be used; a buildkitd that ends by
// itself is no error of Start. Whoever started it calls Close.
func Start(ctx context.Context, cfg Config) (*Daemon, error) { return start(ctx, cfg, usual) }

func start(ctx context.Context, cfg Config, timing timing) (*Daemon, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	program, err := exec.LookPath(cfg.Program)
	if err != nil {
		return nil, fmt.Errorf("finding buildkitd: %w; install BuildKit or name it with --buildkitd", err)
	}
	version, err := checkVersion(ctx, program)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("the folder for buildkitd: %w", err)
	}
	d := &Daemon{
		program: program, dir: dir, log: cfg.Logger, timing: timing, output: newOutput(cfg.Logger),
		stopping: make(chan struct{}), ended: make(chan struct{}), changed: make(chan struct{}),
	}
	if err := d.prepare(); err != nil {
		return nil, err
	}
	// The places are flags too, the last ones: they hold with another configuration.
	d.args = slices.Concat([]string{"--config", d.path(configFile)}, cfg.Args,
		[]string{"--root", d.Root(), "--addr", d.Addr().String(), "--otel-socket-path", d.path("otel.sock")})
	d.log.Info("starting buildkitd", "program", program, "version", version, "folder", dir)
	go d.supervise() //nolint:contextcheck // it lives until Close, and not as long as Start's context
	return d, nil
}

// prepare makes the folder with the configuration in it.
func (d *Daemon) prepare() error {
	if socket := d.Addr().Addr; len(socket) > maxSocket {
		return fmt.Errorf("the socket %s has a path of %d characters, and at most %d are possible: use a shorter --data-dir", socket, len(socket), maxSocket)
	}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return fmt.Errorf("making the folder for buildkitd: %w", err)
	}
	if dir, err := filepath.EvalSymlinks(d.dir); err == nil {
		d.dir = dir // as runc and the kernel name it, see clear
	}
	// It may have been there, and the socket in it gives root to whoever reaches it.
	if err := os.Chmod(d.dir, 0o700); err != nil { //nolint:gosec // a folder needs the x
		return fmt.Errorf("making the folder for buildkitd private: %w", err)
	}
	if err := os.WriteFile(d.path(configFile), []byte(d.config()), 0o600); err != nil {
		return fmt.Errorf("writing buildkitd's configuration: %w", err)
	}
	return nil
}

func (d *Daemon) path(name string) string { return filepath.Join(d.dir, name) }

// Addr is where buildkitd listens while it runs.
func (d *Daemon) Addr() address.Address {
	return address.Address{Network: "unix", Addr: d.path("buildkitd.sock")}
}

// Root is the folder of buildkitd's state.
func (d *Daemon) Root() string { return d.path("buildkit") }

// Failure is why buildkitd does not run, empty while it does, and a channel that
// is closed when that has changed.
func (d *Daemon) Failure() (why string, changed <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.failure, d.changed
}

func (d *Daemon) setFailure(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failure != why {
		d.failure = why
		close(d.changed)
		d.changed = make(chan struct{})
	}
}

// Close ends buildkitd, with force if it does not end within 10 s, which is an
// error, and returns when it has ended.
func (d *Daemon) Close() error {
	d.stop.Do(func() { close(d.stopping) })
	<-d.ended
	return d.unclean
}

// supervise runs buildkitd again and again until Close.
func (d *Daemon) supervise() {
	// The kernel takes a child's parent for dead when the thread that started it
	// ends (prctl(2), PR_SET_PDEATHSIG). So this thread is kept, and ends with the
	// goroutine.
	runtime.LockOSThread()
	defer close(d.ended)
	pause := d.timing.firstPause
	for {
		begun := time.Now()
		err := d.run()
		if err == nil {
			return
		}
		if time.Since(begun) >= d.timing.soundAfter {
			pause = d.timing.firstPause
		}
		wait := pause/2 + rand.N(pause/2+1)
		pause = min(2*pause, d.timing.lastPause)
		d.log.Error("buildkitd does not run: starting it again", "error", err, "in", wait)
		d.setFailure(err.Error())
		select {
		case <-time.After(wait):
		case <-d.stopping:
			return
		}
	}
}

// run starts buildkitd and waits for its end. Nil: it was told to end.
func (d *Daemon) run() error {
	if err := d.clear(); err != nil {
		return err
	}
	d.output.begin()
	cmd := exec.Command(d.program, d.args...) //nolint:gosec // the operator's own choice
	cmd.Stdout, cmd.Stderr = d.output, d.output
	cmd.Env = slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "NOTIFY_SOCKET=") }) // it is the agent's
	cmd.WaitDelay = outputWithin
	cmd.SysProcAttr = apart()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting buildkitd: %w", err)
	}
	d.setFailure("")
	exited := make(chan struct{})
	var err error
	go func() { // ends with the process
		defer close(exited)
		err = cmd.Wait()
	}()
	select {
	case <-exited:
		return d.output.explain(err)
	case <-d.stopping:
	}
	d.end(cmd.Process, exited)
	return nil
}

// end tells buildkitd to end, and makes it.
func (d *Daemon) end(p *os.Process, exited <-chan struct{}) {
	_ = p.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-exited:
		d.log.Info("buildkitd has ended")
		return
	case <-time.After(d.timing.stopWithin):
	}
	d.log.Warn("buildkitd does not end by itself: killing it", "after", d.timing.stopWithin)
	kill(p)
	<-exited
	d.unclean = errors.New("buildkitd did not end by itself and was killed")
	if err := d.clear(); err != nil {
		d.log.Warn("clearing up after buildkitd", "error", err)
	}
}
