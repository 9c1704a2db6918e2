package tunnel

import (
	"container/list"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

const (
	// decideWithin is how long a client may take for its first bytes. Every
	// client that means well sends them at once.
	decideWithin = 10 * time.Second
	// maxUndecided bounds the connections that have not yet said what they are.
	maxUndecided = 4096
	// acceptRetry is the wait after a passing error of accept(2), such as too
	// many open files.
	acceptRetry = 50 * time.Millisecond
)

var noDeadline time.Time

// Listener divides the connections of one port into tunnels and others. It is
// a net.Listener for the others.
//
// A client that says nothing, or says it slowly, occupies one goroutine for at
// most 10 s and delays nobody. When 4096 connections are undecided, the one
// that has been silent the longest is closed for each new one: an honest client
// is undecided for one round trip, so a flood pushes out its own.
type Listener struct {
	inner    net.Listener
	security Security
	accept   func(id string, conn net.Conn)
	log      *slog.Logger

	limit  int
	within time.Duration

	others chan net.Conn // decided, for Accept
	closed chan struct{} // when Close begins
	ended  chan struct{} // when inner accepts no more; err says why
	err    error

	workers  sync.WaitGroup // the accepting goroutine and one for each undecided connection
	deciding sync.WaitGroup // the latter

	mu        sync.Mutex
	isClosed  bool
	undecided *list.List // of net.Conn, oldest first
}

// NewListener takes over inner and begins to accept. accept is called for every
// tunnel, in a goroutine of its own; it owns conn from then on and has to
// return promptly, as Close waits for it. conn is the very connection that
// inner gave, not one byte beyond the preamble has been read from it, so it can
// be spliced. Connections that are no tunnels come out of Accept, complete.
//
// Where security has connections wrapped, conn is what it made of them.
func NewListener(inner net.Listener, security Security, accept func(id string, conn net.Conn), log *slog.Logger) *Listener {
	return newListener(inner, security, accept, log, maxUndecided, decideWithin)
}

func newListener(inner net.Listener, security Security, accept func(string, net.Conn), log *slog.Logger, limit int, within time.Duration) *Listener {
	l := &Listener{
		inner: inner, security: security, accept: accept, log: log, limit: limit, within: within,
		others:    make(chan net.Conn),
		closed:    make(chan struct{}),
		ended:     make(chan struct{}),
		undecided: list.New(),
	}
	l.workers.Go(l.serve)
	return l
}

// Accept returns the next connection that is no tunnel.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.others:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-l.ended:
		return nil, l.err
	}
}

// Addr is the address that the inner listener is bound to.
func (l *Listener) Addr() net.Addr { return l.inner.Addr() }

// Retire accepts no more connections, which leaves them to whoever shares the
// socket. Those that have been accepted come out of Accept, which returns an error
// that is net.ErrClosed after the last. Close is still needed.
func (l *Listener) Retire() error { return l.inner.Close() }

// Close stops accepting, closes the connections that are undecided and waits
// for the listener's goroutines. What was handed out before lives on. It may be
// called several times; only the first call returns the inner listener's error.
func (l *Listener) Close() error {
	l.mu.Lock()
	if l.isClosed {
		l.mu.Unlock()
		l.workers.Wait()
		return nil
	}
	l.isClosed = true
	close(l.closed)
	for e := l.undecided.Front(); e != nil; e = e.Next() {
		_ = e.Value.(net.Conn).Close() // nothing was written
	}
	l.mu.Unlock()

	err := l.inner.Close()
	l.workers.Wait()
	return err
}

// serve accepts until the inner listener ends.
func (l *Listener) serve() {
	defer close(l.ended)
	defer l.deciding.Wait() // whoever was accepted is served
	for {
		conn, err := l.inner.Accept()
		if err == nil {
			l.admit(conn)
			continue
		}
		if !passing(err) {
			l.err = err
			return
		}
		l.log.Warn("accepting a connection: trying again", "error", err)
		select {
		case <-time.After(acceptRetry):
		case <-l.closed:
			l.err = net.ErrClosed
			return
		}
	}
}

