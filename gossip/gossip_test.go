package gossip_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/gossip"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// A probe that is under way outlives memberlist's Shutdown, by the rest of its own timeout.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}

const patience = 20 * time.Second

func start(t *testing.T, cfg gossip.Config) *gossip.Node {
	t.Helper()
	if cfg.Bind == "" {
		cfg.Bind = "127.0.0.1:0"
	}
	n, err := gossip.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, n) })
	return n
}

func stop(t *testing.T, n *gossip.Node) {
	t.Helper()
	// The test's own context has ended when cleanups run.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	if err := n.Close(ctx); err != nil {
		t.Errorf("closing: %v", err)
	}
}

func coordinator(name, grpc string, seeds ...string) gossip.Config {
	return gossip.Config{Name: name, Role: gossip.Coordinator, GRPC: grpc, Join: seeds, RejoinInterval: 200 * time.Millisecond}
}

func worker(name string, seeds ...string) gossip.Config {
	return gossip.Config{Name: name, Role: gossip.Worker, Join: seeds, RejoinInterval: 200 * time.Millisecond}
}

// wantCoordinators waits for n to know exactly these.
func wantCoordinators(t *testing.T, n *gossip.Node, want ...string) {
	t.Helper()
	late := time.After(patience)
	for {
		got := n.Coordinators()
		if slices.Equal(got, want) {
			return
		}
		select {
		case <-n.Changed():
		case <-late:
			t.Fatalf("coordinators %q, want %q", got, want)
		}
	}
}

func TestNode_WorkersLearnOfCoordinatorsThatTheyWereNotTold(t *testing.T) {
	t.Parallel()
	first := start(t, coordinator("one", "192.0.2.1:8372"))
	start(t, coordinator("two", "farm.example.com:8372", first.Addr()))
	both := []string{"192.0.2.1:8372", "farm.example.com:8372"}
	wantCoordinators(t, first, both...)
	w1 := start(t, worker("one", first.Addr())) // the same name, another role
	wantCoordinators(t, w1, both...)
	w2 := start(t, worker("two", w1.Addr())) // by way of a worker
	wantCoordinators(t, w2, both...)
}

// Two that join each other's seed in the same moment exchange states that lack
// what the other is about to learn.
func TestNode_AllThatStartAtOnceFindTheCoordinator(t *testing.T) {
	t.Parallel()
	for range 5 {
		c := start(t, coordinator("c", "192.0.2.1:8372"))
		w1 := start(t, worker("w1", c.Addr()))
		w2 := start(t, worker("w2", w1.Addr()))
		w3 := start(t, worker("w3", w2.Addr()))
		for _, w := range []*gossip.Node{w3, w2, w1} {
			wantCoordinators(t, w, "192.0.2.1:8372")
		}
	}
}

func TestNode_ACoordinatorThatLeavesIsForgotten(t *testing.T) {
	t.Parallel()
	c := start(t, coordinator("c", "192.0.2.1:8372"))
	w := start(t, worker("w", c.Addr()))
	wantCoordinators(t, w, "192.0.2.1:8372")
	stop(t, c)
	wantCoordinators(t, w)
}

func TestNode_AnUnspecifiedHostIsThatOfTheMember(t *testing.T) {
	t.Parallel()
	for _, grpc := range []string{"0.0.0.0:8372", "[::]:8372", ":8372"} {
		c := start(t, coordinator("c", grpc))
		w := start(t, worker("w", c.Addr()))
		wantCoordinators(t, w, "127.0.0.1:8372")
	}
}

func TestNode_ASeedThatComesLaterIsJoined(t *testing.T) {
	t.Parallel()
	// A port that is free now, and refuses until the coordinator takes it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	seed := l.Addr().String()
	l.Close()
	w := start(t, worker("w", seed))
	if got := w.Coordinators(); len(got) != 0 {
		t.Fatalf("coordinators %q before any is there", got)
	}
	cfg := coordinator("c", "192.0.2.1:8372")
	cfg.Bind = seed
	c := start(t, cfg)
	wantCoordinators(t, w, "192.0.2.1:8372")

	// And again after it was away: the seeds are looked after for ever.
	stop(t, c)
	wantCoordinators(t, w)
	cfg.GRPC = "192.0.2.2:8372"
	start(t, cfg)
	wantCoordinators(t, w, "192.0.2.2:8372")
}

