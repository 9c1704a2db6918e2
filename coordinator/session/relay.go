package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// maxMessage is BuildKit's cap for a message of a session.
	maxMessage = 16 << 20
	// findTimeout bounds the wait for a client's session: BuildKit's own is 5 s.
	findTimeout = 5 * time.Second

	healthCheck = "/grpc.health.v1.Health/Check"
)

// serving is an encoded HealthCheckResponse{SERVING}.
var serving = []byte{0x08, 0x01}

// Worker is where a session can be exposed: Dial opens a connection of its own
// to the worker's BuildKit, so that one session's bulk data stalls no other's.
type Worker interface {
	ID() string
	Dial(ctx context.Context) (Conn, error)
}

// Conn is a connection to BuildKit that can be closed.
type Conn interface {
	grpc.ClientConnInterface
	Close() error
}

// Relays exposes sessions on workers. A session is exposed once on a worker,
// whatever number of attempts use it there: BuildKit knows a session by its id,
// and a second connection of that id would replace the first.
type Relays struct {
	registry *Registry
	log      *slog.Logger

	mu     sync.Mutex
	active map[relayKey]*relay
}

type relayKey struct{ worker, session string }

// NewRelays returns relays for the sessions of a registry.
func NewRelays(registry *Registry, log *slog.Logger) *Relays {
	return &Relays{registry: registry, log: log, active: map[relayKey]*relay{}}
}

// Expose makes the client's session known on the worker until release is
// called, the client ends it, or the worker is lost. It returns once the worker
// has the connection. Release waits for the relay's end when it is its last user's.
func (rs *Relays) Expose(ctx context.Context, w Worker, id string) (release func(), err error) {
	key := relayKey{w.ID(), id}
	rs.mu.Lock()
	r, ok := rs.active[key]
	if !ok {
		r = newRelay(rs.log.With("session", id, "worker", w.ID()))
		rs.active[key] = r
	}
	r.users++
	rs.mu.Unlock()

	release = sync.OnceFunc(func() { rs.release(key, r) })
	if !ok {
		go r.run(context.WithoutCancel(ctx), rs.registry, w, id) // serves later users too, hence not under this one's context
	}
	select {
	case <-r.ready:
	case <-ctx.Done():
		release()
		return nil, context.Cause(ctx)
	}
	if r.err != nil {
		release()
		return nil, fmt.Errorf("relaying the client's session to worker %s: %w", w.ID(), r.err)
	}
	return release, nil
}

func (rs *Relays) release(key relayKey, r *relay) {
	rs.mu.Lock()
	r.users--
	last := r.users == 0
	if last && rs.active[key] == r {
		delete(rs.active, key)
	}
	rs.mu.Unlock()
	if last {
		r.cancel()
		<-r.ended
	}
}

// relay is one session on one worker.
type relay struct {
	log    *slog.Logger
	users  int           // guarded by Relays.mu
	ready  chan struct{} // closed once the worker has the session, or err is set
	err    error
	stop   chan struct{}
	cancel func()
	ended  chan struct{}

	client  *grpc.ClientConn
	streams sync.WaitGroup
}

func newRelay(log *slog.Logger) *relay {
	r := &relay{log: log, ready: make(chan struct{}), stop: make(chan struct{}), ended: make(chan struct{})}
	r.cancel = sync.OnceFunc(func() { close(r.stop) })
	return r
}

// run connects the two ends and serves until stopped, or one of them is gone.
func (r *relay) run(ctx context.Context, registry *Registry, w Worker, id string) {
	defer close(r.ended)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with run, which cancels
		select {
		case <-r.stop:
			cancel()
		case <-ctx.Done():
		}
	}()

	conn, session, closeWorker, err := r.connect(ctx, registry, w, id)
	if err != nil {
		r.err = err
		close(r.ready)
		return
	}
	defer closeWorker()
	close(r.ready)

	server := grpc.NewServer(
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.UnknownServiceHandler(r.handle),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
	)
	listener := newSingleListener(conn)
	defer context.AfterFunc(session, func() { // the client's end of the session
		server.Stop()
		_ = listener.Close()
	})()
	defer context.AfterFunc(ctx, func() {
		server.Stop()
		_ = listener.Close()
	})()
	if err := server.Serve(listener); err != nil && !errors.Is(err, errListenerDone) && !errors.Is(err, grpc.ErrServerStopped) {
		r.log.Debug("session relay ended", "error", err)
	}
	server.Stop()
	r.streams.Wait()
}

// connect finds the client's session, then opens a session of the same id and
// description on the worker. The context it returns ends with the client's session.
func (r *relay) connect(ctx context.Context, registry *Registry, w Worker, id string) (net.Conn, context.Context, func(), error) {
	findCtx, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	caller, meta, err := registry.find(findCtx, id)
	if err != nil {
		return nil, nil, nil, err
	}
	cc, err := w.Dial(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	conn, err := grpchijack.Dialer(controlapi.NewControlClient(cc))(ctx, "h2c", meta)
	if err != nil {
		_ = cc.Close()
		return nil, nil, nil, err
	}
	r.client = caller.Conn()
	return conn, caller.Context(ctx), func() { _ = cc.Close() }, nil
}

// handle relays one call of the worker to the client, whatever its service.
func (r *relay) handle(_ any, worker grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(worker)
	if !ok {
		return status.Error(codes.Internal, "relaying a session: a call without a method")
	}
	if method == healthCheck { // how the worker learns that the relay lives; the client has its own check
		return answerHealth(worker)
	}
	ctx, cancel := context.WithCancel(worker.Context())
	defer cancel()
	md, _ := metadata.FromIncomingContext(ctx)
	client, err := r.client.NewStream(metadata.NewOutgoingContext(ctx, forwarded(md)),
		&grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		return err
	}
	r.streams.Add(1)
	go func() { // ends with the worker's stream: at the latest when this handler has returned
		defer r.streams.Done()
		if err := copyFrames(client, worker); err == nil {
			_ = client.CloseSend()
		} else {
			cancel()
		}
	}()
	return answer(worker, client)
}

// answer copies the client's messages, header and trailer to the worker.
func answer(worker grpc.ServerStream, client grpc.ClientStream) error {
	header, err := client.Header()
	if err == nil && header.Len() > 0 {
		if err := worker.SetHeader(forwarded(header)); err != nil {
			return err
		}
	}
	err = copyFrames(worker, client)
	worker.SetTrailer(forwarded(client.Trailer()))
	return err
}

type sender interface{ SendMsg(any) error }
type receiver interface{ RecvMsg(any) error }

// copyFrames moves messages until the source ends (nil) or one side fails.
func copyFrames(to sender, from receiver) error {
	for {
		var f frame
		if err := from.RecvMsg(&f); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := to.SendMsg(&f); err != nil {
			return err
		}
	}
}

func answerHealth(worker grpc.ServerStream) error {
	var request frame
	if err := worker.RecvMsg(&request); err != nil {
		return err
	}
	request.data.Free()
	return worker.SendMsg(&frame{data: bufferSlice(serving)})
}

// forwarded is the metadata that describes the call itself, without what
// describes the connection it came by.
func forwarded(md metadata.MD) metadata.MD {
	out := metadata.MD{}
	for key, values := range md {
		switch {
		case strings.HasPrefix(key, ":"), strings.HasPrefix(key, "grpc-"),
			key == "content-type", key == "user-agent", key == "te":
		default:
			out[key] = values
		}
	}
	return out
}
