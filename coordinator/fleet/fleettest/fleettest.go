// Package fleettest attaches workers that exist only in a test to a real fleet:
// an agent with slots, and behind it whatever gRPC services the test gives it for
// a BuildKit daemon. Everything runs over connections in memory, so that a test
// may have a clock of its own (testing/synctest).
package fleettest

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/coordinator/fleet"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	heartbeat = time.Second
	buffer    = 1 << 16 // of a connection in memory, in bytes
)

// Door is where agents reach a fleet.
type Door struct {
	// Pool of the workers that attach from now on.
	Pool string

	fleet *fleet.Fleet
	l     *bufconn.Listener
}

// Serve opens a fleet's door until the test's end.
func Serve(t testing.TB, f *fleet.Fleet) *Door {
	d := &Door{fleet: f, l: bufconn.Listen(buffer)}
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	archfarmv1.RegisterAgentServiceServer(server, f)
	archfarmv1.RegisterFleetServiceServer(server, f)
	serve(t, server, d.l)
	return d
}

func serve(t testing.TB, server *grpc.Server, l net.Listener) {
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) }) // its end is the test's
	t.Cleanup(func() {
		server.Stop()
		running.Wait()
	})
}

// Worker is an attached worker.
type Worker struct {
	Name string

	door    *Door
	server  *grpc.Server
	stream  archfarmv1.AgentService_AttachClient
	leave   context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex // also held to send
	total   int
	used    int
	foreign int // slots that another coordinator has
	state   archfarmv1.Worker_State
	answer  func(*archfarmv1.Open) archfarmv1.Refused_Cause
	ends    map[net.Conn]struct{} // the worker's ends of what is open
	opened  int                   // connections so far
	further func(*archfarmv1.Report)
	deaf    bool // to directives
}

// Attach attaches a worker whose daemon serves what register registers. It leaves
// at the test's end.
func (d *Door) Attach(t testing.TB, name string, platforms []string, slots int, register func(*grpc.Server)) *Worker {
	t.Helper()
	w := &Worker{Name: name, door: d, server: grpc.NewServer(grpc.WaitForHandlers(true)), total: slots, state: archfarmv1.Worker_STATE_READY, ends: map[net.Conn]struct{}{}}
	register(w.server)
	cc, err := grpc.NewClient("passthrough:///fleet", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return d.l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context())) // ends in Cleanup, after t.Context has
	w.leave = cancel
	t.Cleanup(func() {
		w.Kill()
		_ = cc.Close()
		w.server.Stop()
		w.running.Wait()
	})
	if w.stream, err = archfarmv1.NewAgentServiceClient(cc).Attach(ctx); err != nil {
		t.Fatal(err)
	}
	w.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: &archfarmv1.Hello{
		Name: name, Platforms: platforms, Version: "test", BuildkitVersion: "test", Machine: platforms[0], Report: w.report(), Pool: d.Pool,
	}}})
	if _, err := w.stream.Recv(); err != nil {
		t.Fatal(err)
	}
	w.running.Go(w.receive)
	w.running.Go(func() { w.beat(ctx) })
	return w
}

// report is what the agent would report now. w.mu is held, or nobody else knows w.
func (w *Worker) report() *archfarmv1.Report {
	r := &archfarmv1.Report{State: w.state, Slots: &archfarmv1.Slots{Total: uint32(w.total), Used: uint32(w.used + w.foreign)}}
	if w.further != nil {
		w.further(r)
	}
	return r
}

// send says something unless the stream has ended. w.mu is held.
func (w *Worker) send(m *archfarmv1.AttachRequest) { _ = w.stream.Send(m) }

// tell sends a report. w.mu is held.
func (w *Worker) tell() {
	w.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Report{Report: w.report()}})
}

func (w *Worker) beat(ctx context.Context) {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			w.mu.Lock()
			w.tell()
			w.mu.Unlock()
		case <-ctx.Done():
			return
		}
	}
}

func (w *Worker) receive() {
	for {
		m, err := w.stream.Recv()
		if err != nil {
			return
		}
		if open := m.GetOpen(); open != nil {
			w.running.Go(func() { w.serve(open) })
		}
		if d := m.GetDirective(); d.GetReportNow() != nil {
			w.obey(d)
		}
	}
}

