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

	"github.com/containerd/containerd/v2/defaults"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	// findTimeout is how long BuildKit waits for a client's session, too.
	findTimeout = 5 * time.Second
	// farewell is how long a worker may take to let go of a session.
	farewell = 2 * time.Second

	healthCheck = "/grpc.health.v1.Health/Check"
	// writeSize is how much is written to a worker at once. Each write becomes a
	// message; with gRPC's 32 KiB its encoding, a little longer, would take a buffer
	// from the pool of the next size, which is 1 MiB and cleared each time.
	writeSize = 32<<10 - 64
)

// serving is an encoded HealthCheckResponse{SERVING}.
var serving = []byte{0x08, 0x01}

// Worker is where a session can be exposed: Dial opens a connection of its own
// to the worker's BuildKit, so that one session's bulk data stalls no other's.
type Worker interface {
	ID() string
	Dial(ctx context.Context) (Conn, error)
}

// Conn is a connection to BuildKit that can be closed. Lost tells why it ended
// otherwise, if it did.
type Conn interface {
	grpc.ClientConnInterface
	Close() error
	Lost() error
}

// Relays exposes sessions on workers. A session is exposed once on a worker,
// whatever number of attempts use it there: BuildKit knows a session by its id,
// and a second connection of that id would replace the first.
type Relays struct {
	// Metrics, if any, count what is relayed. Set them before the first use.
	Metrics *Metrics

	registry   *Registry
	log        *slog.Logger
	findWithin time.Duration // bounds the wait for a client's session
	farewell   time.Duration // bounds the wait for a worker that is to let go of one

	mu      sync.Mutex
	active  map[relayKey]*relay
	aliases map[string]alias
}

type relayKey struct{ worker, session string }

// NewRelays returns relays for the sessions of a registry.
func NewRelays(registry *Registry, log *slog.Logger) *Relays {
	return &Relays{registry: registry, log: log, findWithin: findTimeout, farewell: farewell, active: map[relayKey]*relay{}, aliases: map[string]alias{}}
}

