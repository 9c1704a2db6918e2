package loadtest

import (
	"net"
	"sync"
	"testing"
	"time"
)

const (
	linkRate  = 25 << 20 // bytes a second, some 200 Mbit/s
	linkChunk = 16 << 10
)

// slowLink carries TCP connections to target, and what they send to it shares
// one narrow line, chunk by chunk in the order of asking. It returns where to
// dial. What it cannot forward waits in the sender's socket, as it does in front
// of a real narrow link.
func slowLink(b *testing.B, target string) string {
	b.Helper()
	l := listen(b)
	var (
		running sync.WaitGroup
		line    pace
		mu      sync.Mutex
		conns   []net.Conn
	)
	running.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				_ = in.Close()
				continue
			}
			mu.Lock()
			conns = append(conns, in, out)
			mu.Unlock()
			running.Go(func() { copyThrough(out, in, &line) })
			running.Go(func() { copyThrough(in, out, nil) })
		}
	})
	b.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return l.Addr().String()
}

// pace is the line: it is free again when what was sent has passed.
type pace struct {
	mu   sync.Mutex
	free time.Time
}

func (p *pace) pass(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); p.free.Before(now) {
		p.free = now
	}
	p.free = p.free.Add(time.Duration(n) * time.Second / linkRate)
	time.Sleep(time.Until(p.free))
}

func copyThrough(dst, src net.Conn, line *pace) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, linkChunk)
	for {
		n, err := src.Read(buf)
		if line != nil {
			line.pass(n)
		}
		if _, werr := dst.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}
