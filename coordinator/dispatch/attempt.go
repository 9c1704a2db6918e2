package dispatch

import (
	"context"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/buildid"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"go.opentelemetry.io/otel/propagation"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/trace"
)

const (
	// statusGrace bounds the wait for the rest of a worker's status stream once
	// its solve has ended.
	statusGrace = 3 * time.Second
	// TimestampHeader carries a daemon's clock, in RFC 3339 with nanoseconds, on its
	// streams of progress and history (BuildKit control/control.go).
	TimestampHeader = "buildkit-current-timestamp"
)

// Attempt is one try of a leg on one worker: a solve of its own there, with its
// status stream, over a connection that holds one of the worker's slots.
type Attempt struct {
	ref     string
	conn    *fleet.Conn
	control controlapi.ControlClient
	gateway gwpb.LLBBridgeClient
	cancel  context.CancelFunc
	failure func(error) error // the observer's

	solved   chan struct{} // closed when response and err are set
	response *controlapi.SolveResponse
	err      error
	status   chan struct{} // closed when the status stream has ended
}

// observer is told of an attempt's progress.
type observer interface {
	clock(skew time.Duration)
	progress(*controlapi.StatusResponse)
	solved(err error)        // by itself, that is: not for a solve that was stopped
	failure(err error) error // a worker's error, as the client should see it
}

// startAttempt begins the solve. It runs until it ends by itself, ctx ends, or
// finish is called, which must happen in any case.
func startAttempt(ctx context.Context, conn *fleet.Conn, req *controlapi.SolveRequest, to observer) *Attempt {
	ctx, cancel := context.WithCancel(ctx)
	a := &Attempt{
		ref: req.GetRef(), conn: conn, cancel: cancel,
		control: controlapi.NewControlClient(conn), gateway: gwpb.NewLLBBridgeClient(conn),
		solved: make(chan struct{}), status: make(chan struct{}), failure: to.failure,
	}
	go func() {
		defer close(a.solved)
		a.response, a.err = a.control.Solve(outgoing(ctx), req)
		a.err = to.failure(a.err)
		if lost := conn.Lost(); a.err != nil && lost != nil {
			a.err = lost
		}
		if ctx.Err() == nil {
			to.solved(a.err)
		}
	}()
	go func() {
		defer close(a.status)
		a.follow(ctx, to)
	}()
	return a
}

// follow relays the status stream. Its errors are the solve's too, which tells
// them better.
func (a *Attempt) follow(ctx context.Context, to observer) {
	stream, err := a.control.Status(outgoing(ctx), &controlapi.StatusRequest{Ref: a.ref})
	if err != nil {
		return
	}
	if header, err := stream.Header(); err == nil {
		if skew, ok := clockSkew(header, time.Now()); ok {
			to.clock(skew)
		}
	}
	for {
		message, err := stream.Recv()
		if err != nil {
			return
		}
		to.progress(message)
	}
}

// clockSkew is what must be added to a worker's times to make them the
// coordinator's.
func clockSkew(header metadata.MD, now time.Time) (time.Duration, bool) {
	values := header.Get(TimestampHeader)
	if len(values) != 1 {
		return 0, false
	}
	theirs, err := time.Parse(time.RFC3339Nano, values[0])
	if err != nil {
		return 0, false
	}
	return now.Sub(theirs), true
}

// wait returns what the solve returned.
func (a *Attempt) wait(ctx context.Context) (*controlapi.SolveResponse, error) {
	select {
	case <-a.solved:
		return a.response, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// finish ends the attempt, after the rest of its status when it has ended by
// itself. Its connection, and with it the slot, stays.
func (a *Attempt) finish() {
	select {
	case <-a.solved:
		select {
		case <-a.status:
		case <-time.After(statusGrace):
		case <-a.conn.Down():
		}
	default:
	}
	a.cancel()
	<-a.solved
	<-a.status
}

// call runs one of the build's gateway calls on the worker. It ends with the
// attempt: when the solve itself fails, that is the error to report.
func call[Req, Resp any](ctx context.Context, a *Attempt, f func(context.Context, Req, ...grpc.CallOption) (Resp, error), req Req) (Resp, error) {
	ctx, cancel := context.WithCancel(buildid.AppendToOutgoingContext(outgoing(ctx), a.ref))
	defer cancel()
	type answer struct {
		resp Resp
		err  error
	}
	answered := make(chan answer, 1)
	go func() { // ends with the call, which ends with ctx at the latest
		resp, err := f(ctx, req)
		answered <- answer{resp, a.failure(err)}
	}()
	select {
	case got := <-answered:
		if lost := a.conn.Lost(); got.err != nil && lost != nil {
			return got.resp, lost
		}
		return got.resp, got.err
	case <-a.solved:
	}
	var none Resp
	if a.err != nil {
		return none, a.err
	}
	got := <-answered
	return got.resp, got.err
}

// outgoing drops the client's metadata, which names the farm's build, not the
// leg's; but what the worker traces is part of the client's trace.
func outgoing(ctx context.Context) context.Context {
	keys := propagation.MapCarrier{}
	trace.Propagator.Inject(ctx, keys)
	return metadata.NewOutgoingContext(ctx, metadata.New(keys))
}
