package worker

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/gossip"
	"github.com/archfarm/archfarm/identity"
)

const (
	// maxSlots is beyond what any machine builds at once.
	maxSlots = 1024
	// maxCoordinators bounds what an operator may list.
	maxCoordinators = 64
	// defaultDrain lets a long build end.
	defaultDrain = 10 * time.Minute
	// defaultDiskHigh leaves room for a step or two that already run.
	defaultDiskHigh, defaultDiskLow = 0.95, 0.90
)

// Config is all that an agent needs to know.
type Config struct {
	// Name of the worker, unique in the farm: 1 to 128 letters, digits, ".", "_"
	// and "-".
	Name string
	// BuildKit is where the buildkitd listens that this agent stands for; it is not
	// used with Managed.
	BuildKit address.Address
	// Managed has the agent run a buildkitd of its own in DataDir; nil: it stands
	// for one that others run.
	Managed *Managed
	// BuildKitRoot is a folder on the disk that holds BuildKit's state, to watch how
	// full it is; empty: it is not watched. With Managed it is known.
	BuildKitRoot string
	// DataDir is the folder of what the agent keeps: what an operator told it, its
	// certificate, its own buildkitd. It is made when it is needed. Empty: nothing
	// is kept.
	DataDir string
	// Pool that the worker offers itself to; where it has a certificate, that of the
	// certificate. Empty: that one, or else "default".
	Pool string
	// Labels are what the operator says of the worker: at most 32, with keys and
	// values as in Kubernetes, 63 characters each.
	Labels map[string]string
	// DiskHigh and DiskLow are shares of the disk, 0 < DiskLow < DiskHigh <= 1. When
	// it is filled to DiskHigh the worker takes nothing new and its cache is pruned,
	// until it is filled to less than DiskLow. 0: 0.95 and 0.90.
	DiskHigh, DiskLow float64
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
	// Credentials secure the connections to coordinators; nil: there are none, and
	// only coordinators on this machine are dialed, unless Insecure.
	Credentials Credentials
	// Insecure lets the agent speak in plaintext over the network.
	Insecure bool
	// Stop, when it is closed, ends Run at once, drained or not. It may be nil.
	Stop <-chan struct{}
	// Logger gets what happens; nil discards it.
	Logger *slog.Logger
}

// Managed is the buildkitd that the agent runs by itself, see package managed.
type Managed struct {
	// Program is buildkitd, by path or by name in PATH.
	Program string
	// Args are further arguments for it.
	Args []string
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
	if c.DiskHigh == 0 && c.DiskLow == 0 {
		c.DiskHigh, c.DiskLow = defaultDiskHigh, defaultDiskLow
	}
	switch {
	case !gossip.ValidName(c.Name):
		return nil, fmt.Errorf("name %q: use 1 to 128 letters, digits, '.', '_' and '-'", c.Name)
	case c.Managed == nil && c.BuildKit.IsZero():
		return nil, errors.New("the address of buildkitd is missing")
	case c.Managed != nil && c.DataDir == "":
		return nil, errors.New("a buildkitd of its own needs a data folder")
	case c.Pool != "" && !identity.ValidName(c.Pool):
		return nil, fmt.Errorf("pool %q: use 1 to 128 letters, digits, '.', '_' and '-'", c.Pool)
	case c.DiskLow <= 0 || c.DiskLow >= c.DiskHigh || c.DiskHigh > 1:
		return nil, fmt.Errorf("the disk counts as full from %g and as not full below %g: the first must be larger, both within 0 to 1", c.DiskHigh, c.DiskLow)
	case c.Slots < 1 || c.Slots > maxSlots:
		return nil, fmt.Errorf("%d slots: use 1 to %d", c.Slots, maxSlots)
	case c.Gossip.Bind == "" && len(c.Gossip.Join) > 0:
		return nil, errors.New("gossip has seeds to join, but no address to listen on")
	case c.Gossip.Bind == "" && len(c.Coordinators) == 0:
		return nil, errors.New("neither gossip nor a coordinator's address: the worker would never be found")
	case len(c.Coordinators) > maxCoordinators:
		return nil, fmt.Errorf("%d coordinators are named, at most %d make sense", len(c.Coordinators), maxCoordinators)
	}
	if err := CheckLabels(c.Labels); err != nil {
		return nil, err
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
