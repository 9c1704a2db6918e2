package gossip

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/memberlist"
)

// maxHost is the longest DNS name (RFC 1035, section 2.3.4).
const maxHost = 255

// metadata is what every member carries with it; memberlist allows 512 bytes,
// and they travel in many packets, hence the short keys.
type metadata struct {
	// Role is "c" for a coordinator, "w" for a worker.
	Role string `json:"r"`
	// GRPC is Config.GRPC.
	GRPC string `json:"g,omitempty"`
}

var roleLetters = map[Role]string{Coordinator: "c", Worker: "w"}

// delegate gives memberlist our metadata. It carries no messages and no state.
type delegate struct{ meta []byte }

func newDelegate(role Role, grpc string) (*delegate, error) {
	meta, err := json.Marshal(metadata{Role: roleLetters[role], GRPC: grpc})
	if err != nil {
		return nil, fmt.Errorf("encoding metadata: %w", err)
	}
	if len(meta) > memberlist.MetaMaxSize {
		return nil, fmt.Errorf("the gRPC address is too long: metadata of %d bytes, at most %d fit", len(meta), memberlist.MetaMaxSize)
	}
	return &delegate{meta}, nil
}

func (d *delegate) NodeMeta(int) []byte           { return d.meta }
func (*delegate) NotifyMsg([]byte)                {}
func (*delegate) GetBroadcasts(int, int) [][]byte { return nil }
func (*delegate) LocalState(bool) []byte          { return nil }
func (*delegate) MergeRemoteState([]byte, bool)   {}

// known is what is known of a living member.
type known struct {
	gossip      netip.AddrPort
	coordinator string // where it serves gRPC; empty for workers
}

// events keeps the list of members, and notifies of changes. memberlist calls with
// its lock held: nothing here may block or ask it anything. Its own list must not be
// read, as it changes the members in place.
type events struct{ n *Node }

func (e events) NotifyJoin(m *memberlist.Node)   { e.n.know(m) }
func (e events) NotifyUpdate(m *memberlist.Node) { e.n.know(m) }

func (e events) NotifyLeave(m *memberlist.Node) {
	e.n.mu.Lock()
	e.n.missed.remember(m.Name, e.n.members[m.Name], time.Now())
	delete(e.n.members, m.Name)
	e.n.mu.Unlock()
	e.n.notify()
}

func (n *Node) know(m *memberlist.Node) {
	var entry known
	if ip, ok := netip.AddrFromSlice(m.Addr); ok {
		entry.gossip = netip.AddrPortFrom(ip.Unmap(), m.Port)
	}
	entry.coordinator, _ = coordinatorAddress(m)
	n.mu.Lock()
	n.members[m.Name] = entry
	delete(n.missed, m.Name)
	n.mu.Unlock()
	n.notify()
}

// conflicts notices that others know our name under another address: a second
// member of that name, or more often this one before it was killed and
// restarted. memberlist calls with its lock held.
type conflicts struct {
	n    *Node
	name string
}

func (c conflicts) NotifyConflict(existing, _ *memberlist.Node) {
	if existing.Name == c.name {
		c.n.contested.Store(time.Now().UnixNano())
	}
}

// coordinatorAddress tells where m serves gRPC, if m is a coordinator and says
// so in a form that makes sense. All of m is hostile.
func coordinatorAddress(m *memberlist.Node) (string, bool) {
	var meta metadata
	if len(m.Meta) > memberlist.MetaMaxSize || json.Unmarshal(m.Meta, &meta) != nil {
		return "", false
	}
	name, isCoordinator := strings.CutPrefix(m.Name, string(Coordinator)+"/")
	if meta.Role != roleLetters[Coordinator] || !isCoordinator || !ValidName(name) {
		return "", false
	}
	host, port, err := splitHostPort(meta.GRPC)
	if err != nil || port == 0 || !validHost(host) {
		return "", false
	}
	if ip, err := netip.ParseAddr(host); host == "" || (err == nil && ip.IsUnspecified()) {
		host = m.Addr.String()
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port))), true
}

// validHost keeps to IP addresses and names; empty is the member's own address.
func validHost(host string) bool {
	if host == "" {
		return true
	}
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	return len(host) <= maxHost && strings.IndexFunc(host, notInName) < 0
}
