package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
)

// errBusy is why a connection was not carried.
var errBusy = errors.New("the connection to the coordinator has as many calls as it may have")

// inline makes a connection to the coordinator without dialing: by a call beside the
// stream, with which it ends at the latest.
func (s *stream) inline(ctx context.Context, id string) (net.Conn, error) {
	ctx, end := context.WithCancelCause(ctx)
	impatience := time.AfterFunc(dialWithin, func() { end(errBusy) })
	call := &carrying{end: func() { end(nil) }}
	var err error
	if call.rpc, err = s.coordinator.Carry(ctx); err == nil {
		err = call.rpc.Send(&archfarmv1.CarryRequest{Message: &archfarmv1.CarryRequest_ConnectionId{ConnectionId: id}})
	}
	if !impatience.Stop() {
		err = errBusy
	}
	if err != nil {
		end(nil)
		return nil, fmt.Errorf("carrying a connection: %w", err)
	}
	return tunnel.Over(call, s.local, s.remote), nil
}

// carrying is the agent's end of AgentService.Carry.
type carrying struct {
	rpc grpc.BidiStreamingClient[archfarmv1.CarryRequest, archfarmv1.CarryResponse]
	end context.CancelFunc
}

// Send implements tunnel.Call.
func (c *carrying) Send(data []byte) error {
	return c.rpc.Send(&archfarmv1.CarryRequest{Message: &archfarmv1.CarryRequest_Data{Data: data}})
}

// Receive implements tunnel.Call.
func (c *carrying) Receive() ([]byte, error) {
	m, err := c.rpc.Recv()
	if err != nil {
		return nil, err
	}
	return m.GetData(), nil
}

// CloseSend ends the agent's half.
func (c *carrying) CloseSend() error { return c.rpc.CloseSend() }

// End implements tunnel.Call.
func (c *carrying) End() { c.end() }