// obey reports, and answers.
func (w *Worker) obey(d *archfarmv1.Directive) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.deaf {
		return
	}
	w.tell()
	w.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Done{Done: &archfarmv1.Done{DirectiveId: d.GetId()}}})
}

// serve answers one Open and stays until the connection ends.
func (w *Worker) serve(open *archfarmv1.Open) {
	w.mu.Lock()
	answer := w.answer
	w.mu.Unlock()
	cause := archfarmv1.Refused_CAUSE_UNSPECIFIED
	if answer != nil {
		cause = answer(open)
	}
	theirs, ours := net.Pipe()
	end := &end{Conn: ours, closed: make(chan struct{})}
	if !w.take(open, cause, end) {
		return
	}
	w.door.fleet.Accept(open.GetConnectionId(), theirs)
	_ = w.server.Serve(&single{end: end}) // ends with the connection
	<-end.closed
	_ = end.Close()
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.ends, end)
	if open.GetTakesSlot() {
		w.used--
		w.tell()
	}
}

// take occupies a slot if one is asked for, or refuses.
func (w *Worker) take(open *archfarmv1.Open, cause archfarmv1.Refused_Cause, conn net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if open.GetTakesSlot() && w.used+w.foreign >= w.total {
		cause = archfarmv1.Refused_CAUSE_NO_SLOT
	}
	if cause != archfarmv1.Refused_CAUSE_UNSPECIFIED {
		w.send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Refused{Refused: &archfarmv1.Refused{
			ConnectionId: open.GetConnectionId(), Cause: cause, Message: "told to refuse",
		}}})
		return false
	}
	w.ends[conn] = struct{}{}
	w.opened++
	if open.GetTakesSlot() {
		w.used++
		w.tell()
	}
	return true
}

// Answer sets what the agent does with Opens: it refuses those for which f returns
// a cause. F may wait.
func (w *Worker) Answer(f func(*archfarmv1.Open) archfarmv1.Refused_Cause) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = f
}

// Occupy makes n slots another coordinator's, and reports so.
func (w *Worker) Occupy(n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.foreign = n
	w.tell()
}

// Report has further add to the reports from now on, and reports.
func (w *Worker) Report(further func(*archfarmv1.Report)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.further = further
	w.tell()
}

// Silently is Report without reporting now.
func (w *Worker) Silently(further func(*archfarmv1.Report)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.further = further
}

// Deafen makes the agent answer no directive any more.
func (w *Worker) Deafen() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deaf = true
}

// Become changes the worker's state, and reports so.
func (w *Worker) Become(state archfarmv1.Worker_State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state = state
	w.tell()
}

// Used is how many slots this coordinator has.
func (w *Worker) Used() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.used
}

// Open is how many connections there are.
func (w *Worker) Open() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.ends)
}

// Opened is how many connections there ever were.
func (w *Worker) Opened() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.opened
}

// Leave ends the agent's stream; connections stay.
func (w *Worker) Leave() { w.leave() }

// Cut ends every connection, as the end of the daemon does; the agent stays.
func (w *Worker) Cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.ends {
		_ = c.Close()
	}
}

// Kill ends the machine.
func (w *Worker) Kill() {
	w.leave()
	w.Cut()
}

// end is the worker's end of a connection.
type end struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
}

func (e *end) Read(p []byte) (int, error) {
	n, err := e.Conn.Read(p)
	if err != nil {
		e.once.Do(func() { close(e.closed) })
	}
	return n, err
}

func (e *end) Close() error {
	e.once.Do(func() { close(e.closed) })
	return e.Conn.Close()
}

// single is a listener of one connection.
type single struct {
	end    *end
	served bool
}

// Accept is called by one goroutine only.
func (l *single) Accept() (net.Conn, error) {
	if !l.served {
		l.served = true
		return l.end, nil
	}
	<-l.end.closed
	return nil, net.ErrClosed
}

// Close is the server's, when it is stopped or Accept has failed.
func (l *single) Close() error { return l.end.Close() }

func (l *single) Addr() net.Addr { return l.end.LocalAddr() }
