// Package gossip lets the machines of a farm find each other with memberlist,
// so that a worker needs to know only one living member to reach every
// coordinator.
//
// Gossip is a hint. It says where a coordinator may be found, and authorises
// nothing: whoever can send packets here can claim to be a coordinator, unless
// keys are set, which then are shared by all members (Keyring). They can be changed
// while the farm gossips.
package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// Role is what a member is to the farm.
type Role string

// The two roles. A member of another role is ignored.
const (
	Coordinator Role = "coordinator"
	Worker      Role = "worker"
)

const (
	// label keeps memberlist clusters of other programs, and packets that were
	// meant for them, apart from ours.
	label = "archfarm"
	// defaultRejoin is how often the seeds are looked after.
	defaultRejoin = 15 * time.Second
	// firstRetry is the wait after the first join that failed; it doubles up to
	// the rejoin interval.
	firstRetry = 500 * time.Millisecond
	// leaveWithin bounds the telling of the others that we leave.
	leaveWithin = 3 * time.Second
	// reclaimAfter is how long a name stays with a dead member before another
	// address may take it: a worker that was killed and restarted on another port
	// is the same worker. memberlist's default is never.
	reclaimAfter = time.Second
	// maxName keeps node names short, as every gossip message carries some.
	maxName = 128
	// maxCoordinators bounds how many addresses hostile gossip can make a worker
	// dial. A farm has a handful.
	maxCoordinators = 64
)

// Config says who this member is and how it finds the others.
type Config struct {
	// Name is unique among the members of the same role: 1 to 128 letters,
	// digits, ".", "_" and "-".
	Name string
	// Role is what this member is.
	Role Role
	// Bind is the host:port that gossip listens on, for TCP and UDP. Port 0 takes
	// a free one. An empty host is every interface.
	Bind string
	// Advertise is the host:port at which others reach Bind, or only the host, if
	// the port is the same. Empty: Bind itself, or the first private address of
	// the machine if Bind is every interface.
	Advertise string
	// Join are seeds, host:port each: members that are tried at the start and
	// whenever they are not among the living ones, for as long as the node runs.
	Join []string
	// Keys encrypt and authenticate all gossip with AES-GCM: 16, 24 or 32 bytes
	// each, at most 8. The first encrypts; all members must have that. None: in the
	// clear.
	Keys [][]byte
	// Rejected, if it is set, is told of every packet and stream that is not taken
	// because it is not of this farm. It must not block.
	Rejected func(Reason)
	// GRPC is where others reach a coordinator's gRPC port, as host:port. A host
	// that is empty or unspecified (0.0.0.0, ::) means: the host of this member's
	// gossip address. Empty for workers.
	GRPC string
	// RejoinInterval is how often the seeds are looked after; 0 means 15 s.
	RejoinInterval time.Duration
	// Logger gets what happens, and memberlist's own log; nil discards it.
	Logger *slog.Logger

	tune func(*memberlist.Config) // of tests
}

// Node is this process as a member. Its methods may be called concurrently.
type Node struct {
	list    *memberlist.Memberlist
	role    Role
	log     *slog.Logger
	changed chan struct{}
	poked   chan struct{} // ends the wait between two looks after the seeds
	keying  sync.Mutex    // held while keyring is changed
	keyring *memberlist.Keyring
	// contested is when another address was last seen under our name, in
	// nanoseconds since 1970; 0 is never.
	contested atomic.Int64
	stop      context.CancelFunc
	joiner    sync.WaitGroup

	mu      sync.Mutex
	members map[string]known // the living ones, this one included, by name
	missed  missed           // the ones that were

	closing sync.Once
	closed  error
}

// Start binds and begins to look for the seeds. That none answers yet is no
// error: they are tried for as long as the node runs. ctx bounds the start
// (names are resolved), not the life of the node.
func Start(ctx context.Context, cfg Config) (*Node, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.RejoinInterval <= 0 {
		cfg.RejoinInterval = defaultRejoin
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	n := &Node{
		role: cfg.Role, log: cfg.Logger, changed: make(chan struct{}, 1), poked: make(chan struct{}, 1),
		keyring: &memberlist.Keyring{}, members: map[string]known{}, missed: missed{},
	}
	if len(cfg.Keys) > 0 {
		if err := setKeyring(n.keyring, cfg.Keys); err != nil {
			return nil, fmt.Errorf("gossip: %w", err)
		}
	}
	mc, err := cfg.memberlist(ctx, n)
	if err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	if n.list, err = memberlist.Create(mc); err != nil {
		return nil, fmt.Errorf("starting gossip on %s: %w", cfg.Bind, err)
	}
	// The node outlives the start: Close ends it.
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	n.stop = stop
	n.joiner.Go(func() { n.keepJoined(run, cfg.Join, cfg.RejoinInterval) })
	return n, nil
}

// Addr is the host:port that gossip is bound to, with the port that was taken
// if Bind said 0, and with the advertised host.
func (n *Node) Addr() string { return n.list.LocalNode().Address() }

// Changed receives after members came, went or changed; several changes may be
// one notification. There is one channel for all callers.
func (n *Node) Changed() <-chan struct{} { return n.changed }

// Coordinators returns where the living coordinators serve gRPC, as host:port,
// sorted, without repetitions; on a coordinator including itself. There are at
// most 64.
func (n *Node) Coordinators() []string {
	var found []string
	for _, m := range n.living() {
		if m.coordinator != "" {
			found = append(found, m.coordinator)
		}
	}
	slices.Sort(found)
	found = slices.Compact(found)
	if len(found) > maxCoordinators {
		n.log.Warn("gossip names too many coordinators; taking the first ones", "named", len(found), "taken", maxCoordinators)
		found = found[:maxCoordinators]
	}
	return found
}

func (n *Node) living() []known {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Values(n.members))
}

