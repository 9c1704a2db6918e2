package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

const patience = 30 * time.Second

// startNode starts a node on loopback that ends with the test.
func startNode(tb testing.TB, cfg Config) *Node {
	tb.Helper()
	if cfg.Bind == "" {
		cfg.Bind = "127.0.0.1:0"
	}
	n, err := Start(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { closeNode(tb, n) })
	return n
}

func closeNode(tb testing.TB, n *Node) {
	// The test's own context has ended when cleanups run.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(tb.Context()), patience)
	defer cancel()
	if err := n.Close(ctx); err != nil {
		tb.Errorf("closing: %v", err)
	}
}

// waitForMembers waits until n knows as many living members, itself included.
func waitForMembers(tb testing.TB, n *Node, want int) {
	tb.Helper()
	late := time.After(patience)
	for len(n.living()) != want {
		select {
		case <-n.Changed():
		case <-late:
			tb.Fatalf("%s knows %d members, want %d", n.list.LocalNode().Name, len(n.living()), want)
		}
	}
}

// leavers counts members that were lost.
type leavers struct {
	events
	lost *atomic.Int32
}

func (l leavers) NotifyLeave(m *memberlist.Node) {
	l.lost.Add(1)
	l.events.NotifyLeave(m)
}

// wantAllTalk has every member exchange packets and streams with every other.
func wantAllTalk(t *testing.T, step string, nodes []*Node) {
	t.Helper()
	for _, a := range nodes {
		for _, b := range nodes {
			if a == b {
				continue
			}
			to, err := net.ResolveUDPAddr("udp", b.Addr())
			if err != nil {
				t.Fatal(err)
			}
			// A busy machine may be late with an answer; a packet that is not
			// understood is never answered.
			for tries := 0; ; tries++ {
				if _, err = a.list.Ping(b.list.LocalNode().Name, to); err == nil {
					break
				}
				if tries == 20 {
					t.Fatalf("%s: packets from %s to %s: %v", step, a.Addr(), b.Addr(), err)
				}
			}
			if _, err := a.list.Join([]string{b.Addr()}); err != nil {
				t.Fatalf("%s: a stream from %s to %s: %v", step, a.Addr(), b.Addr(), err)
			}
		}
	}
}

func TestNode_KeysRotateOnALiveRing(t *testing.T) {
	t.Parallel()
	const members = 5
	var lost, rejected atomic.Int32
	var nodes []*Node
	for i := range members {
		cfg := Config{Name: fmt.Sprint(i), Role: Worker, Keys: ring("a"), Rejected: func(Reason) { rejected.Add(1) }}
		if i > 0 {
			cfg.Join = []string{nodes[0].Addr()}
		}
		cfg.tune = func(mc *memberlist.Config) { mc.Events = leavers{mc.Events.(events), &lost} }
		nodes = append(nodes, startNode(t, cfg))
	}
	for _, n := range nodes {
		waitForMembers(t, n, members)
	}
	for _, step := range []struct{ name, ring string }{
		{"install", "ab"},
		{"use", "ba"},
		{"remove", "b"},
		{"install two", "bcd"},
		{"use the second", "dbc"},
		{"remove the one between", "dc"},
		{"back", "cd"},
		{"and remove", "c"},
	} {
		for i, n := range nodes { // one after the other, and all talk at every moment
			if err := n.SetKeyring(ring(step.ring)); err != nil {
				t.Fatal(err)
			}
			wantAllTalk(t, fmt.Sprintf("%s, %d of %d", step.name, i+1, members), nodes)
			if n := rejected.Load(); n != 0 {
				t.Fatalf("%s, %d of %d: %d packets were rejected", step.name, i+1, members, n)
			}
		}
	}
	if lost, rejected := lost.Load(), rejected.Load(); lost != 0 || rejected != 0 {
		t.Errorf("%d members were lost, %d packets were rejected", lost, rejected)
	}
	for _, n := range nodes {
		if !n.Keys().Equal(ring("c")) || len(n.living()) != members {
			t.Errorf("%s has keys %q and knows %d members", n.Addr(), n.Keys().letters(), len(n.living()))
		}
	}

	// Whoever slept through it is a stranger.
	late := startNode(t, Config{Name: "late", Role: Worker, Keys: ring("a")})
	if _, err := late.list.Join([]string{nodes[0].Addr()}); err == nil || rejected.Load() == 0 {
		t.Errorf("a member with the former key: %v, %d rejected", err, rejected.Load())
	}
	if err := late.SetKeyring(ring("c")); err != nil {
		t.Fatal(err)
	}
	wantAllTalk(t, "after the keys came", []*Node{late, nodes[0]})
}

