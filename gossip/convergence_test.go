package gossip

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

// BenchmarkConvergence measures, with encrypted gossip paced as on a network (on
// loopback it would be quicker), how long it takes
//   - until members that all start at once, with one seed, know the coordinator
//     (s/join), and every other member (s/whole), which for the last few of hundreds
//     takes until memberlist's next exchange of states;
//   - until all of them know of a coordinator that comes later (s/news), and of its
//     leaving (s/leave);
//   - until all of them have lost one that was killed (s/loss).
//
// Run it with -benchtime 1x.
func BenchmarkConvergence(b *testing.B) {
	for _, members := range []int{10, 30, 100} {
		b.Run(fmt.Sprintf("members=%d", members), func(b *testing.B) {
			for b.Loop() {
				measureConvergence(b, members)
			}
		})
	}
}

func measureConvergence(b *testing.B, members int) {
	began := time.Now()
	phase := func(name string) {
		b.ReportMetric(time.Since(began).Seconds(), "s/"+name)
		began = time.Now()
	}
	nodes := []*Node{startPaced(b, Config{Name: "c", Role: Coordinator, GRPC: "192.0.2.1:1"})}
	defer func() { closeAll(b, nodes) }()
	for i := range members - 1 {
		nodes = append(nodes, startPaced(b, Config{Name: fmt.Sprint(i), Role: Worker, Join: []string{nodes[0].Addr()}}))
	}
	until(b, nodes, func(n *Node) bool { return len(n.Coordinators()) == 1 })
	phase("join")
	until(b, nodes, func(n *Node) bool { return len(n.living()) == members })
	phase("whole")

	news := startPaced(b, Config{Name: "news", Role: Coordinator, GRPC: "192.0.2.2:2", Join: []string{nodes[1].Addr()}})
	until(b, nodes, func(n *Node) bool { return slices.Equal(n.Coordinators(), []string{"192.0.2.1:1", "192.0.2.2:2"}) })
	phase("news")

	closeAll(b, []*Node{news})
	until(b, nodes, func(n *Node) bool { return len(n.Coordinators()) == 1 })
	phase("leave")

	killed := nodes[len(nodes)-1]
	nodes = nodes[:len(nodes)-1]
	killed.stop() // as a kill: without leaving
	killed.joiner.Wait()
	if err := killed.list.Shutdown(); err != nil {
		b.Fatal(err)
	}
	began = time.Now()
	until(b, nodes, func(n *Node) bool { return len(n.living()) == members-1 })
	phase("loss")
	b.ReportMetric(0, "ns/op") // which says nothing
}

func startPaced(b *testing.B, cfg Config) *Node {
	cfg.Bind, cfg.Keys = "127.0.0.1:0", ring("a")
	cfg.tune = func(mc *memberlist.Config) {
		lan := memberlist.DefaultLANConfig()
		mc.TCPTimeout, mc.IndirectChecks, mc.RetransmitMult, mc.SuspicionMult = lan.TCPTimeout, lan.IndirectChecks, lan.RetransmitMult, lan.SuspicionMult
		mc.PushPullInterval, mc.ProbeTimeout, mc.ProbeInterval = lan.PushPullInterval, lan.ProbeTimeout, lan.ProbeInterval
		mc.GossipInterval, mc.GossipToTheDeadTime = lan.GossipInterval, lan.GossipToTheDeadTime
	}
	n, err := Start(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// until waits until all nodes are as they should be.
func until(b *testing.B, nodes []*Node, ok func(*Node) bool) {
	b.Helper()
	late := time.After(10 * time.Minute)
	for _, n := range nodes {
		for !ok(n) {
			select {
			case <-n.Changed():
			case <-late:
				b.Fatalf("%s knows %d members and coordinators %q", n.Addr(), len(n.living()), n.Coordinators())
			}
		}
	}
}

func closeAll(b *testing.B, nodes []*Node) {
	ctx, cancel := context.WithTimeout(b.Context(), patience)
	defer cancel()
	var closing sync.WaitGroup
	for _, n := range nodes {
		closing.Go(func() {
			if err := n.Close(ctx); err != nil {
				b.Errorf("closing: %v", err)
			}
		})
	}
	closing.Wait()
}