// Expose makes the client's session, or an alias of it, known on the worker until
// release is called, the client ends it, or the worker is lost. It returns once the
// worker has the connection. Release waits for the relay's end when it is its last
// user's. NotFound: the client has not opened the session within five seconds.
func (rs *Relays) Expose(ctx context.Context, w Worker, id string) (release func(), err error) {
	key := relayKey{w.ID(), id}
	r, fresh, err := rs.use(ctx, key)
	if err != nil {
		return nil, err
	}
	release = sync.OnceFunc(func() { rs.release(key, r) })
	if fresh {
		go r.run(context.WithoutCancel(ctx), rs.registry, w, id, rs.real(id)) // serves later users too, hence not under this one's context
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

// Share says that several workers may come to want the same files of a session, or
// of that which an alias stands for: from now on until it ends, the client is asked
// for each once. Two workers that have a session at the same time share it anyway.
func (rs *Relays) Share(id string) { rs.registry.share(rs.real(id).session) }

// use adds a user to the relay of that key, made if there is none that still
// serves. One that is just ending is waited for: the worker forgets a session when
// a connection of that id ends, even if there is a new one by then.
func (rs *Relays) use(ctx context.Context, key relayKey) (r *relay, fresh bool, err error) {
	for {
		r, fresh, ending := rs.join(key)
		if ending == nil {
			return r, fresh, nil
		}
		select {
		case <-ending:
		case <-ctx.Done():
			return nil, false, context.Cause(ctx)
		}
	}
}

func (rs *Relays) join(key relayKey) (r *relay, fresh bool, ending <-chan struct{}) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	r, ok := rs.active[key]
	if ok && !r.over() && r.users == 0 {
		return nil, false, r.ended
	}
	if !ok || r.over() { // one that has ended by itself keeps its users until they release it
		r, fresh = rs.relay(key), true
		rs.active[key] = r
	}
	r.users++
	return r, fresh, nil
}

func (rs *Relays) release(key relayKey, r *relay) {
	rs.mu.Lock()
	r.users--
	last := r.users == 0
	rs.mu.Unlock()
	if !last {
		return
	}
	close(r.stop)
	<-r.ended
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.active[key] == r {
		delete(rs.active, key)
	}
}

// relay is one session on one worker.
type relay struct {
	log        *slog.Logger
	findWithin time.Duration
	farewell   time.Duration

	users int           // guarded by Relays.mu
	ready chan struct{} // closed once the worker has the session, or err is set
	err   error
	stop  chan struct{} // closed when the last user has released it
	ended chan struct{} // closed when nothing of it is left

	client    *grpc.ClientConn
	of        *opened // the client's session
	metrics   *Metrics
	intercept Intercept // of an alias; else nil
	streams   sync.WaitGroup
}

func (rs *Relays) relay(key relayKey) *relay {
	return &relay{
		log: rs.log.With("session", key.session, "worker", key.worker), findWithin: rs.findWithin, farewell: rs.farewell, metrics: rs.Metrics,
		ready: make(chan struct{}), stop: make(chan struct{}), ended: make(chan struct{}),
	}
}

// over tells whether the relay has ended by itself: one of its ends is gone.
func (r *relay) over() bool {
	select {
	case <-r.ended:
		return true
	default:
		return false
	}
}

// run connects the two ends and serves until stopped, or one of them is gone.
func (r *relay) run(ctx context.Context, registry *Registry, w Worker, id string, of alias) {
	defer close(r.ended)
	r.intercept = of.intercept
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	connected := make(chan struct{})
	go func() { // ends with what it waits for
		select {
		case <-r.stop:
			cancel()
		case <-connected:
		}
	}()
	conn, session, closeWorker, err := r.connect(ctx, registry, w, id, of)
	close(connected)
	if err != nil {
		r.err = err
		close(r.ready)
		return
	}
	defer closeWorker()
	r.of.relays.Add(1)
	defer r.of.relays.Add(-1)
	close(r.ready)
	r.serve(session, conn, cancel)
}

// serve answers the worker's calls. At the end it waits a while for the worker to
// have forgotten the session, which it tells by ending the stream; giveUp ends
// the stream without.
func (r *relay) serve(session context.Context, conn net.Conn, giveUp func()) {
	server := grpc.NewServer(
		grpc.ForceServerCodecV2(rawCodec{}),
		grpc.UnknownServiceHandler(r.handle),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
		grpc.WriteBufferSize(writeSize),
		grpc.WaitForHandlers(true),
	)
	var stopping sync.WaitGroup
	served := make(chan struct{})
	stopping.Go(func() {
		select {
		case <-r.stop:
		case <-session.Done(): // the client's end
		case <-served: // the worker's end
		}
		defer time.AfterFunc(r.farewell, giveUp).Stop()
		server.Stop()
		_ = conn.Close() // if it was not served at all
	})
	if err := server.Serve(newSingleListener(conn)); err != nil && !errors.Is(err, errListenerDone) && !errors.Is(err, grpc.ErrServerStopped) {
		r.log.Debug("session relay ended", "error", err)
	}
	close(served)
	stopping.Wait()
	r.streams.Wait()
}

// connect finds the client's session, then opens a session of the id given and the
// same description, or that of an alias, on the worker. The context it returns ends with the client's
// session, and with ctx.
func (r *relay) connect(ctx context.Context, registry *Registry, w Worker, id string, of alias) (net.Conn, context.Context, func(), error) {
	findCtx, cancel := context.WithTimeout(ctx, r.findWithin)
	defer cancel()
	caller, opened, err := registry.find(findCtx, of.session)
	if err != nil {
		return nil, nil, nil, err
	}
	meta := opened.meta
	if id != of.session {
		meta = of.describe(id, meta)
	}
	cc, err := w.Dial(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	conn, err := grpchijack.Dialer(controlapi.NewControlClient(cc))(ctx, "h2c", meta)
	if err != nil {
		if lost := cc.Lost(); lost != nil {
			err = lost
		}
		_ = cc.Close()
		return nil, nil, nil, err
	}
	r.client, r.of = caller.Conn(), opened
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
	if r.intercept != nil {
		if answer := r.intercept(method, md); answer != nil {
			return answer(worker)
		}
	}
	client, err := r.client.NewStream(metadata.NewOutgoingContext(ctx, forwarded(md)),
		&grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method, grpc.ForceCodecV2(rawCodec{}))
	if err != nil {
		return err
	}
	up, down := r.directions(method, md, worker, client, cancel)
	r.streams.Add(1)
	go func() { // ends with the worker's stream: at the latest when this handler has returned
		defer r.streams.Done()
		if err := up(); err != nil {
			cancel()
		}
	}()
	return answer(worker, client, down)
}

// directions are what moves the messages of a call to the client and to the worker.
func (r *relay) directions(method string, md metadata.MD, worker grpc.ServerStream, client grpc.ClientStream, cancel func()) (up, down func() error) {
	if method == diffCopy && r.of.shared() {
		files := newFileSync(r.of.scope, md, r.metrics, worker, client, cancel)
		return files.up, files.run
	}
	up = func() error {
		err := copyFrames(client, worker, nil)
		if err == nil {
			_ = client.CloseSend()
		}
		return err
	}
	var count func(int)
	if method == diffCopy {
		count = r.metrics.fromClient
	}
	return up, func() error { return copyFrames(worker, client, count) }
}

// answer gives the worker the client's header and trailer, and between them what
// down moves.
func answer(worker grpc.ServerStream, client grpc.ClientStream, down func() error) error {
	header, err := client.Header()
	if err == nil && header != nil { // sent at once: the worker may wait for it before it says more
		if err := worker.SendHeader(forwarded(header)); err != nil {
			return err
		}
	}
	err = down()
	worker.SetTrailer(forwarded(client.Trailer()))
	return err
}

type sender interface{ SendMsg(any) error }
type receiver interface{ RecvMsg(any) error }

// copyFrames moves messages until the source ends (nil) or one side fails. Count, if
// any, gets their sizes.
func copyFrames(to sender, from receiver, count func(int)) error {
	for {
		var f frame
		if err := from.RecvMsg(&f); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if count != nil {
			count(f.data.Len())
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
