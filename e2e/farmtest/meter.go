package farmtest

import (
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
)

// Meter stands between a client and an endpoint, and counts what passes, until it is told to drop that.
type Meter struct {
	Addr string // tcp://…

	to       string
	listener net.Listener
	sent     atomic.Int64
	received atomic.Int64
	running  sync.WaitGroup
	mu       sync.Mutex
	conns    []net.Conn
	closed   bool
	dropping chan struct{} // closed when nothing passes any more
	ended    chan struct{} // closed when closed is set
}

// NewMeter puts a meter before an endpoint that listens on TCP. It ends with the test, and all that passes by it.
func NewMeter(t T, endpoint string) *Meter {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("starting a meter: %v", err)
	}
	m := &Meter{
		Addr: "tcp://" + listener.Addr().String(), to: strings.TrimPrefix(endpoint, "tcp://"), listener: listener,
		dropping: make(chan struct{}), ended: make(chan struct{}),
	}
	m.running.Go(m.serve)
	t.Cleanup(m.close)
	return m
}

// Sent is how many bytes clients have sent.
func (m *Meter) Sent() int64 { return m.sent.Load() }

// Received is how many bytes the endpoint has answered.
func (m *Meter) Received() int64 { return m.received.Load() }

func (m *Meter) serve() {
	for {
		client, err := m.listener.Accept()
		if err != nil {
			return
		}
		endpoint, err := net.Dial("tcp", m.to)
		if err != nil {
			client.Close()
			continue
		}
		if !m.keep(client, endpoint) {
			return
		}
		m.running.Go(func() { m.move(endpoint, client, &m.sent) })
		m.running.Go(func() { m.move(client, endpoint, &m.received) })
	}
}

// Drop lets nothing pass from now on, and tells nobody: connections stay open, and new ones are taken. They break at the
// test's end, before whoever was started earlier is stopped. Call it once.
func (m *Meter) Drop(t T) {
	close(m.dropping)
	t.Cleanup(m.close)
}

// keep notes connections, for the end; after that it closes them.
func (m *Meter) keep(conns ...net.Conn) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		for _, c := range conns {
			c.Close()
		}
		return false
	}
	m.conns = append(m.conns, conns...)
	return true
}

func (m *Meter) close() {
	m.listener.Close()
	m.mu.Lock()
	if !m.closed {
		close(m.ended)
	}
	m.closed = true
	for _, c := range m.conns {
		c.Close()
	}
	m.mu.Unlock()
	m.running.Wait()
}

// move copies in one direction, and ends both when that has ended.
func (m *Meter) move(to, from net.Conn, count *atomic.Int64) {
	_, _ = io.Copy(counter{m, to, count}, from)
	to.Close()
	from.Close()
}

// counter counts what is written. It hides what would let io.Copy go by it.
type counter struct {
	meter *Meter
	to    io.Writer
	count *atomic.Int64
}

func (c counter) Write(b []byte) (int, error) {
	select {
	case <-c.meter.dropping:
		<-c.meter.ended
		return 0, net.ErrClosed
	default:
	}
	n, err := c.to.Write(b)
	c.count.Add(int64(n))
	return n, err
}
