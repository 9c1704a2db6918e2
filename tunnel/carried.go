package tunnel

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// MaxChunk bounds the bytes of one message of a Call.
const MaxChunk = 64 << 10

// Call is one end of a gRPC call whose messages are the bytes of a connection.
type Call interface {
	// Send sends one message. It returns once gRPC has it, which waits for the other
	// end to read on.
	Send(data []byte) error
	// Receive returns the next message; io.EOF: the other end sends no more.
	Receive() ([]byte, error)
	// End ends the call: Send and Receive that wait return. It may be called more
	// than once, at any time.
	End()
}

// Carried is a connection over a Call. Unlike a socket, it cannot be spliced, and
// shares the flow control of the gRPC connection beneath with others; it needs no
// address at which the other end could be dialed.
type Carried struct {
	call          Call
	local, remote net.Addr

	chunks chan []byte   // from receive
	ended  chan struct{} // closed when receive has, for the reason in err
	err    error
	closed chan struct{}

	reading sync.Mutex // held by Read
	rest    []byte     // of the chunk that is being read
	patient deadline   // of reading

	writing  sync.Mutex // held by Write
	mu       sync.Mutex
	isClosed bool
	sending  bool // a Send is under way
	late     bool // the write deadline has passed
	cut      bool // the connection ended because it had passed
	limit    *time.Timer
}

// Over returns the connection that a call carries. Its goroutine ends with the call
// or the connection. Addresses are for those who want to know: the other end is not
// dialed there.
func Over(call Call, local, remote net.Addr) *Carried {
	c := &Carried{
		call: call, local: local, remote: remote,
		chunks: make(chan []byte), ended: make(chan struct{}), closed: make(chan struct{}),
	}
	go c.receive()
	return c
}

// receive passes messages on to Read, one at a time: what is not read is not
// received, and the other end is kept from sending.
func (c *Carried) receive() {
	defer close(c.ended)
	for {
		data, err := c.call.Receive()
		if err != nil {
			c.err = err
			return
		}
		if len(data) == 0 {
			continue
		}
		select {
		case c.chunks <- data:
		case <-c.closed:
			c.err = net.ErrClosed
			return
		}
	}
}

// Read implements net.Conn.
func (c *Carried) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	late := c.patient.passed()
	select { // rather than what has come
	case <-late:
		return 0, os.ErrDeadlineExceeded
	case <-c.closed:
		return 0, c.failure(net.ErrClosed)
	default:
	}
	if len(c.rest) == 0 && len(p) > 0 {
		select {
		case c.rest = <-c.chunks:
		case <-c.ended:
			return 0, c.failure(c.err)
		case <-late:
			return 0, os.ErrDeadlineExceeded
		case <-c.closed:
			return 0, c.failure(net.ErrClosed)
		}
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write implements net.Conn. One whose deadline passes while it waits for the other
// end ends the connection: how much of it arrives is not known.
func (c *Carried) Write(p []byte) (n int, err error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	for len(p) > 0 {
		chunk := p[:min(len(p), MaxChunk)]
		if err := c.send(bytes.Clone(chunk)); err != nil { // gRPC may look at it later
			return n, err
		}
		n += len(chunk)
		p = p[len(chunk):]
	}
	return n, nil
}

func (c *Carried) send(chunk []byte) error {
	c.mu.Lock()
	if c.isClosed || c.late {
		defer c.mu.Unlock()
		if c.late {
			return os.ErrDeadlineExceeded
		}
		return net.ErrClosed
	}
	c.sending = true
	c.mu.Unlock()

	err := c.call.Send(chunk)

	c.mu.Lock()
	c.sending = false
	c.mu.Unlock()
	if err == nil {
		return nil
	}
	if err == io.EOF { //nolint:errorlint // gRPC's own word for a call that has ended
		err = io.ErrClosedPipe
	}
	return c.failure(err)
}

// failure is err, unless the connection was ended here.
func (c *Carried) failure(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.cut:
		return os.ErrDeadlineExceeded
	case c.isClosed:
		return net.ErrClosed
	}
	return err
}

// CloseWrite ends this end's half of the connection, where the call can do so (a
// gRPC client's); otherwise the whole.
func (c *Carried) CloseWrite() error {
	half, ok := c.call.(interface{ CloseSend() error })
	if !ok {
		return c.Close()
	}
	c.writing.Lock() // not beside a Send
	defer c.writing.Unlock()
	return half.CloseSend()
}

// Close ends the call.
func (c *Carried) Close() error {
	c.mu.Lock()
	again := c.isClosed
	c.isClosed = true
	if c.limit != nil {
		c.limit.Stop()
	}
	c.mu.Unlock()
	if again {
		return net.ErrClosed
	}
	close(c.closed)
	c.patient.set(time.Time{})
	c.call.End()
	return nil
}

// LocalAddr implements net.Conn.
func (c *Carried) LocalAddr() net.Addr { return c.local }

// RemoteAddr implements net.Conn.
func (c *Carried) RemoteAddr() net.Addr { return c.remote }

// SetDeadline implements net.Conn.
func (c *Carried) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

// SetReadDeadline implements net.Conn, also for a Read that waits.
func (c *Carried) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isClosed {
		return net.ErrClosed
	}
	c.patient.set(t)
	return nil
}

// SetWriteDeadline implements net.Conn, also for a Write that waits; see Write.
func (c *Carried) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	if c.isClosed {
		c.mu.Unlock()
		return net.ErrClosed
	}
	if c.limit != nil {
		c.limit.Stop()
	}
	c.limit, c.late = nil, false
	if t.IsZero() {
		c.mu.Unlock()
		return nil
	}
	var timer *time.Timer
	timer = time.AfterFunc(time.Until(t), func() { c.tooLate(&timer) })
	c.limit = timer
	c.mu.Unlock()
	return nil
}

// tooLate is what the write deadline's timer does, unless another has been set since.
// The timer is read under mu, by when it is known.
func (c *Carried) tooLate(timer **time.Timer) {
	c.mu.Lock()
	current := c.limit == *timer
	c.late = c.late || current
	c.cut = c.cut || current && c.sending
	cut := current && c.sending
	c.mu.Unlock()
	if cut {
		_ = c.Close()
	}
}

// deadline is a time that may be changed while somebody waits for it.
type deadline struct {
	mu    sync.Mutex
	timer *time.Timer
	over  chan struct{} // closed when the time has passed
}

// passed returns what is closed once the deadline has passed; whoever has it is told
// of a change of the deadline, unless it had passed already.
func (d *deadline) passed() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.channel()
}

// channel is d.over. d.mu is held.
func (d *deadline) channel() chan struct{} {
	if d.over == nil {
		d.over = make(chan struct{})
	}
	return d.over
}

// set changes the deadline; the zero time is none.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	over := d.channel()
	if d.timer != nil && !d.timer.Stop() {
		<-over // the timer is about to close it, or has: it needs no lock
	}
	d.timer = nil
	select {
	case <-over:
		over = make(chan struct{})
		d.over = over
	default:
	}
	switch left := time.Until(t); {
	case t.IsZero():
	case left <= 0:
		close(over)
	default:
		d.timer = time.AfterFunc(left, func() { close(over) })
	}
}
