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
	// maxTimeouts is how many answers in a row may be late before the daemon
	// counts as not answering. A refused connection counts at once.
	maxTimeouts = 3
	// maxReason bounds what goes into a report, in bytes.
	maxReason = 512
)

// daemon is the buildkitd that the agent stands for.
type daemon struct {
	addr   address.Address
	client *client.Client
	timing timing
	log    *slog.Logger
	// managed supervises it; nil: others do.
	managed *managed.Daemon
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
	return &daemon{addr: addr, client: c, timing: timing, log: log}, nil
}

func (d *daemon) close() { _ = d.client.Close() } // the process is done with it

// version asks buildkitd for its version, and so whether it answers.
func (d *daemon) version(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timing.checkWithin)
	defer cancel()
	info, err := d.client.Info(ctx)
	switch {
	case status.Code(err) == codes.Unimplemented:
		return "v0.10.0", nil // Info is since v0.11
	case err != nil:
		return "", fmt.Errorf("buildkitd at %s does not answer: %w", d.addr, err)
	}
	return info.BuildkitVersion.Version, nil
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
	late := 0
	up := true
	for d.pause(ctx) {
		err := d.check(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			late = 0
			if !up {
				d.log.Info("buildkitd answers again", "buildkit", d.addr.String())
			}
			up = true
			s.setUnavailable("")
			continue
		case isTimeout(err):
			if late++; late < maxTimeouts {
				continue
			}
		}
		if up {
			d.log.Warn("buildkitd stopped answering", "error", err)
		}
		up = false
		s.setUnavailable(clip(err.Error()))
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
// has something to tell, and tells whether ctx let it.
func (d *daemon) pause(ctx context.Context) bool {
	var told <-chan struct{}
	if d.managed != nil {
		_, told = d.managed.Failure()
	}
	t := time.NewTimer(d.timing.checkEvery)
	defer t.Stop()
	select {
	case <-t.C:
	case <-told:
	case <-ctx.Done():
		return false
	}
	return true
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded
}

// clip keeps what goes over the wire small.
func clip(s string) string {
	if len(s) <= maxReason {
		return s
	}
	return strings.ToValidUTF8(s[:maxReason], "") + "…"
}
