package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/archfarm/archfarm/gossip"
)

// coordinatorFinder is what the agent wants of gossip.
type coordinatorFinder interface {
	Coordinators() []string
	Changed() <-chan struct{}
}

var _ coordinatorFinder = (*gossiper)(nil)

// gossiper is the agent's part in the farm's gossip. Coordinators that the agent
// is attached to give it their keys, each its own: while keys are rotated they may
// be at different steps, and the agent has to understand all of them.
type gossiper struct {
	cfg     Config
	changed chan struct{}
	ending  chan struct{}
	relay   sync.WaitGroup // of the node's changes; ends with ending

	mu    sync.Mutex
	given map[*link]gossip.Keyring // by the coordinators that are attached
	ring  gossip.Keyring           // in use
	node  *gossip.Node             // nil: not configured, or not started yet
	ended bool
}

// startGossip begins to gossip if that is configured and a key is known: one that
// a coordinator gave formerly, or the configured one. An agent that has a
// certificate and no key waits for what the first coordinator gives it, if it was
// told of one.
func (a *agent) startGossip(ctx context.Context) (*gossiper, error) {
	g := &gossiper{cfg: a.cfg, changed: make(chan struct{}, 1), ending: make(chan struct{}), given: map[*link]gossip.Keyring{}}
	if a.cfg.Gossip.Bind == "" {
		return g, nil
	}
	var err error
	if g.ring, err = g.known(); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	if len(g.ring) == 0 && a.cfg.Credentials != nil && len(a.cfg.Coordinators) > 0 {
		a.cfg.Logger.Info("gossip begins when a coordinator has given its keys")
		return g, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.start(ctx, g.ring); err != nil {
		return nil, fmt.Errorf("worker: %w", err)
	}
	return g, nil
}

// known returns the keys that were kept, and the configured one behind them: who
// knows which of them is the farm's by now.
func (g *gossiper) known() (gossip.Keyring, error) {
	var ring gossip.Keyring
	var err error
	if g.cfg.DataDir != "" {
		if ring, err = gossip.LoadKeyring(g.path()); err != nil {
			return nil, err
		}
	}
	if key := g.cfg.Gossip.Key; len(key) > 0 {
		if more, err := ring.Install(key); err == nil || !errors.Is(err, gossip.ErrKeyringFull) {
			return more, err
		}
	}
	return ring, nil
}

func (g *gossiper) path() string { return filepath.Join(g.cfg.DataDir, "gossip.keyring") }

// start makes the node. g.mu is held.
func (g *gossiper) start(ctx context.Context, ring gossip.Keyring) error {
	c := g.cfg.Gossip
	node, err := gossip.Start(ctx, gossip.Config{
		Name: g.cfg.Name, Role: gossip.Worker,
		Bind: c.Bind, Advertise: c.Advertise, Join: c.Join, Keys: ring,
		Logger: g.cfg.Logger,
	})
	if err != nil {
		return err
	}
	g.node = node
	g.relay.Go(func() {
		for {
			select {
			case <-node.Changed():
				g.notify()
			case <-g.ending:
				return
			}
		}
	})
	g.cfg.Logger.Info("gossiping", "address", node.Addr(), "seeds", c.Join, "encrypted", len(ring) > 0)
	return nil
}

// welcome takes what a coordinator that the agent has attached to gives: nothing,
// if its gossip is not encrypted. Forget must be called when its stream has ended.
// Builds do not depend on it: what goes wrong is logged.
func (g *gossiper) welcome(ctx context.Context, from *link, keys [][]byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.adopt(ctx, from, keys); err != nil {
		from.log.Error("this worker does not gossip with the coordinator's keys", "error", err)
	}
}

// direct takes other keys of an attached coordinator, all or nothing. It refuses
// them as long as another coordinator would not understand that one any more.
func (g *gossiper) direct(ctx context.Context, from *link, keys [][]byte) error {
	if len(keys) == 0 {
		return errors.New("there is no key in the keyring")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for other, ring := range g.given {
		if other != from && gossip.Parts(g.given[from], keys, ring) {
			return fmt.Errorf("the coordinator at %s, to which it is attached too, would not be understood, or not understand: change its keys to the same step first", other.addr)
		}
	}
	return g.adopt(ctx, from, keys)
}

// adopt keeps and uses a coordinator's keys, together with those of the others.
// g.mu is held.
func (g *gossiper) adopt(ctx context.Context, from *link, keys gossip.Keyring) error {
	if err := keys.Validate(); err != nil {
		return fmt.Errorf("the coordinator's gossip keys: %w", err)
	}
	if g.ended {
		return nil
	}
	next := g.ring
	if len(keys) > 0 {
		next = gossip.Merge(keys, g.others(from)...)
	}
	if err := g.use(ctx, next); err != nil {
		return err
	}
	g.ring = next
	if len(keys) > 0 {
		g.given[from] = keys
	}
	return nil
}

func (g *gossiper) others(from *link) []gossip.Keyring {
	var out []gossip.Keyring
	for other, ring := range g.given {
		if other != from {
			out = append(out, ring)
		}
	}
	return out
}

// use gossips with a ring, which is kept first. g.mu is held.
func (g *gossiper) use(ctx context.Context, ring gossip.Keyring) error {
	if g.cfg.Gossip.Bind == "" {
		return nil // there is nothing that it would not understand
	}
	if g.cfg.DataDir != "" && !ring.Equal(g.ring) {
		if err := os.MkdirAll(g.cfg.DataDir, 0o700); err != nil {
			return fmt.Errorf("making the data folder: %w", err)
		}
		if err := gossip.StoreKeyring(g.path(), ring); err != nil {
			return err
		}
	}
	if g.node == nil {
		return g.start(ctx, ring)
	}
	return g.node.SetKeyring(ring)
}

// forget lets go of a coordinator whose stream has ended. Its keys stay in use until
// another gives some.
func (g *gossiper) forget(from *link) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.given, from)
}

// Coordinators returns those that gossip knows, see gossip.Node.
func (g *gossiper) Coordinators() []string {
	g.mu.Lock()
	node := g.node
	g.mu.Unlock()
	if node == nil {
		return nil
	}
	return node.Coordinators()
}

// Changed receives after Coordinators may have changed.
func (g *gossiper) Changed() <-chan struct{} { return g.changed }

func (g *gossiper) notify() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// stop runs when everything else has ended, and with it life.
func (g *gossiper) stop(life context.Context) {
	g.mu.Lock()
	node := g.node
	g.ended = true
	g.mu.Unlock()
	close(g.ending)
	g.relay.Wait()
	if node == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(life), closeWithin)
	defer cancel()
	if err := node.Close(ctx); err != nil {
		g.cfg.Logger.Warn("leaving the farm's gossip", "error", err)
	}
}
