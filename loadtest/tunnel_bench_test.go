package loadtest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/address"
)

// These benchmarks chose how an agent carries BuildKit's connections to its
// coordinator; docs/tunnel.md has a result. Agent, coordinator and backend are
// in this one process, so that the processor time is that of the whole chain.
//
//	go test ./loadtest -run '^$' -bench Tunnel -benchtime 2s

const (
	echo = 'e' // the backend returns what it receives
	bulk = 'b' // the backend sends as many bytes as the next 8 bytes say

	bulkSize = 64 << 20
	endless  = 1 << 62
)

// backend stands for buildkitd on its Unix socket.
type backend struct {
	addr address.Address
	sent atomic.Int64 // bulk bytes
}

func startBackend(b *testing.B) *backend {
	b.Helper()
	dir, err := os.MkdirTemp("", "af") // short enough for sockaddr_un
	if err != nil {
		b.Fatal(err)
	}
	be := &backend{addr: address.Address{Network: "unix", Addr: filepath.Join(dir, "s")}}
	l, err := be.addr.Listen(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer conn.Close()
				be.serve(conn)
			})
		}
	})
	b.Cleanup(func() {
		_ = l.Close()
		running.Wait()
		_ = os.RemoveAll(dir)
	})
	return be
}

func (be *backend) serve(conn net.Conn) {
	var head [9]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return
	}
	if head[0] == echo {
		_, _ = io.Copy(conn, conn)
		return
	}
	chunk := make([]byte, 64<<10)
	for left := binary.BigEndian.Uint64(head[1:]); left > 0; {
		n, err := conn.Write(chunk[:min(left, uint64(len(chunk)))])
		be.sent.Add(int64(n))
		left -= uint64(n)
		if err != nil {
			return
		}
	}
}

// open opens a connection and tells the backend what it is for.
func open(b *testing.B, dial func() (io.ReadWriteCloser, error), kind byte, size uint64) io.ReadWriteCloser {
	b.Helper()
	conn, err := dial()
	if err != nil {
		b.Fatal(err)
	}
	if _, err := conn.Write(binary.BigEndian.AppendUint64([]byte{kind}, size)); err != nil {
		b.Fatal(err)
	}
	return conn
}

func each(b *testing.B, link link, f func(b *testing.B, be *backend, dial func() (io.ReadWriteCloser, error))) {
	for _, t := range transports {
		b.Run(t.name, func(b *testing.B) {
			be := startBackend(b)
			f(b, be, t.start(b, be.addr, link))
		})
	}
}

// BenchmarkTunnelBulk is 64 MiB from the worker to the coordinator.
func BenchmarkTunnelBulk(b *testing.B) {
	each(b, direct, func(b *testing.B, _ *backend, dial func() (io.ReadWriteCloser, error)) {
		b.SetBytes(bulkSize)
		conn := open(b, dial, bulk, endless)
		defer conn.Close()
		buf := make([]byte, 64<<10)
		before := cpu(b)
		for b.Loop() {
			if _, err := io.CopyBuffer(writeOnly{}, io.LimitReader(conn, bulkSize), buf); err != nil {
				b.Fatal(err)
			}
		}
		gib := float64(b.N) * bulkSize / (1 << 30)
		b.ReportMetric((cpu(b)-before).Seconds()/gib, "cpu-s/GiB")
	})
}

// writeOnly discards, but through the buffer that io.CopyBuffer was given.
type writeOnly struct{}

func (writeOnly) Write(p []byte) (int, error) { return len(p), nil }

func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkTunnelEcho is the round trip of 64 bytes: alone, while another
// attempt transfers as fast as it can, while another attempt's transfer is stuck
// because its reader does not read, and while another transfers as fast as a
// link of 25 MiB/s lets it.
func BenchmarkTunnelEcho(b *testing.B) {
	for _, beside := range []string{"alone", "bulk", "stalled", "bulk-slow-link"} {
		b.Run(beside, func(b *testing.B) {
			link := direct
			if beside == "bulk-slow-link" {
				link = slowLink
			}
			each(b, link, func(b *testing.B, be *backend, dial func() (io.ReadWriteCloser, error)) {
				if beside != "alone" {
					defer besideBulk(b, be, dial, beside == "stalled")()
				}
				measureEcho(b, open(b, dial, echo, 0))
			})
		})
	}
}

// besideBulk begins a transfer on another connection; the function that it
// returns ends it.
func besideBulk(b *testing.B, be *backend, dial func() (io.ReadWriteCloser, error), stalled bool) func() {
	other := open(b, dial, bulk, endless)
	var reading sync.WaitGroup
	if stalled {
		waitStalled(b, be)
	} else {
		reading.Go(func() { _, _ = io.Copy(io.Discard, other) })
	}
	return func() {
		_ = other.Close()
		reading.Wait()
	}
}

// waitStalled returns when the backend cannot send any more: when all buffers on
// the way are full.
func waitStalled(b *testing.B, be *backend) {
	b.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for last := int64(-1); ; {
		<-tick.C
		sent := be.sent.Load()
		if sent > 0 && sent == last {
			return
		}
		last = sent
	}
}

func measureEcho(b *testing.B, conn io.ReadWriteCloser) {
	b.Helper()
	defer conn.Close()
	buf := make([]byte, 64)
	var took []time.Duration
	// A transport may block here for ever: the connection is closed then, and the
	// round trip fails.
	watchdog := time.AfterFunc(30*time.Second, func() { _ = conn.Close() })
	defer watchdog.Stop()
	for b.Loop() {
		begun := time.Now()
		if _, err := conn.Write(buf); err != nil {
			b.Fatal(fmt.Errorf("blocked: %w", err))
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			b.Fatal(fmt.Errorf("blocked: %w", err))
		}
		took = append(took, time.Since(begun))
		watchdog.Reset(30 * time.Second)
	}
	quantiles(b, took)
}

func quantiles(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	for _, q := range []int{50, 99} {
		at := took[min(len(took)-1, len(took)*q/100)]
		b.ReportMetric(float64(at.Nanoseconds())/1e3, fmt.Sprintf("p%d-µs", q))
	}
}

// BenchmarkTunnelOpen is from the coordinator's wish to the first byte that came
// back from the backend.
func BenchmarkTunnelOpen(b *testing.B) {
	each(b, direct, func(b *testing.B, _ *backend, dial func() (io.ReadWriteCloser, error)) {
		var took []time.Duration
		for b.Loop() {
			begun := time.Now()
			conn := open(b, dial, echo, 0)
			if _, err := conn.Write([]byte{1}); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(begun))
			_ = conn.Close()
		}
		quantiles(b, took)
	})
}
