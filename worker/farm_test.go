package worker

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/gossip"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is when a test gives up to wait.
const patience = 20 * time.Second

// hasty is usual, for tests.
var hasty = timing{
	checkEvery:    20 * time.Millisecond,
	checkWithin:   time.Second,
	welcomeWithin: 300 * time.Millisecond,
	orphanAfter:   300 * time.Millisecond,
	lookEvery:     20 * time.Millisecond,
	pruneEvery:    time.Minute,
	releaseWithin: 10 * time.Millisecond,
}

func socketPath(t *testing.T) address.Address {
	t.Helper()
	dir, err := os.MkdirTemp("", "af") // short enough for sockaddr_un
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return address.Address{Network: "unix", Addr: filepath.Join(dir, "s")}
}

// fakeBuildkitd answers Info, DiskUsage and Prune, and nothing else.
type fakeBuildkitd struct {
	controlapi.UnimplementedControlServer
	addr   address.Address
	server *grpc.Server
	served sync.WaitGroup
	pruned func(*controlapi.PruneRequest) // nil: nobody cares
	frozen atomic.Bool
}

const buildkitVersion = "v0.99.0"

func (b *fakeBuildkitd) Info(ctx context.Context, _ *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	if b.frozen.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &controlapi.InfoResponse{BuildkitVersion: &apitypes.BuildkitVersion{Version: buildkitVersion}}, nil
}

func startBuildkitd(t *testing.T, addr address.Address) *fakeBuildkitd {
	t.Helper()
	l, err := addr.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b := &fakeBuildkitd{addr: addr, server: grpc.NewServer()}
	controlapi.RegisterControlServer(b.server, b)
	b.served.Go(func() { _ = b.server.Serve(l) })
	t.Cleanup(b.stop)
	return b
}

func (b *fakeBuildkitd) stop() {
	b.server.Stop()
	b.served.Wait()
}

// fakeCoordinator serves AgentService and takes tunnels.
type fakeCoordinator struct {
	archfarmv1.UnimplementedAgentServiceServer
	addr     address.Address
	server   *grpc.Server
	served   sync.WaitGroup
	attached chan *attached
	tunnels  chan net.Conn
	carried  chan string // ids of connections that were carried
	door     *tunnel.Listener
	ring     atomic.Pointer[gossip.Keyring] // what agents are welcomed with; nil: no keys
}

// attached is one Attach call, seen from the coordinator.
type attached struct {
	t        *testing.T
	hello    *archfarmv1.Hello
	rpc      grpc.BidiStreamingServer[archfarmv1.AttachRequest, archfarmv1.AttachResponse]
	messages chan *archfarmv1.AttachRequest // closed at the end of the agent's side
	hangUp   func()                         // ends the call from the coordinator's side
	tunnels  chan net.Conn
}

func startCoordinator(t *testing.T, addr address.Address) *fakeCoordinator {
	t.Helper()
	inner, err := addr.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := &fakeCoordinator{
		addr: addr, server: grpc.NewServer(),
		attached: make(chan *attached, 64), tunnels: make(chan net.Conn, 64), carried: make(chan string, 64),
	}
	if addr.Network == "tcp" {
		c.addr.Addr = inner.Addr().String()
	}
	l := tunnel.NewListener(inner, tunnel.Security{}, func(_ string, conn net.Conn) { c.tunnels <- conn }, slog.New(slog.DiscardHandler))
	c.door = l
	archfarmv1.RegisterAgentServiceServer(c.server, &agentService{c: c, t: t})
	c.served.Go(func() { _ = c.server.Serve(l) })
	t.Cleanup(c.stop)
	return c
}

func onLoopback() address.Address { return address.Address{Network: "tcp", Addr: "127.0.0.1:0"} }

func (c *fakeCoordinator) stop() {
	c.server.Stop()
	c.served.Wait()
	for {
		select {
		case conn := <-c.tunnels:
			conn.Close()
		default:
			return
		}
	}
}

type agentService struct {
	archfarmv1.UnimplementedAgentServiceServer
	c *fakeCoordinator
	t *testing.T
}

func (s *agentService) Attach(rpc grpc.BidiStreamingServer[archfarmv1.AttachRequest, archfarmv1.AttachResponse]) error {
	first, err := rpc.Recv()
	if err != nil {
		return err
	}
	welcome := &archfarmv1.Welcome{HeartbeatSeconds: 1}
	if ring := s.c.ring.Load(); ring != nil {
		welcome.GossipKeyring = &archfarmv1.GossipKeyring{Keys: *ring}
	}
	if err := rpc.Send(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Welcome{Welcome: welcome}}); err != nil {
		return err
	}
	hungUp := make(chan struct{})
	a := &attached{
		t: s.t, hello: first.GetHello(), rpc: rpc, tunnels: s.c.tunnels,
		messages: make(chan *archfarmv1.AttachRequest, 1024),
		hangUp:   sync.OnceFunc(func() { close(hungUp) }),
	}
	s.c.attached <- a
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		defer close(a.messages)
		for {
			m, err := rpc.Recv()
			if err != nil {
				return
			}
			a.messages <- m
		}
	}()
	select {
	case <-ended:
	case <-hungUp:
	}
	return nil
}

// Carry gives what is carried to who waits for tunnels.
func (s *agentService) Carry(rpc grpc.BidiStreamingServer[archfarmv1.CarryRequest, archfarmv1.CarryResponse]) error {
	first, err := rpc.Recv()
	if err != nil {
		return err
	}
	call := &carriedCall{rpc: rpc, ended: make(chan struct{})}
	at := &net.UnixAddr{Net: "unix"}
	s.c.carried <- first.GetConnectionId()
	s.c.tunnels <- tunnel.Over(call, at, at)
	select {
	case <-call.ended:
	case <-rpc.Context().Done():
	}
	return nil
}

