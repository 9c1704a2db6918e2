// Package session relays a client's BuildKit session to the workers that build
// for it. A client opens one session to the coordinator; every worker involved
// sees a session of the same id whose services (file sync, secrets, ssh agents,
// registry credentials, exports) are answered by that client. Messages pass through
// undecoded, and nothing of them is kept, but for the files of a build that several
// workers have a part in: filesync.go has the client send each once.
package session

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/session/spool"
)

// Headers that describe a session (BuildKit's session package): the id, the key
// for incremental context sync, the methods that the client serves.
const (
	headerID        = "x-docker-expose-session-uuid"
	headerSharedKey = "x-docker-expose-session-sharedkey"
	headerMethod    = "x-docker-expose-session-grpc-method"
)

const (
	settleTimeout = time.Second
	// maxID bounds a session id; BuildKit's have 25 bytes.
	maxID = 256
)

var headerPrefixes = []string{"x-docker-expose-session-", "x-buildkit-session-"}

// Registry holds the sessions that clients have open.
type Registry struct {
	// Limit is how many sessions may be open at a time; 0: any number. Set it
	// before the first use.
	Limit int
	// Spool is where files wait that several workers want; nil: each asks the client.
	// Set it before the first use.
	Spool *spool.Spool

	manager *bksession.Manager

	mu   sync.Mutex
	open map[string]*opened
}

// opened is a session that a client has open.
type opened struct {
	meta    metadata.MD
	scope   *spool.Scope // nil without a spool
	several atomic.Bool  // workers may want its files
	relays  atomic.Int32 // that there are now
}

// shared tells whether files go through the spool. For one worker alone that would
// be in vain.
func (o *opened) shared() bool {
	return o.scope != nil && (o.several.Load() || o.relays.Load() > 1)
}

// NewRegistry returns a registry without sessions.
func NewRegistry() (*Registry, error) {
	manager, err := bksession.NewManager()
	if err != nil {
		return nil, err
	}
	return &Registry{manager: manager, open: map[string]*opened{}}, nil
}

// Manager gives BuildKit's own libraries (the registry resolver, which asks the
// client for credentials) access to the same sessions.
func (r *Registry) Manager() *bksession.Manager { return r.manager }

// Handle serves one Control.Session stream until the client ends it. It answers
// InvalidArgument to a stream without a usable id, AlreadyExists to one whose id is
// in use, since a second client must not take over a session by naming it, and
// ResourceExhausted when too many are open.
func (r *Registry) Handle(stream controlapi.Control_SessionServer) error {
	// Closing the connection waits for the client to end the stream, which one that
	// is refused has no reason to do. Returning ends it from this side.
	hijacked, closed, headers := grpchijack.Hijack(stream)
	meta := describe(headers)
	id := first(meta.Get(headerID))
	if err := checkID(id); err != nil {
		return status.Errorf(codes.InvalidArgument, "opening a session: %v", err)
	}
	if err := r.enter(id, meta); err != nil {
		return err
	}
	defer r.leave(id)

	ctx, cancel := context.WithCancel(stream.Context())
	var watching sync.WaitGroup
	defer watching.Wait()
	defer cancel()
	watching.Go(func() {
		select {
		case <-closed:
			cancel()
		case <-ctx.Done():
		}
	})
	return r.manager.HandleConn(ctx, &silentConn{Conn: hijacked}, meta)
}

// checkID refuses ids by which no session could be found again: BuildKit takes
// what precedes a colon for a prefix that is not part of the id.
func checkID(id string) error {
	switch {
	case id == "":
		return errors.New("the client sent no session id")
	case len(id) > maxID:
		return fmt.Errorf("the session id has %d bytes, at most %d are possible", len(id), maxID)
	case strings.Contains(id, ":"):
		return errors.New("the session id has a colon")
	}
	return nil
}

func (r *Registry) enter(id string, meta metadata.MD) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, taken := r.open[id]; taken {
		return status.Error(codes.AlreadyExists, "opening a session: its id is in use")
	}
	if r.Limit > 0 && len(r.open) >= r.Limit {
		return status.Errorf(codes.ResourceExhausted, "opening a session: %d are open, as many as this coordinator takes; try again later", len(r.open))
	}
	o := &opened{meta: meta}
	if r.Spool != nil {
		o.scope = r.Spool.Scope()
	}
	r.open[id] = o
	return nil
}

func (r *Registry) leave(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if scope := r.open[id].scope; scope != nil {
		scope.Close()
	}
	delete(r.open, id)
}

// share says that several workers may want the session's files.
func (r *Registry) share(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o, ok := r.open[id]; ok {
		o.several.Store(true)
	}
}

// find waits for the session until ctx ends: a client opens it concurrently with
// the build that names it.
func (r *Registry) find(ctx context.Context, id string) (bksession.Caller, *opened, error) {
	caller, err := r.manager.Get(ctx, id, false)
	if err != nil {
		return nil, nil, status.Errorf(codes.NotFound, "no active session for %s", id)
	}
	r.mu.Lock()
	o, ok := r.open[id]
	r.mu.Unlock()
	if !ok {
		return nil, nil, status.Errorf(codes.NotFound, "no active session for %s", id)
	}
	return caller, o, nil
}

// Settle waits, for a second at most, until the client's session answers. A
// BuildKit client that is refused while it is still opening its session takes
// ten seconds to close it; one that is answered before, a second every now and
// then (see silentConn). Without an id it does nothing.
func (r *Registry) Settle(ctx context.Context, id string) {
	if id == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	if caller, _, err := r.find(ctx, id); err == nil {
		_, _ = healthpb.NewHealthClient(caller.Conn()).Check(ctx, &healthpb.HealthCheckRequest{}) // any answer will do
	}
}

// SharedKey returns what the client's context sync is keyed by, stable over the
// builds of one project on one client; empty when unknown.
func (r *Registry) SharedKey(id string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if o, ok := r.open[id]; ok {
		return first(o.meta.Get(headerSharedKey))
	}
	return ""
}

// Len returns how many sessions are open.
func (r *Registry) Len() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.open)
}

// describe keeps the headers that make up the session's description.
func describe(headers map[string][]string) metadata.MD {
	meta := metadata.MD{}
	for key, values := range headers {
		for _, prefix := range headerPrefixes {
			if strings.HasPrefix(strings.ToLower(key), prefix) {
				meta[strings.ToLower(key)] = values
			}
		}
	}
	return meta
}

func first(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}
