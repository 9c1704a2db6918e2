package fleet_test

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// What the fleet promises of time.
const (
	lostAfter   = 9 * time.Second
	openTimeout = 10 * time.Second
)

// farm is a fleet whose agents reach it over connections in memory, so that time
// can be a bubble's.
type farm struct {
	*fleet.Fleet
	door *bufconn.Listener
	as   identity.Identity // of those who dial from now on

	mu      sync.Mutex
	inside  int          // calls of changed at this moment
	overlap bool         // there were ever two
	seen    [][]snapshot // what changed was told
}

type snapshot struct {
	name  string
	state archfarmv1.Worker_State
	used  uint32
}

// bubble runs a test of a farm on fake time.
func bubble(t *testing.T, test func(t *testing.T, f *farm)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { test(t, newFarm(t)) })
}

func newFarm(t testing.TB) *farm {
	t.Helper()
	f := &farm{door: bufconn.Listen(1 << 16)}
	f.Fleet = fleet.New(slog.New(slog.DiscardHandler), f.changed)
	server := grpc.NewServer(grpc.WaitForHandlers(true),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			return handler(introduced(ctx), req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			return handler(srv, visit{stream})
		}))
	archfarmv1.RegisterAgentServiceServer(server, f.Fleet)
	archfarmv1.RegisterFleetServiceServer(server, f.Fleet)
	serve(t, server, f.door)
	return f
}

// asHeader stands for the certificate of whoever calls.
const asHeader = "test-as"

// introduced is what the coordinator's interceptors make of a call's context.
func introduced(ctx context.Context) context.Context {
	var who identity.Identity
	for _, text := range metadata.ValueFromIncomingContext(ctx, asHeader) {
		if err := json.Unmarshal([]byte(text), &who); err != nil {
			panic(err)
		}
	}
	return identity.NewContext(ctx, who)
}

type visit struct{ grpc.ServerStream }

func (v visit) Context() context.Context { return introduced(v.ServerStream.Context()) }

// introduce tells the server who is calling.
func introduce(ctx context.Context, who identity.Identity) context.Context {
	text, err := json.Marshal(who)
	if err != nil {
		panic(err)
	}
	return metadata.AppendToOutgoingContext(ctx, asHeader, string(text))
}

// serve runs a server until the test's end.
func serve(t testing.TB, server *grpc.Server, l net.Listener) {
	t.Helper()
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		server.Stop()
		running.Wait()
	})
}

func (f *farm) changed(workers []*fleet.Worker) {
	f.mu.Lock()
	f.inside++
	f.overlap = f.overlap || f.inside > 1
	f.mu.Unlock()
	var now []snapshot
	for _, w := range workers {
		now = append(now, snapshot{w.Name, w.Report().GetState(), w.Report().GetSlots().GetUsed()})
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inside--
	f.seen = append(f.seen, now)
}

// last is the fleet as changed was last told.
func (f *farm) last() []snapshot {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.seen) == 0 {
		return nil
	}
	return f.seen[len(f.seen)-1]
}

func (f *farm) dial(t testing.TB) *grpc.ClientConn {
	t.Helper()
	who := f.as
	cc, err := grpc.NewClient("passthrough:///fleet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(introduce(ctx, who), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return open(introduce(ctx, who), desc, cc, method, opts...)
		}),
		grpc.WithStaticStreamWindowSize(1<<16), // of what an agent does not read, no more is taken from the coordinator
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return f.door.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// agent is the other side of an Attach stream. It reports only when told to.
type agent struct {
	t      *testing.T
	farm   *farm
	stream archfarmv1.AgentService_AttachClient
	opens  chan *archfarmv1.Open
	orders chan *archfarmv1.Directive
	ended  chan error
}

func hello(name string) *archfarmv1.Hello {
	return &archfarmv1.Hello{
		Name: name, Platforms: []string{"linux/amd64", "linux/386"}, Version: "v1", BuildkitVersion: "v0.34.2", Machine: "linux/amd64",
		Report: report(archfarmv1.Worker_STATE_READY, 2, 0),
	}
}

func report(state archfarmv1.Worker_State, total, used uint32) *archfarmv1.Report {
	return &archfarmv1.Report{State: state, Slots: &archfarmv1.Slots{Total: total, Used: used}}
}

// knock sends the first message, which may be anything, and gives the answer.
func (f *farm) knock(t *testing.T, first *archfarmv1.AttachRequest) (archfarmv1.AgentService_AttachClient, *archfarmv1.AttachResponse, error) {
	t.Helper()
	stream, err := archfarmv1.NewAgentServiceClient(f.dial(t)).Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(first); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	return stream, answer, err
}

// enter attaches an agent that does not read any more.
func (f *farm) enter(t *testing.T, h *archfarmv1.Hello) (*agent, *fleet.Worker) {
	t.Helper()
	stream, answer, err := f.knock(t, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: h}})
	if err != nil {
		t.Fatal(err)
	}
	if got := answer.GetWelcome().GetHeartbeatSeconds(); got != 3 {
		t.Fatalf("welcomed with a heartbeat of %d s", got)
	}
	synctest.Wait()
	w, ok := f.Worker(h.GetName())
	if !ok {
		t.Fatalf("%s is not attached", h.GetName())
	}
	return &agent{t: t, farm: f, stream: stream, opens: make(chan *archfarmv1.Open, 100), orders: make(chan *archfarmv1.Directive, 100), ended: make(chan error, 1)}, w
}