// carriedCall is the coordinator's end of Carry.
type carriedCall struct {
	rpc   grpc.BidiStreamingServer[archfarmv1.CarryRequest, archfarmv1.CarryResponse]
	once  sync.Once
	ended chan struct{}
}

func (c *carriedCall) Send(data []byte) error {
	return c.rpc.Send(&archfarmv1.CarryResponse{Data: data})
}

func (c *carriedCall) Receive() ([]byte, error) {
	m, err := c.rpc.Recv()
	return m.GetData(), err
}

func (c *carriedCall) End() { c.once.Do(func() { close(c.ended) }) }

func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v, ok := <-c:
		if !ok {
			t.Fatalf("waiting for %s: it ended", what)
		}
		return v
	case <-time.After(patience):
		t.Fatalf("waiting for %s: it does not come", what)
	}
	panic("unreachable")
}

func (c *fakeCoordinator) attach(t *testing.T) *attached {
	t.Helper()
	return receive(t, c.attached, "the agent")
}

// wantReport waits for a report of this state.
func (a *attached) wantReport(state archfarmv1.Worker_State, used uint32) *archfarmv1.Report {
	a.t.Helper()
	for {
		r := receive(a.t, a.messages, "a report").GetReport()
		if r != nil && r.GetState() == state && r.GetSlots().GetUsed() == used {
			return r
		}
	}
}

// nextReport waits for the first report of as many slots in use.
func (a *attached) nextReport(used uint32) *archfarmv1.Report {
	a.t.Helper()
	for {
		if r := receive(a.t, a.messages, "a report").GetReport(); r != nil && r.GetSlots().GetUsed() == used {
			return r
		}
	}
}

func (a *attached) wantRefused(id string, cause archfarmv1.Refused_Cause) *archfarmv1.Refused {
	a.t.Helper()
	for {
		r := receive(a.t, a.messages, "a refusal").GetRefused()
		if r == nil {
			continue
		}
		if r.GetConnectionId() != id || r.GetCause() != cause {
			a.t.Fatalf("refused %s: %s (%s), want %s: %s", r.GetConnectionId(), r.GetCause(), r.GetMessage(), id, cause)
		}
		return r
	}
}

func (a *attached) ask(id string, slot bool) {
	a.t.Helper()
	a.say(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Open{Open: &archfarmv1.Open{ConnectionId: id, TakesSlot: slot}}})
}

func (a *attached) say(m *archfarmv1.AttachResponse) {
	a.t.Helper()
	if err := a.rpc.Send(m); err != nil {
		a.t.Fatal(err)
	}
}

// direct has the agent do something and waits until it has, or says why not. It
// returns the report before that.
func (a *attached) direct(d *archfarmv1.Directive) (*archfarmv1.Report, string) {
	a.t.Helper()
	if err := a.rpc.Send(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Directive{Directive: d}}); err != nil {
		a.t.Fatal(err)
	}
	var last *archfarmv1.Report
	for {
		m := receive(a.t, a.messages, "a directive's end")
		if done := m.GetDone(); done.GetDirectiveId() == d.GetId() && done != nil {
			return last, done.GetError()
		}
		if r := m.GetReport(); r != nil {
			last = r
		}
	}
}

// open asks for a connection and waits for it.
func (a *attached) open(id string, slot bool) net.Conn {
	a.t.Helper()
	a.ask(id, slot)
	conn := receive(a.t, a.tunnels, "a tunnel")
	a.t.Cleanup(func() { conn.Close() })
	return conn
}

// wantInfo speaks BuildKit's API over conn, and closes it.
func wantInfo(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := speak(t, conn).Close(); err != nil {
		t.Fatal(err)
	}
}

// speak begins to speak BuildKit's API over conn.
func speak(t *testing.T, conn net.Conn) *client.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	unused := make(chan net.Conn, 1)
	unused <- conn
	c, err := client.New(ctx, "tcp://tunnel", client.WithContextDialer(func(context.Context, string) (net.Conn, error) {
		select {
		case conn := <-unused:
			return conn, nil
		default:
			return nil, net.ErrClosed
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	info, err := c.Info(ctx)
	if err != nil || info.BuildkitVersion.Version != buildkitVersion {
		t.Fatalf("info through the tunnel: %+v, %v", info, err)
	}
	return c
}

func wantEnd(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	// buildkitd's first frames may come before the end.
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the connection does not end")
	}
}

// running is an agent under test.
type running struct {
	cancel context.CancelFunc // as SIGTERM does
	stop   func()             // as a second one does
	ended  chan error
}

func startAgent(t *testing.T, cfg Config, timing timing) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stop := make(chan struct{})
	cfg.Stop = stop
	if cfg.Name == "" {
		cfg.Name = "w"
	}
	if cfg.Slots == 0 {
		cfg.Slots = 1
	}
	r := &running{cancel: cancel, stop: sync.OnceFunc(func() { close(stop) }), ended: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.ended <- run(ctx, cfg, timing)
	}()
	t.Cleanup(func() {
		r.stop()
		cancel()
		<-done
	})
	return r
}

func (r *running) wantEnd(t *testing.T) {
	t.Helper()
	if err := receive(t, r.ended, "the agent's end"); err != nil {
		t.Fatalf("the agent ended with %v", err)
	}
}

func (r *running) wantRunning(t *testing.T) {
	t.Helper()
	select {
	case err := <-r.ended:
		t.Fatalf("the agent ended early: %v", err)
	default:
	}
}
