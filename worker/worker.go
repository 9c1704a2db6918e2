// Package worker is the agent: it stands beside a buildkitd and offers it to the
// farm.
//
// The agent always dials. To every coordinator that it is told of, or that
// gossip names, it keeps one Attach stream, on which it reports what the worker
// is and has room for. When a coordinator asks for a connection to buildkitd,
// the agent dials the coordinator once more (package tunnel) and joins that
// connection to one to buildkitd. buildkitd itself listens where nobody but the
// agent reaches it.
//
// The agent owns the worker's slots: it grants one for as long as the connection
// lasts that was opened for it, so that no coordinator can forget one, and two
// cannot book the same.
package worker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/gossip"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// closeWithin bounds how long leaving the gossip may take.
const closeWithin = 5 * time.Second

// timing are the agent's patience and pace.
type timing struct {
	// checkEvery is the time between two questions to buildkitd.
	checkEvery time.Duration
	// checkWithin is how long an answer may take. A daemon that builds with all
	// cores is slow, not gone.
	checkWithin time.Duration
	// welcomeWithin bounds the time from a connection to the Welcome.
	welcomeWithin time.Duration
	// orphanAfter is how long the connections of a coordinator outlive its stream
	// if the stream does not come back. A coordinator that lives closes them by
	// itself; one whose machine is gone would keep its slots until TCP gives up,
	// which takes a quarter of an hour.
	orphanAfter time.Duration
}

var usual = timing{
	checkEvery:    3 * time.Second,
	checkWithin:   5 * time.Second,
	welcomeWithin: 10 * time.Second,
	orphanAfter:   2 * time.Minute,
}

// agent is what everything of one Run shares.
type agent struct {
	cfg      Config
	timing   timing
	slots    *slots
	buildkit *daemon
	hello    *archfarmv1.Hello // without its report
	tunnels  tunnels
}

// Run offers the worker to the farm until ctx is cancelled. It first waits until
// buildkitd answers.
//
// When ctx is cancelled it drains: nothing new is taken, what runs may end
// within Config.DrainTimeout. When Config.Stop is closed it does not wait. It
// returns when all its goroutines have ended: nil after a stop that was asked
// for and cut nothing off, an error if attempts still ran, the configuration is
// wrong, or gossip cannot start.
func Run(ctx context.Context, cfg Config) error {
	return run(ctx, cfg, usual)
}

func run(ctx context.Context, cfg Config, timing timing) error {
	coordinators, err := cfg.validate()
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	platforms, machine, err := cfg.platforms()
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}

	// While it drains, the agent works on although ctx is cancelled already.
	life, end := context.WithCancelCause(context.WithoutCancel(ctx))
	slots := newSlots(cfg.Slots)
	var owned sync.WaitGroup
	defer owned.Wait()
	defer end(nil)
	owned.Go(func() {
		select {
		case <-cfg.Stop:
			end(slots.cutOff())
		case <-life.Done():
		}
	})

	buildkit, err := newDaemon(life, cfg.BuildKit, timing, cfg.Logger)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	defer buildkit.close()
	a := &agent{cfg: cfg, timing: timing, slots: slots, buildkit: buildkit, hello: &archfarmv1.Hello{
		Name: cfg.Name, Platforms: platforms, Version: cfg.Version, Machine: machine,
	}}

	// Until it is attached there is nothing to drain: either end will do.
	starting, giveUp := context.WithCancel(ctx)
	defer giveUp()
	defer context.AfterFunc(life, giveUp)()
	if a.hello.BuildkitVersion, err = buildkit.await(starting); err != nil {
		return nil // only because it was told to stop
	}
	node, err := a.startGossip(starting)
	if err != nil {
		return err
	}
	if node != nil {
		defer a.stopGossip(life, node)
	}
	cfg.Logger.Info("offering this worker to the farm", "worker", cfg.Name,
		"platforms", platforms, "slots", cfg.Slots, "machine", machine)
	return a.serve(ctx, life, end, newAttachments(a, coordinators, node))
}

// serve works until ctx or life ends, drains, and waits for everything. The
// first cause that is given to end tells whether attempts were cut off.
func (a *agent) serve(ctx, life context.Context, end context.CancelCauseFunc, attachments *attachments) error {
	var tasks sync.WaitGroup
	tasks.Go(func() { a.buildkit.watch(life, a.slots) })
	tasks.Go(func() { attachments.run(life) })

	select {
	case <-ctx.Done():
		end(a.drain(life))
	case <-life.Done():
	}
	tasks.Wait()
	a.tunnels.wait()
	a.cfg.Logger.Info("stopped", "worker", a.cfg.Name)
	var cut cutOffError
	if errors.As(context.Cause(life), &cut) {
		return fmt.Errorf("worker %s: %w", a.cfg.Name, cut)
	}
	return nil
}

// drain takes nothing new and waits for the slots to be free, for as long as the
// configuration allows and life lasts. It returns an error if time ran out.
func (a *agent) drain(life context.Context) error {
	a.slots.drain()
	report, _ := a.slots.report()
	a.cfg.Logger.Info("draining: nothing new is taken", "running", report.GetSlots().GetUsed(), "at_most", a.cfg.DrainTimeout)
	timeout := time.NewTimer(a.cfg.DrainTimeout)
	defer timeout.Stop()
	for {
		idle, changed := a.slots.idle()
		if idle {
			return nil
		}
		select {
		case <-changed:
		case <-life.Done():
			return nil // whoever ended it has told why
		case <-timeout.C:
			a.cfg.Logger.Warn("draining took too long; closing what still runs")
			return a.slots.cutOff()
		}
	}
}

// startGossip returns nil if gossip is not configured.
func (a *agent) startGossip(ctx context.Context) (*gossip.Node, error) {
	g := a.cfg.Gossip
	if g.Bind == "" {
		return nil, nil
	}
	node, err := gossip.Start(ctx, gossip.Config{
		Name: a.cfg.Name, Role: gossip.Worker,
		Bind: g.Bind, Advertise: g.Advertise, Join: g.Join, Key: g.Key,
		Logger: a.cfg.Logger,
	})
	if err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	a.cfg.Logger.Info("gossiping", "address", node.Addr(), "seeds", g.Join)
	return node, nil
}

// stopGossip runs when everything else has ended, and with it life.
func (a *agent) stopGossip(life context.Context, node *gossip.Node) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(life), closeWithin)
	defer cancel()
	if err := node.Close(ctx); err != nil {
		a.cfg.Logger.Warn("leaving the farm's gossip", "error", err)
	}
}

// coordinatorFinder is what the agent wants of gossip.
type coordinatorFinder interface {
	Coordinators() []string
	Changed() <-chan struct{}
}

var _ coordinatorFinder = (*gossip.Node)(nil)

// newAttachments takes care that a nil node is a nil finder.
func newAttachments(a *agent, configured []address.Address, node *gossip.Node) *attachments {
	s := &attachments{agent: a, configured: configured, links: map[address.Address]*link{}, peers: map[string]*link{}}
	if node != nil {
		s.finder = node
	}
	return s
}