// passing tells whether accept(2) may succeed later. net.Error.Temporary is
// deprecated as ill-defined, but for accept it is what net/http and grpc-go
// go by: connection aborted, too many open files, out of memory.
func passing(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary() && !errors.Is(err, net.ErrClosed)
}

// admit starts to find out what conn is.
func (l *Listener) admit(conn net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.isClosed {
		_ = conn.Close()
		return
	}
	if l.undecided.Len() >= l.limit {
		oldest := l.undecided.Remove(l.undecided.Front()).(net.Conn)
		_ = oldest.Close() // its goroutine's read fails, and it leaves
		l.log.Warn("too many connections have not said what they are; closed the oldest",
			"limit", l.limit, "remote", oldest.RemoteAddr().String())
	}
	entry := l.undecided.PushBack(conn)
	l.deciding.Add(1)
	l.workers.Go(func() {
		defer l.deciding.Done()
		l.decide(conn, entry)
	})
}

// decide reads what conn begins with and hands it on.
func (l *Listener) decide(conn net.Conn, entry *list.Element) {
	raw := conn
	conn, id, head, err := l.introduce(raw)

	if err == nil && id == "" {
		conn = &replayed{Conn: conn, head: head}
		select {
		case l.others <- conn:
			l.settle(entry)
			return
		case <-l.closed:
			err = net.ErrClosed
		}
	}

	// From here on nobody but this goroutine, or accept, closes conn.
	evicted := l.settle(entry)
	switch {
	case err == nil && !evicted:
		l.accept(id, conn)
	default:
		l.log.Debug("closing a connection that did not say what it is",
			"remote", raw.RemoteAddr().String(), "error", err)
		_ = raw.Close() // nothing was written that anybody misses
	}
}

// settle takes a connection off the undecided ones and tells whether it was
// closed in the meantime.
func (l *Listener) settle(entry *list.Element) (evicted bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.undecided.Len()
	l.undecided.Remove(entry) // does nothing if admit removed it
	return l.isClosed || l.undecided.Len() == before
}

// peek reads the beginning of conn: for a tunnel exactly its preamble, of which
// it returns the id; for others as few bytes as tell the difference, which it
// returns as head.
func (l *Listener) peek(conn net.Conn) (id string, head []byte, err error) {
	if err := conn.SetReadDeadline(time.Now().Add(l.within)); err != nil {
		return "", nil, err
	}
	buf := make([]byte, 0, len(preamble)+maxID+1)
	for i := range len(preamble) {
		// Byte by byte: more could be the first bytes of BuildKit's API.
		b, err := readByte(conn)
		if err != nil {
			return "", nil, err
		}
		buf = append(buf, b)
		if b != preamble[i] {
			return "", buf, conn.SetReadDeadline(noDeadline)
		}
	}
	for range maxID + 1 {
		b, err := readByte(conn)
		if err != nil {
			return "", nil, err
		}
		if b == '\n' {
			id = string(buf[len(preamble):])
			if !ValidID(id) {
				return "", nil, ErrInvalidID
			}
			return id, nil, conn.SetReadDeadline(noDeadline)
		}
		buf = append(buf, b)
	}
	return "", nil, ErrInvalidID
}

func readByte(r io.Reader) (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(r, b[:])
	return b[0], err
}

// replayed is a connection whose first bytes have been read already.
type replayed struct {
	net.Conn
	head []byte
}

// NetConn returns the connection beneath.
func (r *replayed) NetConn() net.Conn { return r.Conn }

// Read gives the bytes that were read already before those of the connection.
func (r *replayed) Read(p []byte) (int, error) {
	if len(r.head) > 0 {
		n := copy(p, r.head)
		r.head = r.head[n:]
		return n, nil
	}
	return r.Conn.Read(p)
}
