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
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/native"
)

// closeWithin bounds how long leaving the gossip may take.
const closeWithin = 5 * time.Second

// timing are the agent's patience and pace.
type timing struct {
	// checkEvery is the time between two questions to buildkitd.
	checkEvery time.Duration
	// checkWithin is how long an answer may take. A daemon that builds with all
	// cores is slow, not gone; but with checkEvery it must be less than 10 s, within
	// which the coordinator is to know of one that is frozen.
	checkWithin time.Duration
	// welcomeWithin bounds the time from a connection to the Welcome.
	welcomeWithin time.Duration
	// orphanAfter is how long the connections of a coordinator outlive its stream
	// if the stream does not come back. A coordinator that lives closes them by
	// itself; one whose machine is gone would keep its slots until TCP gives up,
	// which takes a quarter of an hour.
	orphanAfter time.Duration
	// lookEvery is the time between two readings of the machine.
	lookEvery time.Duration
	// pruneEvery is the time between two tries to make room on a full disk.
	pruneEvery time.Duration
	// releaseWithin is how long buildkitd takes to let go of what an attempt used.
	releaseWithin time.Duration
}

var usual = timing{
	checkEvery:    time.Second,
	checkWithin:   8 * time.Second,
	welcomeWithin: 10 * time.Second,
	orphanAfter:   2 * time.Minute,
	lookEvery:     3 * time.Second,
	pruneEvery:    time.Minute,
	releaseWithin: 2 * time.Second,
}

// agent is what everything of one Run shares.
type agent struct {
	cfg       Config
	timing    timing
	slots     *slots
	buildkit  *daemon
	caretaker *caretaker
	gossip    *gossiper
	machine   *machine          // buildkitd's
	hello     *archfarmv1.Hello // without its report
	ordering  sync.Mutex        // held while an operator's order is done and kept
	tunnels   tunnels
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

func run(ctx context.Context, cfg Config, timing timing) (err error) {
	coordinators, err := cfg.validate()
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	told, err := loadOrder(cfg.DataDir)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	own, err := cfg.manage(ctx)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}
	if own != nil {
		defer func() { err = errors.Join(err, own.Close()) }() // last: all else needs it
	}
	platforms, err := native.Parse(cfg.Platforms)
	if err != nil {
		return fmt.Errorf("worker: %w", err)
	}

	// While it drains, the agent works on although ctx is cancelled already.
	life, end := context.WithCancelCause(context.WithoutCancel(ctx))
	slots := newSlots(cfg.Slots)
	slots.obey(told)
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
	buildkit.managed = own
	a := &agent{cfg: cfg, timing: timing, slots: slots, buildkit: buildkit, hello: &archfarmv1.Hello{
		Name: cfg.Name, Version: cfg.Version, Pool: cfg.Pool, Labels: cfg.Labels, InlineConnections: true,
	}}
	a.caretaker = newCaretaker(cfg, slots, buildkit, timing)

	// Until it is attached there is nothing to drain: either end will do.
	starting, giveUp := context.WithCancel(ctx)
	defer giveUp()
	defer context.AfterFunc(life, giveUp)()
	if a.hello.BuildkitVersion, err = buildkit.await(starting); err != nil {
		return nil // only because it was told to stop
	}
	if err := a.announce(starting, platforms); err != nil {
		return notIfStopped(starting, err)
	}
	if a.gossip, err = a.startGossip(starting); err != nil {
		return err
	}
	defer a.gossip.stop(life)
	cfg.Logger.Info("offering this worker to the farm", "worker", cfg.Name,
		"platforms", a.hello.GetPlatforms(), "slots", cfg.Slots, "machine", a.hello.GetMachine())
	return a.serve(ctx, life, end, newAttachments(a, coordinators))
}

// serve works until ctx or life ends, drains, and waits for everything. The
// first cause that is given to end tells whether attempts were cut off.
func (a *agent) serve(ctx, life context.Context, end context.CancelCauseFunc, attachments *attachments) error {
	var tasks sync.WaitGroup
	tasks.Go(func() { a.buildkit.watch(life, a.slots) })
	tasks.Go(func() { a.caretaker.run(life) })
	tasks.Go(func() { a.machine.watchEmulators(life, a.buildkit, a.slots) })
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

func newAttachments(a *agent, configured []address.Address) *attachments {
	return &attachments{
		agent: a, configured: configured, finder: a.gossip, released: make(chan struct{}, 1),
		links: map[address.Address]*link{}, peers: map[string]*link{}, ids: map[*link]string{}, old: map[*link]bool{}, heirs: map[address.Address]time.Time{},
	}
}
