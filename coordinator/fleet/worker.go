package fleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/identity"
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
	Pool            string            // that of its certificate, where it has one
	Labels          map[string]string // not modified
	Address         string            // the agent's end of the stream
	Since           time.Time

	id            string
	platformNames []string
	who           identity.Identity
	inline        bool // its agent understands Departing and Open.inline
	fleet         *Fleet
	outbox        chan *archfarmv1.AttachResponse
	gone          chan struct{}
	leaveOnce     sync.Once
	farewell      error // what its agent is told when the fleet ended its stay; set before gone is closed
	now           atomic.Pointer[present]

	refusals   answers // of Opens
	directives answers

	mu      sync.Mutex
	control *Conn // shared, for calls that belong to no attempt
}

// ID is unique to this stay of the worker in the fleet.
func (w *Worker) ID() string { return w.id }

// Report returns the worker's slots, state and load as its agent last told, bounded
// and checked. It is not to be modified.
func (w *Worker) Report() *archfarmv1.Report { return w.now.Load().report }

// Reported is when that report arrived.
func (w *Worker) Reported() time.Time { return w.now.Load().at }

// Emulated returns the platforms that the machine can only emulate, normalised, as
// last reported. The slice is not to be modified, and the same until they change.
func (w *Worker) Emulated() []ocispecs.Platform { return w.now.Load().emulated }

// Load returns how busy the machine is, as last reported: shares within 0 to 1, and
// no more free than there is; nil where the agent does not tell.
func (w *Worker) Load() *archfarmv1.Load { return w.now.Load().report.GetLoad() }

// Gone is closed when the worker's agent has left the fleet.
func (w *Worker) Gone() <-chan struct{} { return w.gone }

// leave ends the worker's stay; the agent is told why unless it has gone itself.
func (w *Worker) leave(why error) {
	w.leaveOnce.Do(func() {
		w.farewell = why
		close(w.gone)
	})
}

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
	id, asked := w.fleet.expect(w)
	if asked == nil {
		return nil, w.unreachable(takesSlot)
	}
	defer w.fleet.forget(id, asked)
	refused := w.refusals.expect(id)
	defer w.refusals.forget(id)

	ctx, cancel := context.WithTimeoutCause(ctx, openTimeout,
		status.Errorf(codes.Unavailable, "worker %s opened no connection within %s", w.Name, openTimeout))
	defer cancel()
	request := &archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Open{
		Open: &archfarmv1.Open{ConnectionId: id, TakesSlot: takesSlot, Inline: asked.inline},
	}}
	select {
	case w.outbox <- request:
	case <-w.gone:
		return nil, w.left()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	select {
	case conn := <-asked.back:
		return conn, nil
	case err := <-refused:
		return nil, err
	case <-w.gone:
		return nil, w.left()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (w *Worker) refuse(r *archfarmv1.Refused) {
	why := ErrNoSlot
	if c := r.GetCause(); c != archfarmv1.Refused_CAUSE_NO_SLOT && c != archfarmv1.Refused_CAUSE_DRAINING {
		why = status.Errorf(codes.Unavailable, "worker %s: %s", w.Name, text(r.GetMessage()))
	}
	w.refusals.give(r.GetConnectionId(), why)
}
