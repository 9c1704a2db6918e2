package load

import (
	"context"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// How much of one connection passes at a time, in bytes: a narrow link, and one without limit, which is io.Copy's.
const linkChunk, proxyChunk = 16 << 10, 32 << 10

// oversleep is how much later than it should the kernel, on a busy machine, may wake up who sleeps: without making up for
// that, a line of 100 Mbit/s, which passes a chunk in 1.3 ms, would be one of 60.
const oversleep = 20 * time.Millisecond

// Link is a narrow line to one or more endpoints: what goes to them, by whatever connection, shares it, chunk by chunk
// in the order of asking. What it cannot forward waits in the sender's socket, as before a real narrow link. What comes
// back is not slowed down.
type Link struct {
	rate int64 // bytes a second; 0: as fast as it goes
	line pace
}

// NewLink returns a link that forwards so many bytes a second, or without limit (0): then it is a plain proxy.
func NewLink(rate int64) *Link { return &Link{rate: rate} }

// To opens an entrance of the link to an endpoint (tcp://… or unix://…) and returns its address (tcp://…). It ends with
// the test, and all connections by it.
func (l *Link) To(t farmtest.T, endpoint string) string {
	t.Helper()
	network, target, found := strings.Cut(endpoint, "://")
	if !found {
		t.Fatalf("%q is no endpoint: it has no scheme", endpoint)
	}
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("starting a link: %v", err)
	}
	e := &entrance{link: l, listener: listener, network: network, target: target}
	e.running.Go(e.serve)
	t.Cleanup(e.close)
	return "tcp://" + listener.Addr().String()
}

// entrance forwards the connections to one endpoint. Its goroutines end with close.
type entrance struct {
	link            *Link
	listener        net.Listener
	network, target string
	running         sync.WaitGroup

	mu     sync.Mutex
	conns  []net.Conn
	closed bool
}

func (e *entrance) serve() {
	for {
		in, err := e.listener.Accept()
		if err != nil {
			return
		}
		out, err := (&net.Dialer{}).DialContext(context.Background(), e.network, e.target)
		if err != nil {
			_ = in.Close()
			continue
		}
		if !e.keep(in, out) {
			return
		}
		var line *pace
		if e.link.rate > 0 {
			line = &e.link.line
		}
		e.running.Go(func() { e.copy(out, in, line) })
		e.running.Go(func() { e.copy(in, out, nil) })
	}
}

// keep notes connections, for the end; after that it closes them.
func (e *entrance) keep(conns ...net.Conn) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		for _, c := range conns {
			_ = c.Close()
		}
		return false
	}
	e.conns = append(e.conns, conns...)
	return true
}

func (e *entrance) close() {
	_ = e.listener.Close()
	e.mu.Lock()
	e.closed = true
	for _, c := range e.conns {
		_ = c.Close()
	}
	e.mu.Unlock()
	e.running.Wait()
}

// copy moves one direction's bytes through memory, and ends both when that has ended.
func (e *entrance) copy(to, from net.Conn, line *pace) {
	defer to.Close()
	defer from.Close()
	chunk := proxyChunk
	if line != nil {
		chunk = linkChunk
	}
	buf := make([]byte, chunk)
	for {
		n, err := from.Read(buf)
		if line != nil {
			line.pass(n, e.link.rate)
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

// pace is the line: it is free again when what was sent has passed.
type pace struct {
	mu   sync.Mutex
	free time.Time
}

// pass returns when n bytes have passed.
func (p *pace) pass(n int, rate int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free = p.after(time.Now(), n, rate)
	time.Sleep(time.Until(p.free))
}

// after tells when the line is free again if n bytes are sent now. An idle line saves up no more than is slept too long.
func (p *pace) after(now time.Time, n int, rate int64) time.Time {
	start := p.free
	if earliest := now.Add(-oversleep); start.Before(earliest) {
		start = earliest
	}
	return start.Add(time.Duration(int64(n) * int64(time.Second) / rate))
}
