package fleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Worker is one attached worker: a BuildKit daemon, reached through its agent.
// It lives as long as its agent's stream; a worker that comes back is a new one.
type Worker struct {
	Name            string
	Platforms       []ocispecs.Platform // native, normalised, best first
	Version         string              // of the agent
	BuildKitVersion string
	Machine         string
	Address         string // the agent's end of the stream
	Since           time.Time

	id            string
	platformNames []string
	fleet         *Fleet
	outbox        chan *archfarmv1.AttachResponse
	gone          chan struct{}
	leaveOnce     sync.Once
	report        *archfarmv1.Report // guarded by fleet.mu
	reported      time.Time          // likewise

	mu      sync.Mutex
	asked   map[string]chan<- error // Opens not answered yet, by connection id
	control *Conn                   // shared, for calls that belong to no attempt
}

// ID is unique to this stay of the worker in the fleet.
func (w *Worker) ID() string { return w.id }

// Report returns the worker's slots and state as its agent last told. Only the
// fleet's changed callback may call it: it runs under the fleet's lock.
func (w *Worker) Report() *archfarmv1.Report { return w.report }

// Reported is when that report arrived; for the same callers.
func (w *Worker) Reported() time.Time { return w.reported }

// Gone is closed when the worker's agent has left the fleet.
func (w *Worker) Gone() <-chan struct{} { return w.gone }

func (w *Worker) leave() { w.leaveOnce.Do(func() { close(w.gone) }) }

// Dial opens a connection to the worker's BuildKit that takes no slot.
func (w *Worker) Dial(ctx context.Context) (*Conn, error) { return w.dial(ctx, false) }

// Take opens a connection to the worker's BuildKit that occupies one of its
// slots until it is closed. ErrNoSlot: the agent has none left.
func (w *Worker) Take(ctx context.Context) (*Conn, error) { return w.dial(ctx, true) }

// Control returns a connection, shared by all callers, for short calls that
// belong to no attempt. It is opened at first use and again when it broke, and
// ends when the worker leaves the fleet.
func (w *Worker) Control(ctx context.Context) (*Conn, error) {
	w.mu.Lock()
	conn := w.control
	w.mu.Unlock()
	if conn != nil && conn.Lost() == nil {
		return conn, nil
	}
	fresh, err := w.Dial(ctx)
	if err != nil {
		return nil, err
	}
	shared, surplus := w.share(fresh)
	if surplus != nil {
		_ = surplus.Close()
	}
	if shared == nil {
		return nil, w.left()
	}
	return shared, nil
}

// share makes a fresh connection the one that Control returns, unless somebody
// was quicker or the worker has left meanwhile (nil). Surplus is to be closed.
func (w *Worker) share(fresh *Conn) (shared, surplus *Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.gone:
		return nil, fresh
	default:
	}
	if w.control != nil && w.control.Lost() == nil {
		return w.control, fresh
	}
	surplus, w.control = w.control, fresh
	return fresh, surplus
}

// closeControl ends the shared connection of a worker that has left.
func (w *Worker) closeControl() {
	w.mu.Lock()
	conn := w.control
	w.control = nil
	w.mu.Unlock()
	if conn != nil {
		_ = conn.Close()
	}
}

func (w *Worker) left() error {
	return &build.LostError{Worker: w.Name, Cause: errors.New("its agent left")}
}

func (w *Worker) dial(ctx context.Context, takesSlot bool) (*Conn, error) {
	raw, err := w.open(ctx, takesSlot)
	if err != nil {
		return nil, err
	}
	conn := &Conn{worker: w, raw: raw, down: make(chan struct{})}
	handedOut := false
	conn.ClientConn, err = grpc.NewClient("passthrough:///"+w.Name,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // the tunnel's security is its carrier's
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize), grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if handedOut { // dialers are called one at a time
				return nil, errors.New("the connection to the worker ended")
			}
			handedOut = true
			return &watchedConn{Conn: raw, owner: conn}, nil
		}))
	if err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("connecting to BuildKit on worker %s: %w", w.Name, err)
	}
	if !w.fleet.keep(conn) {
		_ = conn.Close()
		return nil, w.left()
	}
	conn.ClientConn.Connect()
	return conn, nil
}

// open asks the agent for a connection and waits for it to come back.
func (w *Worker) open(ctx context.Context, takesSlot bool) (net.Conn, error) {
	id, back := w.fleet.expect()
	defer w.fleet.forget(id, back)
	refused := w.expectRefusal(id)
	defer w.forgetRefusal(id)

	ctx, cancel := context.WithTimeoutCause(ctx, openTimeout,
		status.Errorf(codes.Unavailable, "worker %s opened no connection within %s", w.Name, openTimeout))
	defer cancel()
	request := &archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Open{
		Open: &archfarmv1.Open{ConnectionId: id, TakesSlot: takesSlot},
	}}
	select {
	case w.outbox <- request:
	case <-w.gone:
		return nil, w.left()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case conn := <-back:
		return conn, nil
	case err := <-refused:
		return nil, err
	case <-w.gone:
		return nil, w.left()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (w *Worker) expectRefusal(id string) <-chan error {
	refused := make(chan error, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked == nil {
		w.asked = map[string]chan<- error{}
	}
	w.asked[id] = refused
	return refused
}

func (w *Worker) forgetRefusal(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.asked, id)
}

func (w *Worker) refuse(r *archfarmv1.Refused) {
	w.mu.Lock()
	refused, ok := w.asked[r.GetConnectionId()]
	delete(w.asked, r.GetConnectionId())
	w.mu.Unlock()
	if !ok {
		return
	}
	switch r.GetCause() {
	case archfarmv1.Refused_CAUSE_NO_SLOT, archfarmv1.Refused_CAUSE_DRAINING:
		refused <- ErrNoSlot
	default:
		refused <- status.Errorf(codes.Unavailable, "worker %s: %s", w.Name, text(r.GetMessage()))
	}
}
