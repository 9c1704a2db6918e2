package worker

import (
	"bytes"
	"context"
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/gossip"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func key(letter byte) []byte { return bytes.Repeat([]byte{letter}, 32) }

func ring(letters string) *gossip.Keyring {
	out := gossip.Keyring{}
	for _, l := range []byte(letters) {
		out = append(out, key(l))
	}
	return &out
}

// certificate is that there is one: over a Unix socket it is not needed.
type certificate struct{}

func (certificate) TLS() *tls.Config { return nil }

// gossips makes a coordinator one that is found by gossip with these keys.
func (c *fakeCoordinator) gossips(t *testing.T, name, letters string, seeds ...string) *gossip.Node {
	t.Helper()
	c.ring.Store(ring(letters))
	node, err := gossip.Start(t.Context(), gossip.Config{
		Name: name, Role: gossip.Coordinator, Bind: "127.0.0.1:0", GRPC: c.addr.Addr, Keys: *ring(letters), Join: seeds, RejoinInterval: 200 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := node.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return node
}

func (a *attached) rotate(id, letters string) string {
	a.t.Helper()
	_, failure := a.direct(&archfarmv1.Directive{Id: id, Action: &archfarmv1.Directive_GossipKeyring{GossipKeyring: &archfarmv1.GossipKeyring{Keys: *ring(letters)}}})
	return failure
}

func wantKept(t *testing.T, dir, letters string) {
	t.Helper()
	got, err := gossip.LoadKeyring(filepath.Join(dir, "gossip.keyring"))
	if err != nil || !got.Equal(*ring(letters)) {
		t.Errorf("%d keys are kept, %v; want %q", len(got), err, letters)
	}
}

func TestRun_GossipsWithTheKeysThatACoordinatorGives(t *testing.T) {
	t.Parallel()
	b := startBuildkitd(t, socketPath(t))
	told, found := startCoordinator(t, socketPath(t)), startCoordinator(t, onLoopback())
	told.ring.Store(ring("a"))
	node := found.gossips(t, "found", "a")
	dir := t.TempDir()
	cfg := Config{
		BuildKit: b.addr, Coordinators: []string{told.addr.String()}, DataDir: dir, Credentials: certificate{}, Insecure: true,
		Gossip: Gossip{Bind: "127.0.0.1:0", Join: []string{node.Addr()}},
	}
	// The second one wants TLS of who has a certificate, hence is not attached to,
	// but it sees the worker gossip.
	agent := startAgent(t, cfg, hasty)
	first := told.attach(t)
	first.wantReport(ready, 0)
	wantKept(t, dir, "a")

	if failure := first.rotate("1", "ab"); failure != "" {
		t.Errorf("installing: %s", failure)
	}
	if failure := first.rotate("2", "ba"); failure != "" {
		t.Errorf("using: %s", failure)
	}
	wantKept(t, dir, "ba")
	for id, letters := range map[string]string{"nothing": "", "twice": "bb", "too many": "abcdefghi"} {
		if failure := first.rotate(id, letters); failure == "" {
			t.Errorf("%s: taken", id)
		}
	}
	wantKept(t, dir, "ba")
	agent.cancel()
	agent.wantEnd(t)

	// It needs no coordinator to begin with what it kept.
	cfg.Coordinators, cfg.Credentials = nil, nil
	startAgent(t, cfg, hasty)
	if err := node.SetKeyring(*ring("ab")); err != nil {
		t.Fatal(err)
	}
	found.attach(t).wantReport(ready, 0)
}

func TestRun_ServesACoordinatorThatComesLater(t *testing.T) {
	t.Parallel()
	b := startBuildkitd(t, socketPath(t))
	one, two := startCoordinator(t, onLoopback()), startCoordinator(t, onLoopback())
	seed := one.gossips(t, "one", "a")
	startAgent(t, Config{BuildKit: b.addr, Slots: 1, Gossip: Gossip{Bind: "127.0.0.1:0", Join: []string{seed.Addr()}, Key: key('a')}}, hasty)
	first := one.attach(t)
	first.wantReport(ready, 0)
	two.gossips(t, "two", "a", seed.Addr())
	second := two.attach(t)
	second.wantReport(ready, 0)

	// One slot is one slot, whoever asks.
	running := first.open("c1", true)
	second.wantReport(ready, 1)
	second.ask("c2", true)
	second.wantRefused("c2", archfarmv1.Refused_CAUSE_NO_SLOT)
	running.Close()
	second.wantReport(ready, 0)
	second.open("c3", true)

	// A key is used when both have it, and removed when neither needs it.
	if failure := first.rotate("install", "ab"); failure != "" {
		t.Errorf("installing on one: %s", failure)
	}
	if failure := first.rotate("use", "ba"); !strings.Contains(failure, two.addr.String()) {
		t.Errorf("using what the other does not have: %q", failure)
	}
	if failure := second.rotate("install", "ab"); failure != "" {
		t.Errorf("installing on two: %s", failure)
	}
	if failure := first.rotate("use", "ba"); failure != "" {
		t.Errorf("using on one: %s", failure)
	}
	if failure := first.rotate("remove", "b"); !strings.Contains(failure, two.addr.String()) {
		t.Errorf("removing what the other uses: %q", failure)
	}
	if failure := second.rotate("use", "ba"); failure != "" {
		t.Errorf("using on two: %s", failure)
	}
	for _, a := range []*attached{first, second} {
		if failure := a.rotate("remove", "b"); failure != "" {
			t.Errorf("removing: %s", failure)
		}
	}
}

func TestRun_AWorkerWithoutGossipStandsInNoKeysWay(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	c.ring.Store(ring("a"))
	dir := t.TempDir()
	startAgent(t, Config{BuildKit: b.addr, DataDir: dir, Coordinators: []string{c.addr.String()}}, hasty)
	if failure := c.attach(t).rotate("1", "ab"); failure != "" {
		t.Errorf("installing: %s", failure)
	}
	if _, err := os.Stat(filepath.Join(dir, "gossip.keyring")); !os.IsNotExist(err) {
		t.Errorf("keys are kept that nobody needs: %v", err)
	}
}

func TestRun_GossipInTheClearBecomesEncrypted(t *testing.T) {
	t.Parallel()
	b := startBuildkitd(t, socketPath(t))
	told, found := startCoordinator(t, onLoopback()), startCoordinator(t, onLoopback())
	node := found.gossips(t, "found", "a")
	told.ring.Store(ring("a"))
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{told.addr.String()}, Gossip: Gossip{Bind: "127.0.0.1:0", Join: []string{node.Addr()}}}, hasty)
	told.attach(t)
	found.attach(t).wantReport(ready, 0)
}
