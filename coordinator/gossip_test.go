package coordinator

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/archfarm/archfarm/gossip"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestConfig_Keyring(t *testing.T) {
	t.Parallel()
	key := gossip.NewKey()
	for name, c := range map[string]struct {
		cfg  Config
		want int // keys
		fail string
	}{
		"loopback":                   {Config{Gossip: "127.0.0.1:7946"}, 0, ""},
		"loopback of IPv6":           {Config{Gossip: "[::1]:7946"}, 0, ""},
		"localhost":                  {Config{Gossip: "localhost:7946"}, 0, ""},
		"loopback with a key":        {Config{Gossip: "127.0.0.1:7946", GossipKey: key}, 1, ""},
		"every interface":            {Config{Gossip: ":7946"}, 1, ""},
		"a network":                  {Config{Gossip: "10.0.0.5:7946"}, 1, ""},
		"a network without security": {Config{Gossip: "10.0.0.5:7946", Insecure: true}, 0, ""},
		"members, and no key":        {Config{Gossip: "10.0.0.5:7946", Join: []string{"10.0.0.6:7946"}}, 0, "--gossip-key-file"},
		"members, and a key":         {Config{Gossip: "10.0.0.5:7946", Join: []string{"10.0.0.6:7946"}, GossipKey: key}, 1, ""},
	} {
		c.cfg.DataDir = t.TempDir()
		ring, err := c.cfg.keyring()
		if c.fail != "" {
			if err == nil || !strings.Contains(err.Error(), c.fail) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err != nil || len(ring) != c.want || len(c.cfg.GossipKey) > 0 && !ring.Has(key) {
			t.Errorf("%s: %d keys, %v", name, len(ring), err)
		}
		c.cfg.GossipKey = nil
		if again, err := c.cfg.keyring(); err != nil || !again.Equal(ring) {
			t.Errorf("%s, the second time: %d keys, %v", name, len(again), err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "gossip.keyring"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&Config{Gossip: ":0", DataDir: dir}).keyring(); err == nil {
		t.Error("an empty keyring was replaced by another farm's")
	}
}

// gossips starts a member that calls itself a worker.
func gossips(t *testing.T, name, seed string, key []byte) *gossip.Node {
	t.Helper()
	node, err := gossip.Start(t.Context(), gossip.Config{Name: name, Role: gossip.Worker, Bind: "127.0.0.1:0", Join: []string{seed}, Keys: [][]byte{key}})
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

func workersAndMetrics(t *testing.T, bound Bound) (workers int, metrics string) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return bound.Listen[0].Dial(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	list, err := archfarmv1.NewFleetServiceClient(conn).ListWorkers(t.Context(), &archfarmv1.ListWorkersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	response, err := http.Get("http://" + bound.HTTP + "/metrics") //nolint:noctx // of this test's own server
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return len(list.GetWorkers()), string(body)
}

func TestRun_GossipAuthorisesNothing(t *testing.T) {
	t.Parallel()
	cfg := local(t)
	cfg.GossipKey = gossip.NewKey()
	bound, stop := start(t, cfg)
	member := gossips(t, "impostor", bound.Gossip, cfg.GossipKey)
	for len(member.Coordinators()) == 0 { // then the coordinator knows it as well
		<-member.Changed()
	}
	workers, metrics := workersAndMetrics(t, bound)
	if workers != 0 || strings.Contains(metrics, "impostor") || strings.Contains(metrics, "archfarm_slots{") {
		t.Errorf("%d workers\n%s", workers, metrics)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// alarms is a log that tells of what it warns.
type alarms struct{ warned chan string }

func (a alarms) Write(p []byte) (int, error) {
	if bytes.Contains(p, []byte("gossips with a key that this farm does not have")) {
		a.warned <- string(p)
	}
	return len(p), nil
}

func TestRun_GossipOfAnotherKeyIsCountedAndWarnedOf(t *testing.T) {
	t.Parallel()
	cfg := local(t)
	cfg.GossipKey = gossip.NewKey()
	log := alarms{make(chan string, 10)}
	cfg.Logger = slog.New(slog.NewTextHandler(log, nil))
	bound, stop := start(t, cfg)
	stranger := gossips(t, "stranger", bound.Gossip, gossip.NewKey())
	if line := <-log.warned; !strings.Contains(line, "address=127.0.0.1") {
		t.Errorf("warned: %s", line)
	}
	_, metrics := workersAndMetrics(t, bound)
	counted := slices.ContainsFunc(strings.Split(metrics, "\n"), func(line string) bool {
		return strings.HasPrefix(line, `archfarm_gossip_rejected_packets_total{reason="key"} `) && !strings.HasSuffix(line, " 0")
	})
	if !counted || !strings.Contains(metrics, `archfarm_gossip_rejected_packets_total{reason="label"} 0`) {
		t.Errorf("metrics:\n%s", metrics)
	}
	if got := stranger.Coordinators(); len(got) != 0 {
		t.Errorf("the stranger knows coordinators %q", got)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// The farm's keys outlast the coordinator, whatever the command line says.
func TestRun_KeepsTheKeyring(t *testing.T) {
	t.Parallel()
	cfg := local(t)
	cfg.GossipKey = gossip.NewKey()
	_, stop := start(t, cfg)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	former := cfg.GossipKey
	cfg.GossipKey = gossip.NewKey()
	bound, stop := start(t, cfg)
	member := gossips(t, "member", bound.Gossip, former)
	late := time.After(20 * time.Second)
	for len(member.Coordinators()) == 0 {
		select {
		case <-member.Changed():
		case <-late:
			t.Fatal("the stored key does not count")
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}
