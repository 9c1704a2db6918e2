package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/archfarm/archfarm/address"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/enroll"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	// dialWithin bounds the connecting to a coordinator or to buildkitd.
	dialWithin = 10 * time.Second
	// leaveWithin is how long a coordinator may take to end a stream after the
	// agent has ended its side.
	leaveWithin = time.Second
	// unansweredWithin is how long the kernel may wait for the acknowledgement of
	// a heartbeat before it takes the coordinator's machine for gone.
	unansweredWithin = 10 * time.Second

	// duplicateRetry is the pause of a link whose coordinator another link leads to.
	duplicateRetry = time.Minute

	defaultHeartbeat = 5 * time.Second
	maxHeartbeat     = 5 * time.Minute
	// missedHeartbeats is how many intervals a message may wait to be sent.
	missedHeartbeats = 3
)

// Why the agent itself ended a stream.
var (
	errNoWelcome = errors.New("the coordinator does not answer the hello")
	errStalled   = errors.New("the coordinator does not read what the worker sends")
	errLeft      = errors.New("the agent is stopping")
)

// link keeps the worker attached to one coordinator.
type link struct {
	set    *attachments
	addr   address.Address
	log    *slog.Logger
	poked  chan struct{}
	wanted bool // guarded by attachments.mu

	// Of the goroutine of run:
	orphans *time.Timer        // ends tunnels after the stream is gone for long
	tunnels context.Context    // of the connections opened for this coordinator
	endAll  context.CancelFunc // ends tunnels
}

func newLink(s *attachments, a address.Address) *link {
	return &link{
		set: s, addr: a, wanted: true, poked: make(chan struct{}, 1),
		log: s.agent.cfg.Logger.With("coordinator", a.String()),
	}
}

// poke ends a wait between two attempts.
func (l *link) poke() {
	select {
	case l.poked <- struct{}{}:
	default:
	}
}

// run attaches again and again until ctx ends, or until nobody wants the link,
// or it is released, and its stream has ended.
func (l *link) run(ctx context.Context) {
	wait := newRetry()
	for {
		lasted, err := l.attach(ctx)
		if ctx.Err() != nil {
			return
		}
		if l.set.isOver(l) {
			l.log.Info("the coordinator that was replaced has ended", "reason", enroll.Explain(err))
			return
		}
		if lasted {
			wait.reset()
		}
		if l.set.retire(l) {
			l.log.Info("the coordinator left the farm")
			return
		}
		pause := wait.next()
		if errors.Is(err, errDuplicate) {
			pause = duplicateRetry // it is poked when that changes
		}
		l.report(err, pause)
		select {
		case <-time.After(pause):
		case <-l.poked:
			if l.set.retire(l) {
				l.log.Info("the coordinator left the farm")
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// report logs why the worker is not attached.
func (l *link) report(err error, pause time.Duration) {
	if errors.Is(err, errDuplicate) {
		l.log.Debug("not attaching", "reason", err)
		return
	}
	l.log.Warn("not attached: trying again", "error", enroll.Explain(err), "in", pause)
}

// attach dials the coordinator and serves one stream until it ends. lasted tells
// that the worker was accepted, and stayed for a heartbeat at least.
func (l *link) attach(ctx context.Context) (lasted bool, err error) {
	dialing, cancelDial := context.WithTimeout(ctx, dialWithin)
	defer cancelDial()
	conn, err := l.set.agent.dial(dialing, l.addr)
	if err != nil {
		return false, err
	}
	setUserTimeout(conn, unansweredWithin)
	// Further connections go where this one went, even if the name has several
	// addresses: another coordinator would not know what to do with them.
	peer := peerOf(conn, l.addr)
	if err := l.set.claim(peer.String(), l); err != nil {
		return false, errors.Join(err, conn.Close())
	}
	defer l.set.unclaim(peer.String(), l)

	cc, err := clientOver(conn)
	if err != nil {
		return false, errors.Join(fmt.Errorf("making a client: %w", err), conn.Close())
	}
	defer cc.Close() // and what is carried by it: who asked for that has ended, or cannot be reached

	defer l.orphan()
	s := &stream{
		link: l, peer: peer, local: conn.LocalAddr(), remote: conn.RemoteAddr(), tunnels: l.adopt(ctx), coordinator: archfarmv1.NewAgentServiceClient(cc),
		answers: make(chan *archfarmv1.AttachRequest), done: make(chan struct{}),
	}
	err = s.run(ctx)
	return s.heartbeat > 0 && time.Since(s.welcomed) >= s.heartbeat, err
}

// adopt returns the life of this coordinator's connections: that of the ones
// which still run, as it is back, or a new one.
func (l *link) adopt(ctx context.Context) context.Context {
	if l.orphans == nil || !l.orphans.Stop() {
		l.tunnels, l.endAll = context.WithCancel(ctx)
	}
	return l.tunnels
}

// orphan gives the running connections the time to end by themselves.
func (l *link) orphan() {
	l.orphans = time.AfterFunc(l.set.agent.timing.orphanAfter, l.endAll)
}

// clientOver speaks gRPC over one connection, and never dials another.
func clientOver(conn net.Conn) (*grpc.ClientConn, error) {
	unused := make(chan net.Conn, 1)
	unused <- conn
	return grpc.NewClient("passthrough:///coordinator",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case conn := <-unused:
				return conn, nil
			default:
				return nil, net.ErrClosed
			}
		}))
}

// peerOf is the address that conn really leads to.
func peerOf(conn net.Conn, dialed address.Address) address.Address {
	if dialed.Network != "tcp" {
		return dialed
	}
	return address.Address{Network: dialed.Network, Addr: conn.RemoteAddr().String()}
}
