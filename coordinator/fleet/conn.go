package fleet

import (
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"

	"google.golang.org/grpc"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/identity"
)

// Conn is a connection to one worker's BuildKit.
type Conn struct {
	*grpc.ClientConn
	worker *Worker
	raw    net.Conn

	mu     sync.Mutex
	closed bool
	lost   error
	down   chan struct{}
}

// Close ends the connection and thereby frees its slot. Closing again does nothing.
func (c *Conn) Close() error {
	c.mu.Lock()
	again := c.closed
	c.closed = true
	c.mu.Unlock()
	if again {
		return nil
	}
	c.worker.fleet.drop(c)
	err := c.ClientConn.Close()
	if rawErr := c.raw.Close(); err == nil && !errors.Is(rawErr, net.ErrClosed) { // gRPC closes it only once it has used it
		err = rawErr
	}
	return err
}

// Lost returns a *build.LostError when the connection ended otherwise than by
// Close: the worker, its agent or its buildkitd is gone. It tells an
// Unavailable of the connection from one that a step returned.
func (c *Conn) Lost() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lost == nil {
		return nil
	}
	return &build.LostError{Worker: c.worker.Name, Cause: c.lost}
}

// Down is closed when the connection is lost.
func (c *Conn) Down() <-chan struct{} { return c.down }

func (c *Conn) fail(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.lost != nil {
		return
	}
	c.lost = cause
	close(c.down)
}

// watchedConn notices the end of the connection where it happens, before gRPC
// tells the calls that run on it.
type watchedConn struct {
	net.Conn
	owner *Conn
}

func (c *watchedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		c.owner.fail(fmt.Errorf("its BuildKit connection ended: %w", err))
	}
	return n, err
}

func (c *watchedConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if err != nil {
		c.owner.fail(fmt.Errorf("its BuildKit connection ended: %w", err))
	}
	return n, err
}

// Close is gRPC's: after what it could not understand, if not after an error above.
func (c *watchedConn) Close() error {
	c.owner.fail(errors.New("its BuildKit connection ended"))
	return c.Conn.Close()
}

// disown severs the connections to a worker whose agent has not come back.
func (f *Fleet) disown(name string) {
	f.mu.Lock()
	_, back := f.workers[name]
	if !back {
		delete(f.orphans, name)
	}
	f.mu.Unlock()
	if !back {
		f.sever(name, fmt.Errorf("its agent left %s ago", lostAfter))
	}
}

// sever ends every connection to a worker that stopped answering: its own end
// will not notice for hours.
func (f *Fleet) sever(name string, cause error) {
	f.mu.Lock()
	conns := slices.Collect(maps.Keys(f.conns[name]))
	f.mu.Unlock()
	for _, c := range conns { // all, before anybody notices the first
		c.fail(cause)
	}
	for _, c := range conns {
		_ = c.raw.Close()
	}
}

// keep counts a connection among its worker's, unless the worker is lost.
func (f *Fleet) keep(c *Conn) bool {
	name := c.worker.Name
	f.mu.Lock()
	defer f.mu.Unlock()
	_, attached := f.workers[name]
	_, orphaned := f.orphans[name]
	if !attached && !orphaned {
		return false
	}
	if f.conns[name] == nil {
		f.conns[name] = map[*Conn]struct{}{}
	}
	f.conns[name][c] = struct{}{}
	return true
}

// drop forgets a connection.
func (f *Fleet) drop(c *Conn) {
	name := c.worker.Name
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.conns[name], c)
	if len(f.conns[name]) == 0 {
		delete(f.conns, name)
	}
}

// dialing is a connection that an agent was asked for.
type dialing struct {
	worker  *Worker
	inline  bool          // it is to come by Carry, not by dialing
	back    chan net.Conn // has room for it
	settled chan struct{} // closed when nobody waits for it any more
}

// Accept takes a connection that an agent dialed back. One that nobody waits
// for is closed: its id was guessed, or came too late. So is one from somebody else
// than the agent that was asked; who that is, a connection with a method Identity
// tells, and any other is local.
func (f *Fleet) Accept(id string, conn net.Conn) { f.accept(id, conn) }

func (f *Fleet) accept(id string, conn net.Conn) bool {
	who := identity.Identity{}
	if c, ok := conn.(interface{ Identity() identity.Identity }); ok {
		who = c.Identity()
	}
	if why := f.deliver(id, who, conn); why != "" {
		f.log.Warn("connection dialed back is refused", "reason", why, "peer", conn.RemoteAddr().String(), "as", who.String())
		_ = conn.Close()
		return false
	}
	return true
}

// deliver hands the connection over under the lock: once forget has it, nothing comes any more.
func (f *Fleet) deliver(id string, who identity.Identity, conn net.Conn) (refused string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	asked, ok := f.pending[id]
	switch {
	case !ok:
		return "nobody asked for it"
	case asked.worker.who.Kind != who.Kind || asked.worker.who.Name != who.Name:
		return "worker " + asked.worker.Name + " was asked for it, as " + asked.worker.who.String()
	}
	delete(f.pending, id)
	asked.back <- conn
	return ""
}

// expect waits for a connection from now on; nil: its agent could not make it.
func (f *Fleet) expect(w *Worker) (id string, asked *dialing) {
	id = rand.Text()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.hasDeparted() && !w.inline {
		return "", nil
	}
	asked = &dialing{worker: w, inline: f.inline && w.inline, back: make(chan net.Conn, 1), settled: make(chan struct{})}
	f.pending[id] = asked
	return id, asked
}

// forget stops waiting for a connection, and closes it if it has come meanwhile.
func (f *Fleet) forget(id string, asked *dialing) {
	f.mu.Lock()
	delete(f.pending, id)
	f.mu.Unlock()
	close(asked.settled)
	select {
	case conn := <-asked.back:
		_ = conn.Close()
	default:
	}
}