// Close tells the others that this member leaves, stops, and waits for the
// node's goroutines for as long as ctx allows.
func (n *Node) Close(ctx context.Context) error {
	n.closing.Do(func() { n.closed = n.close(ctx) })
	return n.closed
}

func (n *Node) close(ctx context.Context) error {
	n.stop()
	within := leaveWithin
	if t, ok := ctx.Deadline(); ok {
		// memberlist takes 0 for "without limit".
		within = max(time.Millisecond, min(within, time.Until(t)))
	}
	if err := n.list.Leave(within); err != nil {
		// The others will find out by themselves.
		n.log.Debug("leaving the gossip: the others were perhaps not told", "error", err)
	}
	if err := n.list.Shutdown(); err != nil {
		return fmt.Errorf("stopping gossip: %w", err)
	}
	done := make(chan struct{})
	go func() {
		n.joiner.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stopping gossip: a join is still under way: %w", ctx.Err())
	}
}

// poke has the seeds looked after now.
func (n *Node) poke() {
	select {
	case n.poked <- struct{}{}:
	default:
	}
}

func (n *Node) notify() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

func (c *Config) validate() error {
	switch {
	case c.Role != Coordinator && c.Role != Worker:
		return fmt.Errorf("unknown role %q", c.Role)
	case !ValidName(c.Name):
		return fmt.Errorf("name %q: use 1 to %d letters, digits, '.', '_' and '-'", c.Name, maxName)
	case c.Role == Worker && c.GRPC != "":
		return errors.New("a worker has no gRPC address")
	}
	if c.GRPC != "" {
		host, _, err := splitHostPort(c.GRPC)
		if err != nil {
			return fmt.Errorf("gRPC address: %w", err)
		}
		if !validHost(host) {
			return fmt.Errorf("gRPC address: %q is neither a name nor an IP address", host)
		}
	}
	if err := Keyring(c.Keys).Validate(); err != nil {
		return err
	}
	for _, seed := range c.Join {
		if _, _, err := splitHostPort(seed); err != nil {
			return fmt.Errorf("seed: %w", err)
		}
	}
	return nil
}

// ValidName tells whether s may be the name of a member: 1 to 128 letters,
// digits, ".", "_" and "-".
func ValidName(s string) bool {
	return len(s) >= 1 && len(s) <= maxName && strings.IndexFunc(s, notInName) < 0
}

func notInName(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		return false
	default:
		return r != '.' && r != '_' && r != '-'
	}
}

// memberlist translates c.
func (c *Config) memberlist(ctx context.Context, n *Node) (*memberlist.Config, error) {
	host, port, err := hostPort(ctx, c.Bind)
	if err != nil {
		return nil, fmt.Errorf("bind address: %w", err)
	}
	// The LAN profile for everything that has a network in it: probe timeouts of
	// 0.5 s stand a machine that builds with all its cores, and suspicion
	// tolerates a lost packet. The WAN profile takes half a minute to notice a
	// dead member, but a farm across sites can do with LAN: a false alarm costs
	// nothing, as an agent keeps a stream that works. On loopback nothing is lost
	// and everything may be quicker.
	mc := memberlist.DefaultLANConfig()
	if host.IsLoopback() {
		mc = memberlist.DefaultLocalConfig()
	}
	mc.Name = string(c.Role) + "/" + c.Name
	mc.Label = label
	mc.SkipInboundLabelCheck = false
	mc.BindAddr, mc.BindPort = host.String(), int(port)
	mc.AdvertisePort = int(port)
	mc.Keyring = n.keyring // an empty one is no encryption, until it has a key
	mc.GossipVerifyIncoming, mc.GossipVerifyOutgoing = true, true
	mc.DeadNodeReclaimTime = reclaimAfter
	mc.LogOutput = &logWriter{log: c.Logger, rejected: c.Rejected}
	mc.Events = events{n}
	mc.Conflict = conflicts{n, mc.Name}
	mc.Delegate, err = newDelegate(c.Role, c.GRPC)
	if err != nil {
		return nil, err
	}
	if c.Advertise != "" {
		adv := c.Advertise
		if _, _, err := net.SplitHostPort(adv); err != nil {
			adv = net.JoinHostPort(strings.Trim(adv, "[]"), strconv.Itoa(int(port)))
		}
		host, port, err := hostPort(ctx, adv)
		if err != nil {
			return nil, fmt.Errorf("advertised address: %w", err)
		}
		if host.IsUnspecified() {
			return nil, fmt.Errorf("advertised address %q: nobody can reach an unspecified host", c.Advertise)
		}
		mc.AdvertiseAddr, mc.AdvertisePort = host.String(), int(port)
	}
	if c.tune != nil {
		c.tune(mc)
	}
	return mc, nil
}

// hostPort resolves s to one address.
func hostPort(ctx context.Context, s string) (netip.Addr, uint16, error) {
	host, port, err := splitHostPort(s)
	if err != nil {
		return netip.Addr{}, 0, err
	}
	if host == "" {
		return netip.IPv4Unspecified(), port, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return netip.Addr{}, 0, fmt.Errorf("%q: %w", s, err)
	}
	return addrs[0].Unmap(), port, nil
}

// splitHostPort is net.SplitHostPort with a numeric port.
func splitHostPort(s string) (host string, port uint16, err error) {
	host, p, err := net.SplitHostPort(s)
	if err != nil {
		return "", 0, fmt.Errorf("%q is no host:port", s)
	}
	n, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return "", 0, fmt.Errorf("%q: the port is not a number from 0 to 65535", s)
	}
	return host, uint16(n), nil
}
