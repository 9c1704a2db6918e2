package dispatch

import (
	"context"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/archfarm/archfarm/coordinator/split"
)

// client is one connection of a client. Builds that come over one connection may
// be parts of one undertaking, such as the targets of a bake, which wait for each
// other on the client: what one of them has built is another's input, and the slots
// of those that wait would be the ones that the others queue for.
type client struct {
	mu      sync.Mutex
	results map[digest.Digest][]*leg // by what definitions call them that build on them
	legs    map[*leg]*activity       // of running builds
	queue   []*leg                   // those that have not been placed yet, in the order of their builds
	changed chan struct{}            // closed, and replaced, when a leg has nothing to do any more, or is over
}

// activity is what a leg is doing.
type activity struct {
	calls int       // that it is answering
	since time.Time // it has been answering none
}

// patience is for how long a leg must have had nothing to do before its slot is
// lent: a client that waits for nobody goes on sooner.
const patience = 200 * time.Millisecond

func newClient() *client {
	return &client{results: map[digest.Digest][]*leg{}, legs: map[*leg]*activity{}, changed: make(chan struct{})}
}

// clientOf returns the client whose call it is; one of its own for a call of
// unknown origin.
func clientOf(ctx context.Context) *client {
	if p, ok := peer.FromContext(ctx); ok {
		info := p.AuthInfo
		if around, ok := info.(interface{ Unwrap() credentials.AuthInfo }); ok {
			info = around.Unwrap()
		}
		if known, ok := info.(connection); ok {
			return known.client
		}
	}
	return newClient()
}

// Credentials are those that are given, and tell the server's connections apart.
func Credentials(of credentials.TransportCredentials) credentials.TransportCredentials {
	return transport{of}
}

type transport struct {
	credentials.TransportCredentials
}

type connection struct {
	credentials.AuthInfo
	client *client
}

// ServerHandshake implements credentials.TransportCredentials.
func (t transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := t.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	return conn, connection{info, newClient()}, nil
}

// Clone implements credentials.TransportCredentials.
func (t transport) Clone() credentials.TransportCredentials {
	return transport{t.TransportCredentials.Clone()}
}

// expect notes legs that queue.
func (c *client) expect(legs ...*leg) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.queue = append(c.queue, legs...)
}

// unqueue removes a leg that does not queue any more. c.mu is held.
func (c *client) unqueue(l *leg) {
	c.queue = slices.DeleteFunc(c.queue, func(q *leg) bool { return q == l })
}

// enter adds a leg that has been placed. It counts as busy until the call has come
// that it was placed for, or is known not to come.
func (c *client) enter(l *leg) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.legs[l] = &activity{calls: 1}
	c.unqueue(l)
	c.wake()
}

// leave removes a leg: it lends its slot to nobody any more.
func (c *client) leave(l *leg) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.legs, l)
	c.unqueue(l)
	for d, owners := range c.results {
		owners = slices.DeleteFunc(owners, func(o *leg) bool { return o == l })
		if c.results[d] = owners; len(owners) == 0 {
			delete(c.results, d)
		}
	}
	c.wake()
}

// calls adds n (which may be negative) to the calls that a leg is answering. One
// that exports has a call that never ends.
func (c *client) calls(l *leg, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, in := c.legs[l]
	if !in {
		return
	}
	if a.calls += n; a.calls == 0 {
		a.since = time.Now()
		c.wake()
	}
}

// busy notes a call that the leg is answering until done is called.
func (l *leg) busy() (done func()) {
	l.build.client.calls(l, 1)
	l.uncalled()
	return func() { l.build.client.calls(l, -1) }
}

// uncalled ends the wait for the leg's first call.
func (l *leg) uncalled() {
	l.called.Do(func() { l.build.client.calls(l, -1) })
}

// wake tells those who wait for a lender to look again. c.mu is held.
func (c *client) wake() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// join makes the caller a guest of a leg, unless that is over.
func (c *client) join(host *leg) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, in := c.legs[host]
	if in {
		host.guests.Add(1)
	}
	return in
}

// lender waits for a leg that has nothing to do, as its build waits for the client,
// and whose slot would do. The leg that asks is its guest then, until it parts. Nil:
// ctx has ended.
func (c *client) lender(ctx context.Context, guest *leg, would func(*leg) bool) *leg {
	for ctx.Err() == nil {
		host, changed, soon := c.idle(guest, would)
		if host != nil {
			return host
		}
		timer := time.NewTimer(soon)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
	return nil
}

// idle returns a leg in whose slot nothing has happened for a while, or else when
// to look again. Who came first is served first, as in the queue of all builds, and
// for the same reason: no two builds must hold what the other waits for; who is on its
// way still queues, so that a slot is lent once. Legs of one build, which start
// together, may share a slot.
func (c *client) idle(guest *leg, would func(*leg) bool) (host *leg, changed <-chan struct{}, soon time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	busy := map[*leg]bool{} // slots, by who holds them
	for l, a := range c.legs {
		if a.calls > 0 && l.build != guest.build {
			busy[l.holder()] = true
		}
	}
	soon = never
	for l, a := range c.legs {
		if busy[l.holder()] || !would(l) || c.wanted(l, guest) {
			continue
		}
		if left := patience - time.Since(a.since); left > 0 {
			soon = min(soon, left)
			continue
		}
		l.guests.Add(1) // it cannot be over: it would have left
		return l, nil, 0
	}
	return nil, c.changed, soon
}

// wanted tells whether a leg that queues longer than the guest, of another build,
// could run in the host's slot. c.mu is held.
func (c *client) wanted(host, guest *leg) bool {
	for _, l := range c.queue {
		if l.build == guest.build {
			return false
		}
		if l.mayJoin(host) {
			return true
		}
	}
	return false
}

// never is longer than anybody waits for a change.
const never = 24 * time.Hour

// holder is the leg that holds the slot that this one runs in.
func (l *leg) holder() *leg {
	for l.host != nil {
		l = l.host
	}
	return l
}

// built notes whose result a definition is of.
func (c *client) built(l *leg, def *pb.Definition) {
	head := split.Head(def)
	if head == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, in := c.legs[l]; in && !slices.Contains(c.results[head], l) {
		c.results[head] = append(c.results[head], l)
	}
}

// home is the worker that has built one of the definitions, and takes the leg that
// has them as inputs; empty when there is none.
func (c *client) home(inputs []*pb.Definition, takes func(worker string) bool) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, def := range inputs {
		for _, l := range c.results[split.Head(def)] {
			if takes(l.worker.Name) {
				return l.worker.Name
			}
		}
	}
	return ""
}
