package session

import (
	"slices"
	"strings"

	"github.com/moby/buildkit/identity"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// Intercept decides, for each call that a worker makes on an alias of a session,
// who answers: the handler that it returns, or the client when that is nil. The
// handler's stream takes and gives the service's own messages; it ends with the
// worker's call at the latest.
type Intercept func(method string, md metadata.MD) func(grpc.ServerStream) error

// alias is another name of a client's session.
type alias struct {
	session   string
	methods   []string
	intercept Intercept
}

// Alias gives a client's session another id, by which it can be exposed beside
// itself. What a worker calls by that id goes to the client all the same, except
// the calls that are intercepted: they can be told from those of other builds,
// and of other legs on the same worker. Methods are those that the alias has
// whatever the client serves: "/package.Service/Method". Forget ends the alias;
// relays of it last until they are released.
func (rs *Relays) Alias(session string, methods []string, intercept Intercept) (id string, forget func()) {
	id = identity.NewID()
	rs.mu.Lock()
	defer rs.mu.Unlock()
	rs.aliases[id] = alias{session: session, methods: methods, intercept: intercept}
	return id, func() {
		rs.mu.Lock()
		defer rs.mu.Unlock()
		delete(rs.aliases, id)
	}
}

// real resolves an id to the client's session that it stands for.
func (rs *Relays) real(id string) alias {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if a, ok := rs.aliases[id]; ok {
		return a
	}
	return alias{session: id}
}

// describe is the alias' description, given the session's.
func (a alias) describe(id string, meta metadata.MD) metadata.MD {
	out := meta.Copy()
	out.Set(headerID, id)
	for _, m := range a.methods {
		if !slices.ContainsFunc(out.Get(headerMethod), func(served string) bool { return strings.EqualFold(served, m) }) {
			out.Append(headerMethod, m)
		}
	}
	return out
}
