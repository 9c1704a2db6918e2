// Package session relays a client's BuildKit session to the workers that build
// for it. A client opens one session to the coordinator; every worker involved
// sees a session of the same id whose services (file sync, secrets, ssh agents,
// registry credentials, exports) are answered by that client. Nothing of it is
// kept here: messages pass through undecoded.
package session

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/grpchijack"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Headers that describe a session (BuildKit's session package): the id, the key
// for incremental context sync, the methods that the client serves.
const (
	headerID        = "x-docker-expose-session-uuid"
	headerSharedKey = "x-docker-expose-session-sharedkey"
)

const settleTimeout = time.Second

var headerPrefixes = []string{"x-docker-expose-session-", "x-buildkit-session-"}

// Registry holds the sessions that clients have open.
type Registry struct {
	manager *bksession.Manager

	mu   sync.Mutex
	open map[string]metadata.MD
}

// NewRegistry returns a registry without sessions.
func NewRegistry() (*Registry, error) {
	manager, err := bksession.NewManager()
	if err != nil {
		return nil, err
	}
	return &Registry{manager: manager, open: map[string]metadata.MD{}}, nil
}

// Manager gives BuildKit's own libraries (the registry resolver, which asks the
// client for credentials) access to the same sessions.
func (r *Registry) Manager() *bksession.Manager { return r.manager }

// Handle serves one Control.Session stream until the client ends it. It answers
// InvalidArgument to a stream without an id, and AlreadyExists to one whose id
// is in use: a second client must not take over a session by naming it.
func (r *Registry) Handle(stream controlapi.Control_SessionServer) error {
	conn, closed, headers := grpchijack.Hijack(stream)
	defer conn.Close()

	meta := describe(headers)
	id := http.Header(canonical(meta)).Get(headerID)
	if id == "" {
		return status.Error(codes.InvalidArgument, "opening a session: the client sent no session id")
	}
	r.mu.Lock()
	if _, taken := r.open[id]; taken {
		r.mu.Unlock()
		return status.Error(codes.AlreadyExists, "opening a session: its id is in use")
	}
	r.open[id] = meta
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.open, id)
		r.mu.Unlock()
	}()

	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() { // ends with the connection, at the latest when this function closes it
		<-closed
		cancel()
	}()
	return r.manager.HandleConn(ctx, conn, meta)
}

// find waits for the session until ctx ends: a client opens it concurrently with
// the build that names it.
func (r *Registry) find(ctx context.Context, id string) (bksession.Caller, metadata.MD, error) {
	caller, err := r.manager.Get(ctx, id, false)
	if err != nil {
		return nil, nil, status.Errorf(codes.NotFound, "no active session for %s", id)
	}
	r.mu.Lock()
	meta, ok := r.open[id]
	r.mu.Unlock()
	if !ok {
		return nil, nil, status.Errorf(codes.NotFound, "no active session for %s", id)
	}
	return caller, meta, nil
}

// Settle waits, for a second at most, until the client's session answers. A
// BuildKit client that is refused while it is still opening its session takes
// ten seconds to close it.
func (r *Registry) Settle(ctx context.Context, id string) {
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
	return http.Header(canonical(r.open[id])).Get(headerSharedKey)
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

func canonical(meta metadata.MD) map[string][]string {
	out := make(map[string][]string, len(meta))
	for key, values := range meta {
		out[http.CanonicalHeaderKey(key)] = values
	}
	return out
}
