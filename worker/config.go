package worker

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/gossip"
	"github.com/archfarm/archfarm/worker/native"
)

const (
	// maxSlots is beyond what any machine builds at once.
	maxSlots = 1024
	// maxCoordinators bounds what an operator may list.
	maxCoordinators = 64
	// defaultDrain lets a long build end.
	defaultDrain = 10 * time.Minute
)

// Config is all that an agent needs to know.
type Config struct {
	// Name of the worker, unique in the farm: 1 to 128 letters, digits, ".", "_"
	// and "-".
	Name string
	// BuildKit is where the buildkitd listens that this agent stands for.
	BuildKit address.Address
	// Slots is how many attempts run at once, over all coordinators; 1 to 1024.
	Slots int
	// Platforms is the operator's word on what the machine runs natively, such as
	// "linux/arm64"; empty: the machine is looked at.
	Platforms []string
	// Coordinators are dialed whether or not gossip knows them: host:port,
	// tcp://host:port or unix:///path. Each has to lead to one coordinator: behind
	// a load balancer, a connection dialed back may arrive at another one than the
	// one that asked for it.
	Coordinators []string
	// Gossip finds further coordinators.
	Gossip Gossip
	// Version of this program, for others to show.
	Version string
	// DrainTimeout is how long running attempts may take to end after Run's
	// context was cancelled; 0 means 10 minutes.
	DrainTimeout time.Duration
	// Stop, when it is closed, ends Run at once, drained or not. It may be nil.
	Stop <-chan struct{}
	// Logger gets what happens; nil discards it.
	Logger *slog.Logger
}

// Gossip is how the agent takes part in the farm's gossip, see package gossip.
type Gossip struct {
	// Bind is the host:port to listen on; empty: no gossip.
	Bind string
	// Advertise is where others reach Bind; empty: at Bind itself.
	Advertise string
	// Join are the seeds, host:port each.
	Join []string
	// Key encrypts gossip; nil: in the clear.
	Key []byte
}

// validate completes c and returns its coordinators' addresses.
func (c *Config) validate() ([]address.Address, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.DrainTimeout <= 0 {
		c.DrainTimeout = defaultDrain
	}
	switch {
	case !gossip.ValidName(c.Name):
		return nil, fmt.Errorf("name %q: use 1 to 128 letters, digits, '.', '_' and '-'", c.Name)
	case c.BuildKit.IsZero():
		return nil, errors.New("the address of buildkitd is missing")
	case c.Slots < 1 || c.Slots > maxSlots:
		return nil, fmt.Errorf("%d slots: use 1 to %d", c.Slots, maxSlots)
	case c.Gossip.Bind == "" && len(c.Gossip.Join) > 0:
		return nil, errors.New("gossip has seeds to join, but no address to listen on")
	case c.Gossip.Bind == "" && len(c.Coordinators) == 0:
		return nil, errors.New("neither gossip nor a coordinator's address: the worker would never be found")
	case len(c.Coordinators) > maxCoordinators:
		return nil, fmt.Errorf("%d coordinators are named, at most %d make sense", len(c.Coordinators), maxCoordinators)
	}
	var addrs []address.Address
	for _, s := range c.Coordinators {
		a, err := address.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("coordinator: %w", err)
		}
		addrs = append(addrs, a)
	}
	return addrs, nil
}

// platforms returns what the worker offers, in containerd's notation, and what
// the machine is.
func (c *Config) platforms() (platforms []string, machine string, err error) {
	m, err := native.Detect()
	if err != nil {
		return nil, "", err
	}
	if len(c.Platforms) > 0 {
		list, err := native.Parse(c.Platforms)
		if err != nil {
			return nil, "", err
		}
		return native.Format(list), m.String(), nil
	}
	platforms = native.Format(native.From(m))
	if len(platforms) == 0 {
		return nil, "", fmt.Errorf("what %s runs natively is not known; name its platforms explicitly", m)
	}
	return platforms, m.String(), nil
}