func TestNode_ANameMovesToAnotherPortAfterARestart(t *testing.T) {
	t.Parallel()
	w := start(t, worker("w"))
	c := start(t, coordinator("c", "192.0.2.1:8372", w.Addr()))
	wantCoordinators(t, w, "192.0.2.1:8372")
	stop(t, c)
	start(t, coordinator("c", "192.0.2.2:8372", w.Addr()))
	wantCoordinators(t, w, "192.0.2.2:8372")
}

func TestNode_AnotherKeyIsAnotherFarm(t *testing.T) {
	t.Parallel()
	key, other := bytes.Repeat([]byte{1}, 32), bytes.Repeat([]byte{2}, 32)
	for name, keys := range map[string][][]byte{"wrong": {other}, "none": nil} {
		var log lockedLog
		rejected := make(chan gossip.Reason, 1000)
		cfg := coordinator("c", "192.0.2.1:8372")
		cfg.Keys, cfg.Logger = [][]byte{key}, slog.New(slog.NewTextHandler(&log, nil))
		cfg.Rejected = func(r gossip.Reason) {
			select {
			case rejected <- r:
			default:
			}
		}
		c := start(t, cfg)
		stranger := worker(name, c.Addr())
		stranger.Keys = keys
		w := start(t, stranger)
		for range 3 {
			if got := <-rejected; got != gossip.WrongKey {
				t.Errorf("with %s key: rejected because of %q", name, got)
			}
		}
		if got := w.Coordinators(); len(got) != 0 {
			t.Errorf("with %s key: coordinators %q", name, got)
		}
		if n := strings.Count(log.String(), "level=WARN"); n != 1 || !strings.Contains(log.String(), "address=127.0.0.1") {
			t.Errorf("with %s key: %d warnings, want one that names the address:\n%s", name, n, log.String())
		}

		right := worker("right", c.Addr())
		right.Keys = [][]byte{key}
		wantCoordinators(t, start(t, right), "192.0.2.1:8372")
		if strings.Contains(log.String(), string(key)) {
			t.Error("the key is in the log")
		}
	}
}

func TestNode_GossipInTheClearBecomesEncrypted(t *testing.T) {
	t.Parallel()
	key := gossip.NewKey()
	cfg := coordinator("c", "192.0.2.1:8372")
	cfg.Keys = [][]byte{key}
	c := start(t, cfg)
	w := start(t, worker("w", c.Addr()))
	if err := w.SetKeyring([][]byte{key}); err != nil {
		t.Fatal(err)
	}
	wantCoordinators(t, w, "192.0.2.1:8372")
	if err := w.SetKeyring(nil); err == nil {
		t.Error("encrypted gossip was put in the clear")
	}
	if err := w.SetKeyring([][]byte{[]byte("short")}); err == nil || !w.Keys().Equal(gossip.Keyring{key}) {
		t.Errorf("a short key: %v, and %d keys are left", err, len(w.Keys()))
	}
}

func TestStart_SaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		cfg    gossip.Config
		reason string
	}{
		"no name":           {worker(""), "name"},
		"a name with slash": {worker("a/b"), "name"},
		"a long name":       {worker(strings.Repeat("a", 129)), "name"},
		"no role":           {gossip.Config{Name: "a"}, "role"},
		"a short key":       {gossip.Config{Name: "a", Role: gossip.Worker, Keys: [][]byte{[]byte("short")}}, "5 bytes"},
		"a seed, no port":   {worker("a", "localhost"), "seed"},
		"a gRPC path":       {coordinator("a", "a/b:1"), "gRPC"},
		"a worker's gRPC":   {gossip.Config{Name: "a", Role: gossip.Worker, GRPC: ":1"}, "gRPC"},
		"a long gRPC host":  {coordinator("a", strings.Repeat("a", 600)+":1"), "gRPC"},
		"advertise nowhere": {gossip.Config{Name: "a", Role: gossip.Worker, Advertise: "0.0.0.0"}, "advertised"},
		"bind nowhere":      {gossip.Config{Name: "a", Role: gossip.Worker, Bind: "nowhere"}, "bind"},
	} {
		if c.cfg.Bind == "" {
			c.cfg.Bind = "127.0.0.1:0"
		}
		n, err := gossip.Start(t.Context(), c.cfg)
		if err == nil {
			stop(t, n)
		}
		if err == nil || !strings.Contains(err.Error(), c.reason) {
			t.Errorf("%s: error %v; want one about %q", name, err, c.reason)
		}
	}
}