// cable is a network that can be cut in two.
type cable struct {
	mu   sync.Mutex
	side map[string]int // by address; all are on side 0 of a cable that is not cut
}

var errCut = errors.New("no route to host")

func (c *cable) joins(a, b string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.side[a] == c.side[b]
}

func (c *cable) cut(side map[string]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.side = side
}

// plugged is memberlist's own transport on loopback, behind the cable.
type plugged struct {
	*memberlist.NetTransport
	cable *cable
	own   string
}

func (p *plugged) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	if !p.cable.joins(p.own, a.Addr) {
		return time.Now(), nil // as packets do
	}
	return p.NetTransport.WriteToAddress(b, a)
}

func (p *plugged) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	if !p.cable.joins(p.own, a.Addr) {
		return nil, errCut
	}
	return p.NetTransport.DialAddressTimeout(a, timeout)
}

// plug starts a member whose memberlist is quick to lose and forget others.
func (c *cable) plug(t *testing.T, cfg Config) *Node {
	t.Helper()
	cfg.RejoinInterval = 100 * time.Millisecond
	cfg.tune = func(mc *memberlist.Config) {
		transport, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{BindAddrs: []string{"127.0.0.1"}})
		if err != nil {
			t.Fatal(err)
		}
		port := transport.GetAutoBindPort()
		mc.BindPort, mc.AdvertisePort = port, port
		mc.Transport = &plugged{transport, c, net.JoinHostPort("127.0.0.1", fmt.Sprint(port))}
		mc.ProbeInterval, mc.ProbeTimeout, mc.SuspicionMult = 100*time.Millisecond, 50*time.Millisecond, 1
		mc.GossipInterval, mc.GossipToTheDeadTime, mc.PushPullInterval = 20*time.Millisecond, time.Nanosecond, 200*time.Millisecond
	}
	return startNode(t, cfg)
}

func TestNode_HalvesThatHaveForgottenEachOtherMergeAgain(t *testing.T) {
	t.Parallel()
	c := &cable{}
	rendezvous, err := Start(t.Context(), Config{Name: "seed", Role: Worker, Bind: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	var nodes []*Node
	for _, cfg := range []Config{
		{Name: "c1", Role: Coordinator, GRPC: "192.0.2.1:1"}, {Name: "w1", Role: Worker},
		{Name: "c2", Role: Coordinator, GRPC: "192.0.2.2:2"}, {Name: "w2", Role: Worker},
	} {
		cfg.Join, cfg.Keys = []string{rendezvous.Addr()}, nil
		nodes = append(nodes, c.plug(t, cfg))
	}
	for _, n := range nodes {
		waitForMembers(t, n, 5)
	}
	closeNode(t, rendezvous) // from now on nobody is anybody's seed
	for _, n := range nodes {
		waitForMembers(t, n, 4)
	}

	c.cut(map[string]int{nodes[0].Addr(): 1, nodes[1].Addr(): 1, nodes[2].Addr(): 2, nodes[3].Addr(): 2})
	for _, n := range nodes {
		waitForMembers(t, n, 2)
	}
	for i, want := range []string{"192.0.2.1:1", "192.0.2.1:1", "192.0.2.2:2", "192.0.2.2:2"} {
		if got := nodes[i].Coordinators(); !slices.Equal(got, []string{want}) {
			t.Errorf("on its side of the cut, member %d knows coordinators %q, want %s", i, got, want)
		}
	}
	c.cut(nil)
	for _, n := range nodes {
		waitForMembers(t, n, 4)
	}
}
