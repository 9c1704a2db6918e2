package coordinator

import (
	"context"
	"net"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/address"
)

// local listens wherever this machine has room.
func local(t *testing.T) Config {
	t.Helper()
	return Config{
		Name: "test", Listen: []address.Address{{Network: "tcp", Addr: "127.0.0.1:0"}, {Network: "unix", Addr: t.TempDir() + "/a.sock"}},
		HTTP: "127.0.0.1:0", Gossip: "127.0.0.1:0", DataDir: t.TempDir(),
	}
}

// start runs a coordinator until stop is called, which returns what Run did.
func start(t *testing.T, cfg Config) (bound Bound, stop func() error) {
	t.Helper()
	ready, ended := make(chan Bound, 1), make(chan error, 1)
	cfg.Ready = func(b Bound) { ready <- b }
	ctx, cancel := context.WithCancel(t.Context())
	go func() { ended <- Run(ctx, cfg) }()
	select {
	case bound = <-ready:
	case err := <-ended:
		cancel()
		t.Fatal(err)
	}
	return bound, func() error {
		cancel()
		return <-ended
	}
}

func TestRun_ServesOnEveryAddressUntilStopped(t *testing.T) {
	t.Parallel()
	bound, stop := start(t, local(t))
	if len(bound.Listen) != 2 || bound.HTTP == "" || bound.Gossip == "" {
		t.Fatalf("bound %+v", bound)
	}
	for _, a := range bound.Listen {
		conn, err := grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return a.Dial(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		health, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%s: health %v, %v", a, health, err)
		}
		workers, err := controlapi.NewControlClient(conn).ListWorkers(t.Context(), &controlapi.ListWorkersRequest{})
		if err != nil || len(workers.GetRecord()) != 1 {
			t.Errorf("%s: BuildKit's workers %v, %v", a, workers, err)
		}
		large := &controlapi.SolveRequest{Ref: strings.Repeat("x", 16<<20)}
		if _, err := controlapi.NewControlClient(conn).Solve(t.Context(), large); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: a message over the cap: %v", a, err)
		}
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestRun_ASecondCoordinatorKeepsItsHandsOff(t *testing.T) {
	t.Parallel()
	cfg := local(t)
	_, stop := start(t, cfg)
	err := Run(t.Context(), cfg)
	if err == nil || !strings.Contains(err.Error(), cfg.DataDir) || !strings.Contains(err.Error(), "another coordinator uses it") {
		t.Errorf("the second got %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	_, stop = start(t, cfg)
	if err := stop(); err != nil {
		t.Errorf("after the first has stopped: %v", err)
	}
}

// What was bound before is let go of: goleak and the second start would tell.
func TestRun_AnAddressInUseIsNamed(t *testing.T) {
	t.Parallel()
	other, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	taken := other.Addr().String()
	for name, spoil := range map[string]func(*Config){
		"the door": func(c *Config) {
			c.Listen = append(c.Listen, address.Address{Network: "tcp", Addr: taken})
		},
		"gossip": func(c *Config) { c.Gossip = taken },
		"web":    func(c *Config) { c.HTTP = taken },
	} {
		cfg := local(t)
		good := cfg
		spoil(&cfg)
		if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), taken) {
			t.Errorf("%s: %v", name, err)
		}
		_, stop := start(t, good)
		if err := stop(); err != nil {
			t.Errorf("%s: afterwards: %v", name, err)
		}
	}
}
