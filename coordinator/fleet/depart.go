package fleet

import (
	"context"
	"net"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

// OpenInline has connections asked for so that they come over the agents' streams'
// own gRPC connections from now on, and by this coordinator's address no more; but
// for agents that do not understand it. It returns once those that were asked for
// before have come, or have been given up, which takes 10 s at most, or ctx's error.
func (f *Fleet) OpenInline(ctx context.Context) error {
	f.mu.Lock()
	f.inline = true
	var dialed []*dialing
	for _, d := range f.pending {
		if !d.inline {
			dialed = append(dialed, d)
		}
	}
	f.mu.Unlock()
	for _, d := range dialed {
		select {
		case <-d.settled:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Depart tells the agents that the coordinator's addresses are another process's:
// they attach there as well, and at once. Their streams go on until Close, and
// connections are opened as with OpenInline, which is to be called before the
// addresses are given away. No agent can attach here any more. An agent that does not
// understand it stays, without a new connection: those that there are go on.
//
// It returns at once. To call it again does nothing.
func (f *Fleet) Depart() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hasDeparted() {
		return
	}
	f.inline = true
	close(f.departed)
	f.log.Info("departing: the agents attach to this coordinator's successor", "workers", len(f.list))
}

func (f *Fleet) hasDeparted() bool {
	select {
	case <-f.departed:
		return true
	default:
		return false
	}
}

// errDeparted is what an agent is told that reaches this process after all: it tries
// again, and reaches the other.
var errDeparted = status.Error(codes.Unavailable, "this coordinator is being replaced, and takes no workers any more")

// unreachable is why nothing can be opened to a worker.
func (w *Worker) unreachable(takesSlot bool) error {
	if takesSlot {
		return ErrNoSlot // another worker may have one
	}
	return status.Errorf(codes.Unavailable, "worker %s: its agent is of a version that a coordinator cannot reach which is being replaced", w.Name)
}

// Carry implements AgentService: the connection that an Open asked for, over the gRPC
// connection of the agent's stream.
func (f *Fleet) Carry(stream archfarmv1.AgentService_CarryServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	call := &carrying{stream: stream, ended: make(chan struct{})}
	local, remote := ends(stream.Context())
	conn := carried{tunnel.Over(call, local, remote), identity.FromContext(stream.Context())}
	if !f.accept(first.GetConnectionId(), conn) {
		return status.Error(codes.PermissionDenied, "carrying a connection: this agent was not asked for it, or not any more")
	}
	select {
	case <-call.ended:
		return nil // after which gRPC sends what has been written
	case <-stream.Context().Done():
		return status.FromContextError(stream.Context().Err()).Err()
	}
}

// carried is a connection that came by Carry.
type carried struct {
	*tunnel.Carried
	who identity.Identity
}

// Identity tells whose the connection is.
func (c carried) Identity() identity.Identity { return c.who }

// ends are the addresses of the gRPC connection that carries another.
func ends(ctx context.Context) (local, remote net.Addr) {
	local, remote = &net.UnixAddr{Net: "unix"}, &net.UnixAddr{Net: "unix"}
	if p, ok := peer.FromContext(ctx); ok {
		if p.LocalAddr != nil {
			local = p.LocalAddr
		}
		if p.Addr != nil {
			remote = p.Addr
		}
	}
	return local, remote
}

// carrying is the coordinator's end of Carry.
type carrying struct {
	stream archfarmv1.AgentService_CarryServer
	once   sync.Once
	ended  chan struct{}
}

// Send implements tunnel.Call.
func (c *carrying) Send(data []byte) error {
	return c.stream.Send(&archfarmv1.CarryResponse{Data: data})
}

// Receive implements tunnel.Call.
func (c *carrying) Receive() ([]byte, error) {
	m, err := c.stream.Recv()
	switch {
	case err != nil:
		return nil, err
	case len(m.GetData()) > tunnel.MaxChunk:
		c.End()
		return nil, status.Errorf(codes.InvalidArgument, "carrying a connection: %d bytes in one message, at most %d are possible", len(m.GetData()), tunnel.MaxChunk)
	}
	return m.GetData(), nil
}

// End implements tunnel.Call: the handler returns, with which gRPC ends the rest.
func (c *carrying) End() { c.once.Do(func() { close(c.ended) }) }
