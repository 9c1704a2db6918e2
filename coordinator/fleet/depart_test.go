package fleet_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"testing/synctest"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

// modern is a Hello of an agent that understands Departing.
func modern(name string) *archfarmv1.Hello {
	h := hello(name)
	h.InlineConnections = true
	return h
}

// agentCall is the agent's end of Carry.
type agentCall struct {
	archfarmv1.AgentService_CarryClient
}

func (c agentCall) Send(data []byte) error {
	return c.AgentService_CarryClient.Send(&archfarmv1.CarryRequest{Message: &archfarmv1.CarryRequest_Data{Data: data}})
}

func (c agentCall) Receive() ([]byte, error) {
	m, err := c.Recv()
	return m.GetData(), err
}

func (c agentCall) End() { _ = c.CloseSend() }

// carry answers an Open as an agent does, by Carry.
func (f *farm) carry(t *testing.T, id string) archfarmv1.AgentService_CarryClient {
	t.Helper()
	call, err := archfarmv1.NewAgentServiceClient(f.dial(t)).Carry(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := call.Send(&archfarmv1.CarryRequest{Message: &archfarmv1.CarryRequest_ConnectionId{ConnectionId: id}}); err != nil {
		t.Fatal(err)
	}
	return call
}

// departs waits for the coordinator to say that it is being replaced.
func (a *agent) departs(t *testing.T) {
	t.Helper()
	m, err := a.stream.Recv()
	if err != nil || m.GetDeparting() == nil {
		t.Fatalf("the coordinator says %v, %v", m, err)
	}
}

func TestDepart_ConnectionsComeByTheStreamsOwn(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.enter(t, modern("amd-1"))
		if err := f.OpenInline(t.Context()); err != nil {
			t.Fatal(err)
		}
		f.Depart()
		f.Depart() // does nothing
		a.departs(t)
		go a.listen()

		b := &buildkit{blocked: make(chan struct{}, 1)}
		conns := make(chan *fleet.Conn, 1)
		go func() { conns <- must(t, w.Take) }()
		open := <-a.opens
		if !open.GetInline() || !open.GetTakesSlot() {
			t.Errorf("asked for %v", open)
		}
		b.over(t, f.carry(t, open.GetConnectionId()))
		c := <-conns
		if err := answers(t, c); err != nil {
			t.Error(err)
		}
		f.Evict("amd-1", errors.New("revoked"))
		synctest.Wait()
		lost(t, c.Lost(), "amd-1")
		_ = c.Close()
	})
}

func TestDepart_NobodyElseCarries(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.as = identity.Identity{Kind: identity.Worker, Name: "amd-1", Pools: []string{"default"}}
		a, w := f.enter(t, modern("amd-1"))
		f.Depart()
		a.departs(t)
		go a.listen()
		go func() { _, _ = w.Dial(t.Context()) }()
		open := <-a.opens
		f.as = identity.Identity{Kind: identity.Worker, Name: "mallory", Pools: []string{"default"}}
		for what, id := range map[string]string{"another worker": open.GetConnectionId(), "who guesses": "x"} {
			if _, err := f.carry(t, id).Recv(); status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

func TestDepart_AnOlderAgentStaysWithoutNewConnections(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.attach(t, "amd-1")
		b := a.works()
		before := must(t, w.Dial)
		f.Depart()
		synctest.Wait()
		if err := answers(t, before); err != nil {
			t.Errorf("what there was: %v", err)
		}
		if _, err := w.Take(t.Context()); !errors.Is(err, fleet.ErrNoSlot) {
			t.Errorf("a slot: %v", err)
		}
		if _, err := w.Dial(t.Context()); status.Code(err) != codes.Unavailable {
			t.Errorf("a connection: %v", err)
		}
		if len(b.conns) != 1 {
			t.Errorf("the agent was asked for %d connections", len(b.conns))
		}
		if err := before.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestDepart_NobodyAttachesAnyMore(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.Depart()
		_, _, err := f.knock(t, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: modern("late")}})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("attaching to what has departed: %v", err)
		}
	})
}

// TestOpenInline_WaitsForWhatIsBeingDialed: that comes by the address, which is about to be another process's.
func TestOpenInline_WaitsForWhatIsBeingDialed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, w := f.enter(t, modern("amd-1"))
		go a.listen()
		conns, settled := make(chan *fleet.Conn, 1), make(chan error, 1)
		go func() { conns <- must(t, w.Dial) }()
		open := <-a.opens
		if open.GetInline() {
			t.Error("asked for a carried connection before its time")
		}
		go func() { settled <- f.OpenInline(t.Context()) }()
		synctest.Wait()
		select {
		case err := <-settled:
			t.Fatalf("it did not wait: %v", err)
		default:
		}
		ours, theirs := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, ours) }()
		f.Accept(open.GetConnectionId(), theirs)
		if err := <-settled; err != nil {
			t.Error(err)
		}
		c := <-conns
		_ = ours.Close()
		_ = c.Close()
	})
}

// over serves a daemon's end of a carried connection.
func (b *buildkit) over(t *testing.T, call archfarmv1.AgentService_CarryClient) {
	t.Helper()
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	controlapi.RegisterControlServer(server, b)
	at := &net.UnixAddr{Net: "unix"}
	end := &backend{Conn: tunnel.Over(agentCall{call}, at, at), closed: make(chan struct{})}
	l := &one{conn: make(chan net.Conn, 1), end: end}
	l.conn <- end
	serve(t, server, l)
}