func (f *farm) attach(t *testing.T, name string) (*agent, *fleet.Worker) {
	t.Helper()
	a, w := f.enter(t, hello(name))
	go a.listen()
	return a, w
}

func (a *agent) listen() {
	for {
		m, err := a.stream.Recv()
		if err != nil {
			a.ended <- err
			return
		}
		if open := m.GetOpen(); open != nil {
			a.opens <- open
		}
		if order := m.GetDirective(); order != nil {
			a.orders <- order
		}
	}
}

func (a *agent) done(id, why string) {
	a.t.Helper()
	a.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Done{Done: &archfarmv1.Done{DirectiveId: id, Error: why}}})
}

func (a *agent) send(m *archfarmv1.AttachRequest) {
	a.t.Helper()
	if err := a.stream.Send(m); err != nil {
		a.t.Fatal(err)
	}
	synctest.Wait()
}

func (a *agent) report(r *archfarmv1.Report) {
	a.t.Helper()
	a.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Report{Report: r}})
}

func (a *agent) refuse(id string, cause archfarmv1.Refused_Cause, why string) {
	a.t.Helper()
	a.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Refused{Refused: &archfarmv1.Refused{ConnectionId: id, Cause: cause, Message: why}}})
}

// buildkit answers every Open of an agent with a connection to a daemon.
type buildkit struct {
	controlapi.UnimplementedControlServer
	door    *bufconn.Listener
	server  *grpc.Server
	blocked chan struct{} // DiskUsage waits for it

	mu    sync.Mutex
	conns []*backend
}

// backend is the worker's end of a connection.
type backend struct {
	net.Conn
	open   *archfarmv1.Open
	closed chan struct{}
	once   sync.Once
}

func (b *backend) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	if err != nil {
		b.once.Do(func() { close(b.closed) })
	}
	return n, err
}

func (b *buildkit) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{}, nil
}

func (b *buildkit) DiskUsage(ctx context.Context, _ *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	b.blocked <- struct{}{}
	<-ctx.Done()
	return nil, ctx.Err()
}

// works makes the agent answer Opens from now on.
func (a *agent) works() *buildkit {
	b := &buildkit{door: bufconn.Listen(1 << 16), blocked: make(chan struct{}, 1)}
	b.server = grpc.NewServer(grpc.WaitForHandlers(true))
	controlapi.RegisterControlServer(b.server, b)
	serve(a.t, b.server, b.door)
	ctx := a.t.Context()
	go func() {
		for {
			select {
			case open := <-a.opens:
				b.connect(a.farm, open)
			case <-ctx.Done():
				return
			}
		}
	}()
	return b
}

// connect dials back.
func (b *buildkit) connect(f *farm, open *archfarmv1.Open) {
	theirs, ours := net.Pipe()
	end := &backend{Conn: ours, open: open, closed: make(chan struct{})}
	b.mu.Lock()
	b.conns = append(b.conns, end)
	b.mu.Unlock()
	l := &one{conn: make(chan net.Conn, 1), end: end}
	l.conn <- end
	go func() { _ = b.server.Serve(l) }()
	f.Accept(open.GetConnectionId(), theirs)
}

// one is a listener of a single connection.
type one struct {
	conn chan net.Conn
	end  *backend
}

func (l *one) Accept() (net.Conn, error) {
	select {
	case c := <-l.conn:
		return c, nil
	case <-l.end.closed:
		return nil, net.ErrClosed
	}
}

func (l *one) Close() error {
	l.end.once.Do(func() { close(l.end.closed) })
	return nil
}

func (l *one) Addr() net.Addr { return l.end.LocalAddr() }

// alive counts the connections that are open.
func (b *buildkit) alive() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(slices.DeleteFunc(slices.Clone(b.conns), func(e *backend) bool {
		select {
		case <-e.closed:
			return true
		default:
			return false
		}
	}))
}

// answers calls BuildKit over a connection.
func answers(t *testing.T, c *fleet.Conn) error {
	t.Helper()
	_, err := controlapi.NewControlClient(c).Info(t.Context(), &controlapi.InfoRequest{})
	return err
}

func must[T any](t *testing.T, f func(context.Context) (T, error)) T {
	t.Helper()
	v, err := f(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// pending is a call that runs beside the test.
type pending struct {
	conn *fleet.Conn
	err  error
	done chan struct{}
}

// attempt is a call of which only the error matters.
func attempt(ctx context.Context, f func(context.Context) error) *pending {
	return begin(ctx, func(ctx context.Context) (*fleet.Conn, error) { return nil, f(ctx) })
}

func begin(ctx context.Context, f func(context.Context) (*fleet.Conn, error)) *pending {
	p := &pending{done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.conn, p.err = f(ctx)
	}()
	return p
}

func (p *pending) result(t *testing.T) error {
	t.Helper()
	synctest.Wait()
	select {
	case <-p.done:
		return p.err
	default:
		return errors.New("still waiting")
	}
}
