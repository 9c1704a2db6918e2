package coordinator

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/gossip"
)

// gossip joins the member list, where workers find this coordinator, and has the
// fleet give its keys to the workers.
func (c *coordinator) gossip(ctx context.Context, bound *Bound) (*gossip.Node, error) {
	advertised := c.cfg.advertised(bound.Listen)
	if c.cfg.Gossip == "" || advertised == "" {
		return nil, nil
	}
	ring, err := c.cfg.keyring()
	if err != nil {
		return nil, err
	}
	if len(ring) > 0 && len(c.cfg.GossipKey) > 0 && !ring.Has(c.cfg.GossipKey) {
		c.log.Warn("--gossip-key is not one of the farm's gossip keys any more and is not used; archfarm gossip-key changes them", "keyring", c.cfg.keyringPath())
	}
	node, err := gossip.Start(ctx, gossip.Config{
		Name: c.cfg.Name, Role: gossip.Coordinator, Bind: c.cfg.Gossip, Advertise: c.cfg.GossipAdvertise,
		Join: c.cfg.Join, Keys: ring, Rejected: c.rejectedGossip(), GRPC: advertised, Logger: c.log,
	})
	if err != nil {
		return nil, err
	}
	if len(ring) == 0 {
		c.log.Debug("gossip is not encrypted: it does not leave this machine, or --insecure allows it")
	}
	c.farm.Fleet.KeepKeys(ring, func(next gossip.Keyring) error { return c.cfg.changeKeyring(node, next) })
	bound.Gossip = node.Addr()
	return node, nil
}

// rejectedGossip counts what is sent by who is not of the farm.
func (c *coordinator) rejectedGossip() func(gossip.Reason) {
	counter := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "archfarm_gossip_rejected_packets_total",
		Help: "Gossip that was not taken: of another key, of another program's label, or malformed.",
	}, []string{"reason"})
	for _, r := range []gossip.Reason{gossip.WrongKey, gossip.WrongLabel, gossip.Malformed} {
		counter.WithLabelValues(string(r)) // that none was seen is worth telling, too
	}
	c.metrics.MustRegister(counter)
	return func(r gossip.Reason) { counter.WithLabelValues(string(r)).Inc() }
}

func (c *Config) keyringPath() string { return filepath.Join(c.DataDir, "gossip.keyring") }

// keyring returns the gossip keys to begin with: those that were kept; else the one
// that the operator has configured; else a new one, if others could listen.
func (c *Config) keyring() (gossip.Keyring, error) {
	ring, err := gossip.LoadKeyring(c.keyringPath())
	if err != nil || len(ring) > 0 {
		return ring, err
	}
	switch {
	case len(c.GossipKey) > 0:
		ring = gossip.Keyring{c.GossipKey}
	case c.Insecure || (address.Address{Network: "tcp", Addr: c.Gossip}).Local(): // then workers could not be told one, or need not be
		return nil, nil
	case len(c.Join) > 0:
		return nil, errors.New("gossip: there are members to join, and no key that they understand: copy gossip.keyring from the data folder of another coordinator and name it with --gossip-key-file")
	default:
		ring = gossip.Keyring{gossip.NewKey()}
	}
	if err := gossip.StoreKeyring(c.keyringPath(), ring); err != nil {
		return nil, err
	}
	return ring, nil
}

// changeKeyring keeps a ring and gossips with it, or does neither.
func (c *Config) changeKeyring(node *gossip.Node, next gossip.Keyring) error {
	former := node.Keys()
	if err := gossip.StoreKeyring(c.keyringPath(), next); err != nil {
		return err
	}
	if err := node.SetKeyring(next); err != nil {
		return errors.Join(fmt.Errorf("using the stored gossip keys: %w", err), gossip.StoreKeyring(c.keyringPath(), former))
	}
	return nil
}
