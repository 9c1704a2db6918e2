package session_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/session/spool"
)

// patience bounds every wait of these tests; nothing comes near it unless it hangs.
const patience = 2 * time.Minute

// maxMessage is BuildKit's cap.
const maxMessage = 16 << 20

// farm is a coordinator's registry and relays, as a client reaches them.
type farm struct {
	registry *session.Registry
	relays   *session.Relays
	control  controlapi.ControlClient // the client's connection to the coordinator
}

func newFarm(t *testing.T) *farm {
	t.Helper()
	return newFarmWith(t, nil)
}

// newFarmWith is a farm whose contexts go through a spool.
func newFarmWith(t *testing.T, contexts *spool.Spool) *farm {
	t.Helper()
	registry, err := session.NewRegistry()
	if err != nil {
		t.Fatal(err)
	}
	registry.Spool = contexts
	f := &farm{registry: registry, relays: session.NewRelays(registry, slog.New(slog.DiscardHandler))}
	f.control = controlapi.NewControlClient(dial(t, serve(t, &door{handle: registry.Handle})))
	return f
}

// door is a Control service of which only Session works.
type door struct {
	controlapi.UnimplementedControlServer
	handle func(controlapi.Control_SessionServer) error
}

func (d *door) Session(stream controlapi.Control_SessionServer) error { return d.handle(stream) }

// serve runs a Control server until the test's end, or until stopped earlier.
func serve(t *testing.T, control controlapi.ControlServer) *served {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.WaitForHandlers(true))
	controlapi.RegisterControlServer(server, control)
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		server.Stop()
		running.Wait()
	})
	return &served{addr: l.Addr().String(), stop: server.Stop}
}

type served struct {
	addr string
	stop func()
}

func dial(t *testing.T, s *served) *grpc.ClientConn {
	t.Helper()
	cc, err := connect(s.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func connect(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)))
}

// client opens a session to the coordinator. End closes it as BuildKit's client does.
func (f *farm) client(t *testing.T, serves ...bksession.Attachable) (s *bksession.Session, end func()) {
	t.Helper()
	s, err := bksession.NewSession(t.Context(), "shared-key")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range serves {
		s.Allow(a)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context())) // ends in Cleanup, which runs after t.Context has ended
	var running sync.WaitGroup
	running.Go(func() { _ = s.Run(ctx, grpchijack.Dialer(f.control)) })
	end = sync.OnceFunc(func() {
		cancel()
		_ = s.Close()
		running.Wait()
	})
	t.Cleanup(end)
	return s, end
}

// worker is a buildkitd as far as sessions are concerned.
type worker struct {
	name    string
	manager *bksession.Manager
	server  *served
	began   chan struct{} // one for every session that was opened to it
	ended   chan struct{} // one for every session that has ended
	kill    chan struct{} // each message ends one session from this side
	lost    error         // what its connections say
}

func newWorker(t *testing.T, name string) *worker {
	t.Helper()
	manager, err := bksession.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	w := &worker{name: name, manager: manager, began: make(chan struct{}, 1000), ended: make(chan struct{}, 1000), kill: make(chan struct{})}
	w.server = serve(t, &door{handle: w.session})
	return w
}

// session is what buildkitd does (control/control.go).
func (w *worker) session(stream controlapi.Control_SessionServer) error {
	w.began <- struct{}{}
	defer func() { w.ended <- struct{}{} }()
	conn, closed, headers := grpchijack.Hijack(stream)
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	killed := make(chan struct{})
	go func() {
		defer cancel()
		select {
		case <-closed:
		case <-w.kill:
			close(killed)
		case <-ctx.Done():
		}
	}()
	handled := make(chan error, 1)
	go func() { handled <- w.manager.HandleConn(ctx, conn, headers) }()
	select {
	case err := <-handled: // the session is forgotten by now: ending the stream says so
		return err
	case <-killed: // HandleConn would wait for the other side
		return nil
	}
}

func (w *worker) ID() string { return w.name }

func (w *worker) Dial(context.Context) (session.Conn, error) {
	cc, err := connect(w.server.addr)
	return lostConn{cc, w.lost}, err
}

type lostConn struct {
	*grpc.ClientConn
	err error
}

func (c lostConn) Lost() error { return c.err }

// caller is how a step on the worker reaches the client.
func (w *worker) caller(t *testing.T, id string) bksession.Caller {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	c, err := w.manager.Get(ctx, id, false)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// knows tells whether the worker has the session right now.
func (w *worker) knows(t *testing.T, id string) bool {
	t.Helper()
	c, err := w.manager.Get(t.Context(), id, true)
	if err != nil {
		t.Fatal(err)
	}
	return c != nil && c != bksession.Caller(nil)
}

func (f *farm) expose(t *testing.T, w session.Worker, id string) (release func()) {
	t.Helper()
	release, err := f.relays.Expose(t.Context(), w, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return release
}

func await(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("still waiting after %s: %s", patience, what)
	}
}

// probe is a service of the client's session with every kind of call.
type probe struct {
	unary func(context.Context) ([]byte, error)
	echo  func(grpc.ServerStream) error
}

var probeDesc = grpc.ServiceDesc{
	ServiceName: "archfarm.test.Probe",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(srv any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		if err := decode(new(wrapperspb.BytesValue)); err != nil {
			return nil, err
		}
		answer, err := srv.(*probe).unary(ctx)
		return wrapperspb.Bytes(answer), err
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Echo", ServerStreams: true, ClientStreams: true, Handler: func(srv any, stream grpc.ServerStream) error {
		return srv.(*probe).echo(stream)
	}}},
}

func (p *probe) Register(s *grpc.Server) { s.RegisterService(&probeDesc, p) }

func callUnary(ctx context.Context, c bksession.Caller, opts ...grpc.CallOption) ([]byte, error) {
	var answer wrapperspb.BytesValue
	err := c.Conn().Invoke(ctx, "/archfarm.test.Probe/Unary", wrapperspb.Bytes(nil), &answer, opts...)
	return answer.GetValue(), err
}

func callEcho(ctx context.Context, t *testing.T, c bksession.Caller) grpc.ClientStream {
	t.Helper()
	stream, err := c.Conn().NewStream(ctx, &probeDesc.Streams[0], "/archfarm.test.Probe/Echo")
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// echo sends back what it receives.
func echo(stream grpc.ServerStream) error {
	for {
		var m wrapperspb.BytesValue
		if err := stream.RecvMsg(&m); err != nil {
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return ignoreEOF(err)
		}
		if err := stream.SendMsg(&m); err != nil {
			return err
		}
	}
}

// eventually waits for something that nothing tells of.
func eventually(t *testing.T, what string, reached func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for !reached() {
		select {
		case <-deadline:
			t.Fatalf("still waiting after %s: %s", patience, what)
		case <-time.After(time.Millisecond):
		}
	}
}
