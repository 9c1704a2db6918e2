package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/archfarm/archfarm/address"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// attachStream is the agent's side of AgentService.Attach.
type attachStream = grpc.BidiStreamingClient[archfarmv1.AttachRequest, archfarmv1.AttachResponse]

// stream is one Attach call.
type stream struct {
	link *link
	peer address.Address // of the coordinator, for the connections that it asks for

	coordinator   archfarmv1.AgentServiceClient // by the one connection of this stream,
	local, remote net.Addr                      // whose ends these are
	// tunnels is the life of those connections, which may be longer than the
	// stream's.
	tunnels context.Context

	rpc       attachStream
	giveUp    context.CancelCauseFunc // ends rpc
	heartbeat time.Duration           // 0 until the Welcome
	welcomed  time.Time

	answers chan *archfarmv1.AttachRequest // to the one goroutine that may send
	done    chan struct{}                  // closed when nothing is sent any more
}

// run says Hello, waits for the Welcome, and serves the stream until it ends.
// When ctx ends it ends its own side and gives the coordinator a moment to end
// the other.
func (s *stream) run(ctx context.Context) error {
	// Not a child of ctx, whose end is to be an orderly one.
	life, giveUp := context.WithCancelCause(context.WithoutCancel(ctx))
	s.giveUp = giveUp
	defer giveUp(nil)
	defer context.AfterFunc(ctx, func() {
		time.AfterFunc(leaveWithin, func() { giveUp(errLeft) })
	})()

	err := s.serve(ctx, life)
	if cause := context.Cause(life); cause != nil {
		return cause // says more than that the call was cancelled
	}
	if errors.Is(err, io.EOF) {
		return errors.New("the coordinator ended the stream")
	}
	return err
}

func (s *stream) serve(ctx, life context.Context) (err error) {
	impatience := time.AfterFunc(s.link.set.agent.timing.welcomeWithin, func() { s.giveUp(errNoWelcome) })
	defer impatience.Stop()
	if s.rpc, err = s.coordinator.Attach(life); err != nil {
		return fmt.Errorf("attaching: %w", err)
	}
	defer s.link.set.agent.gossip.forget(s.link)
	defer s.link.set.detached(s.link)
	if err := s.greet(life); err != nil {
		return err
	}
	impatience.Stop()
	s.link.log.Info("attached", "heartbeat", s.heartbeat)

	received := make(chan struct{})
	var reason error
	go func() {
		defer close(received)
		reason = s.receive(life)
	}()
	err = s.send(ctx, received)
	// Either side has ended: receive has returned, or returns when the
	// coordinator follows or patience ends.
	<-received
	if err == nil || errors.Is(err, io.EOF) {
		return reason // Send says EOF for whatever it was that ended the stream
	}
	return err
}

// greet sends the Hello and receives the Welcome.
func (s *stream) greet(life context.Context) error {
	hello := proto.CloneOf(s.link.set.agent.hello)
	hello.Report, _ = s.link.set.agent.slots.report()
	hello.AttachedTo = s.link.set.attachedTo(s.link)
	err := s.rpc.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: hello}})
	if err != nil && !errors.Is(err, io.EOF) { // EOF leaves the reason to Recv
		return fmt.Errorf("saying hello: %w", err)
	}
	first, err := s.rpc.Recv()
	if status.Code(err) == codes.AlreadyExists {
		return errDuplicate
	}
	if err != nil {
		return fmt.Errorf("saying hello: %w", err)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return fmt.Errorf("saying hello: the coordinator answered with %T instead of a welcome", first.GetMessage())
	}
	s.welcomed = time.Now()
	s.link.set.welcomed(s.link, welcome.GetCoordinatorId())
	s.heartbeat = min(time.Duration(welcome.GetHeartbeatSeconds())*time.Second, maxHeartbeat)
	if s.heartbeat == 0 {
		s.heartbeat = defaultHeartbeat
	}
	s.link.set.agent.gossip.welcome(life, s.link, welcome.GetGossipKeyring().GetKeys())
	return nil
}

// send is the only sender after greet: a report at once, after each change and
// each heartbeat, and answers, each behind a report: the coordinator hears of what
// has changed before it hears that it was done. It returns nil when the stream
// ended from the other side, or from this one because ctx ended.
func (s *stream) send(ctx context.Context, received <-chan struct{}) error {
	defer close(s.done)
	heartbeat := time.NewTicker(s.heartbeat)
	defer heartbeat.Stop()
	var answer *archfarmv1.AttachRequest
	for {
		report, changed := s.link.set.agent.slots.report()
		if err := s.sendOne(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Report{Report: report}}); err != nil {
			return err
		}
		if answer != nil {
			if err := s.sendOne(answer); err != nil {
				return err
			}
			answer = nil
		}
		select {
		case <-changed:
		case <-heartbeat.C:
		case answer = <-s.answers:
		case <-received:
			return nil
		case <-ctx.Done():
			return s.rpc.CloseSend()
		}
	}
}

// sendOne gives the stream up if the coordinator lets nothing through. gRPC
// buffers what the coordinator's machine accepts, so this sees a coordinator
// that stopped reading; that the machine is gone is seen by the kernel, see
// setUserTimeout.
func (s *stream) sendOne(m *archfarmv1.AttachRequest) error {
	t := time.AfterFunc(missedHeartbeats*s.heartbeat, func() { s.giveUp(errStalled) })
	defer t.Stop()
	return s.rpc.Send(m)
}

// receive serves what the coordinator asks for until the stream ends.
func (s *stream) receive(life context.Context) error {
	for {
		m, err := s.rpc.Recv()
		if err != nil {
			return err
		}
		if open := m.GetOpen(); open != nil {
			s.open(open)
		}
		if directive := m.GetDirective(); directive != nil {
			s.direct(life, directive)
		}
		if m.GetDeparting() != nil {
			s.depart()
		}
		// Whatever else there is, a newer coordinator says to newer agents.
	}
}

// depart has another link attach to the process that has the coordinator's address now.
func (s *stream) depart() {
	if !s.link.set.release(s.link, s.peer.String()) {
		s.link.log.Warn("the coordinator says that it is being replaced, as too many have said: not looking for its successor", "most", maxReleased)
		return
	}
	s.link.log.Info("the coordinator is being replaced: attaching to its successor as well")
	s.link.set.agent.gossip.forget(s.link) // the successor's keys are those that count
}

// refuse answers an Open.
func (s *stream) refuse(id string, cause archfarmv1.Refused_Cause, why string) {
	s.link.log.Debug("refusing a connection", "cause", cause.String(), "reason", why)
	s.answer(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Refused{
		Refused: &archfarmv1.Refused{ConnectionId: id, Cause: cause, Message: clip(why)},
	}})
}

// answer has m sent. It does not wait longer than the stream lives.
func (s *stream) answer(m *archfarmv1.AttachRequest) {
	select {
	case s.answers <- m:
	case <-s.done:
	}
}
