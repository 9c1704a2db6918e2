package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/worker/managed"
	"github.com/moby/buildkit/client"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// moments are the parts that the patience with an answer is counted in.
	moments = 8
	// maxReason bounds what goes into a report, in bytes.
	maxReason = 512
)

// errLate: the daemon is frozen, or as good as that.
var errLate = errors.New("it is frozen, or the machine is overloaded")

// daemon is the buildkitd that the agent stands for.
type daemon struct {
	addr   address.Address
	client *client.Client
	timing timing
	log    *slog.Logger
	// managed supervises it; nil: others do.
	managed *managed.Daemon
	// doubts has watch check at once; each is closed when s knows.
	doubts chan chan struct{}
}

// manage starts the buildkitd that the agent is to run, if it is to, and makes c
// that of an agent beside it.
func (c *Config) manage(ctx context.Context) (*managed.Daemon, error) {
	if c.Managed == nil {
		return nil, nil
	}
	d, err := managed.Start(ctx, managed.Config{Program: c.Managed.Program, Args: c.Managed.Args, Dir: c.DataDir, Logger: c.Logger})
	if err != nil {
		return nil, err
	}
	c.BuildKit, c.BuildKitRoot = d.Addr(), d.Root()
	return d, nil
}

// usable says what is wrong with a buildkitd of that version; a version that is
// not known, that of a developer's build, is taken.
func usable(version string) error {
	v, known := managed.ParseVersion(version)
	if known && v.Before(managed.ForCoordinator) {
		return fmt.Errorf("buildkitd is %s, and %s is the oldest that a coordinator can use", version, managed.ForCoordinator)
	}
	return nil
}

// newDaemon does not connect yet.
func newDaemon(ctx context.Context, addr address.Address, timing timing, log *slog.Logger) (*daemon, error) {
	// The target is not resolved: the dialer knows where to go.
	c, err := client.New(ctx, "tcp://buildkitd",
		client.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return addr.Dial(ctx) }),
		// gRPC's own backoff grows to two minutes, and as long would a daemon that is
		// back count as gone.
		client.WithGRPCDialOption(grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: timing.checkWithin,
		})))
	if err != nil {
		return nil, fmt.Errorf("making a client of buildkitd at %s: %w", addr, err)
	}
	return &daemon{addr: addr, client: c, timing: timing, log: log, doubts: make(chan chan struct{})}, nil
}

func (d *daemon) close() { _ = d.client.Close() } // the process is done with it

// version asks buildkitd for its version, and so whether it answers.
func (d *daemon) version(ctx context.Context) (string, error) {
	ctx, stop := patient(ctx, d.timing.checkWithin)
	defer stop()
	info, err := d.client.Info(ctx)
	switch {
	case status.Code(err) == codes.Unimplemented:
		return "v0.10.0", nil // Info is since v0.11
	case err != nil && errors.Is(context.Cause(ctx), errLate):
		return "", fmt.Errorf("buildkitd at %s has not answered for %s: %w", d.addr, d.timing.checkWithin, errLate)
	case err != nil:
		return "", fmt.Errorf("buildkitd at %s does not answer: %w", d.addr, err)
	}
	return info.BuildkitVersion.Version, nil
}

// patient is a context that ends of errLate after that time. It is counted in moments,
// each of which begins when this process has seen the one before end: while the agent
// itself does not get to run, because the machine sleeps or is overloaded, the daemon
// need not answer either.
func patient(ctx context.Context, within time.Duration) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() { // ends with ctx
		moment := time.NewTimer(within / moments)
		defer moment.Stop()
		for range moments {
			select {
			case <-moment.C:
				moment.Reset(within / moments)
			case <-ctx.Done():
				return
			}
		}
		cancel(errLate)
	}()
	return ctx, func() { cancel(nil) }
}

// await returns buildkitd's version once it answers, or ctx's error.
func (d *daemon) await(ctx context.Context) (string, error) {
	wait := newRetry()
	for {
		version, err := d.version(ctx)
		if err == nil {
			d.log.Info("buildkitd answers", "buildkit", d.addr.String(), "version", version)
			return version, nil
		}
		pause := wait.next()
		d.log.Warn("waiting for buildkitd", "error", err, "in", pause)
		if !sleep(ctx, pause) {
			return "", ctx.Err()
		}
	}
}

// watch keeps s informed of whether buildkitd answers, until ctx ends.
func (d *daemon) watch(ctx context.Context, s *slots) {
	up := true
	for {
		doubt, ok := d.pause(ctx)
		if !ok {
			return
		}
		err := d.check(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			if !up {
				d.log.Info("buildkitd answers again", "buildkit", d.addr.String())
			}
			s.setUnavailable("")
		default:
			if up {
				d.log.Warn("buildkitd stopped answering", "error", err)
			}
			s.setUnavailable(clip(err.Error()))
		}
		up = err == nil
		if doubt != nil {
			close(doubt)
		}
	}
}

// doubt returns once it is known anew whether buildkitd answers, when ctx ends, or
// after as long as an answer may take.
func (d *daemon) doubt(ctx context.Context) {
	ctx, stop := patient(ctx, d.timing.checkWithin)
	defer stop()
	known := make(chan struct{})
	select {
	case d.doubts <- known:
	case <-ctx.Done():
		return
	}
	select {
	case <-known:
	case <-ctx.Done():
	}
}

// check says why buildkitd does not run, or does not answer.
func (d *daemon) check(ctx context.Context) error {
	if d.managed != nil {
		if why, _ := d.managed.Failure(); why != "" {
			return errors.New(why)
		}
	}
	_, err := d.version(ctx)
	return err
}

// pause waits for the next time to check, which is at once when the supervisor
// has something to tell or somebody, who is to be told, doubts, and tells whether
// ctx let it.
func (d *daemon) pause(ctx context.Context) (doubt chan struct{}, ok bool) {
	var told <-chan struct{}
	if d.managed != nil {
		_, told = d.managed.Failure()
	}
	t := time.NewTimer(d.timing.checkEvery)
	defer t.Stop()
	select {
	case <-t.C:
	case <-told:
	case doubt = <-d.doubts:
	case <-ctx.Done():
		return nil, false
	}
	return doubt, true
}

// clip keeps what goes over the wire small.
func clip(s string) string {
	if len(s) <= maxReason {
		return s
	}
	return strings.ToValidUTF8(s[:maxReason], "") + "…"
}
