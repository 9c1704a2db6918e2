package tunnel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/address"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"pgregory.net/rapid"
)

type opened struct {
	id   string
	conn net.Conn
}

// farm is a Listener on loopback.
type farm struct {
	*Listener
	addr    address.Address
	tunnels chan opened
}

func start(t *testing.T, limit int, within time.Duration) *farm {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &farm{addr: address.Address{Network: "tcp", Addr: inner.Addr().String()}, tunnels: make(chan opened, 64)}
	f.Listener = newListener(inner, Security{}, func(id string, conn net.Conn) { f.tunnels <- opened{id, conn} },
		slog.New(slog.DiscardHandler), limit, within)
	t.Cleanup(func() {
		if err := f.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Errorf("closing: %v", err)
		}
		close(f.tunnels)
		for o := range f.tunnels {
			o.conn.Close()
		}
	})
	return f
}

func (f *farm) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := f.addr.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func (f *farm) write(t *testing.T, s string) net.Conn {
	t.Helper()
	conn := f.dial(t)
	if _, err := io.WriteString(conn, s); err != nil {
		t.Fatal(err)
	}
	return conn
}

// read fails the test rather than to hang.
func read(t *testing.T, conn net.Conn, want string) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Fatalf("read %q, %v; want %q", got, err, want)
	}
}

func wantClosed(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes, %v; want the connection closed", n, err)
	}
}

func TestListener_GivesATunnelItsOwnConnectionUpToTheLastByte(t *testing.T) {
	t.Parallel()
	f := start(t, maxUndecided, decideWithin)
	agent, err := Dial(t.Context(), Plain, f.addr, "abc-DEF_123")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	if _, err := io.WriteString(agent, "first bytes"); err != nil {
		t.Fatal(err)
	}
	o := <-f.tunnels
	if o.id != "abc-DEF_123" {
		t.Errorf("id %q", o.id)
	}
	if _, ok := o.conn.(*net.TCPConn); !ok {
		t.Errorf("the tunnel is a %T, which the kernel cannot splice", o.conn)
	}
	read(t, o.conn, "first bytes")
	if _, err := io.WriteString(o.conn, "answer"); err != nil {
		t.Fatal(err)
	}
	read(t, agent, "answer")
	o.conn.Close()
}

func TestListener_GivesOthersWithTheirFirstBytes(t *testing.T) {
	t.Parallel()
	for _, head := range []string{"PRI * HTTP/2.0\r\n", "\x16\x03\x01", "ARCHFARM-TUNNEL/2 x\n", "ARCHFARM", "A\n", "\n"} {
		f := start(t, maxUndecided, decideWithin)
		client := f.write(t, head+"+rest")
		conn, err := f.Accept()
		if err != nil {
			t.Fatal(err)
		}
		read(t, conn, head+"+rest")
		if _, err := io.WriteString(conn, "answer"); err != nil {
			t.Fatal(err)
		}
		read(t, client, "answer")
		conn.Close()
	}
}

func TestListener_GivesOthersAnyFirstBytes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		head := rapid.OneOf(
			rapid.SliceOfN(rapid.Byte(), 0, 40),
			rapid.Map(rapid.IntRange(0, len(preamble)-1), func(n int) []byte { return []byte(preamble[:n]) }),
		).Draw(r, "head")
		all := append(head, '!', '!')
		if strings.HasPrefix(string(all), preamble) {
			r.Skip("a tunnel")
		}
		near, far := net.Pipe()
		defer near.Close()
		defer far.Close()
		l := &Listener{within: time.Minute}
		go func() { _, _ = far.Write(all) }()
		id, peeked, err := l.peek(near)
		if err != nil || id != "" {
			r.Fatalf("peek: %q, %v", id, err)
		}
		got := make([]byte, len(all))
		if _, err := io.ReadFull(&replayed{Conn: near, head: peeked}, got); err != nil || string(got) != string(all) {
			r.Fatalf("read %q, %v; want %q", got, err, all)
		}
	})
}

func TestListener_ClosesATunnelWithoutAProperID(t *testing.T) {
	t.Parallel()
	f := start(t, maxUndecided, decideWithin)
	for _, id := range []string{"\n", "a b\n", "a/b\n", "é\n", "abc\r\n", strings.Repeat("a", 65) + "\n", strings.Repeat("a", 1000)} {
		wantClosed(t, f.write(t, preamble+id))
	}
	if len(f.tunnels) > 0 {
		t.Errorf("accepted %q", (<-f.tunnels).id)
	}
}

func TestListener_SilentAndSlowClientsDelayNobodyAndAreClosed(t *testing.T) {
	t.Parallel()
	f := start(t, maxUndecided, 200*time.Millisecond)
	silent := f.dial(t)
	slow := f.write(t, preamble+"never-end")
	for range 8 {
		f.dial(t)
	}
	wantTunnel(t, f, "quick")
	wantClosed(t, silent)
	wantClosed(t, slow)
}

func TestListener_TheDeadlineIsLiftedForWhatIsHandedOn(t *testing.T) {
	t.Parallel()
	const within = 50 * time.Millisecond
	f := start(t, maxUndecided, within)
	agent, err := Dial(t.Context(), Plain, f.addr, "t")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	o := <-f.tunnels
	defer o.conn.Close()
	client := f.write(t, "PRI")
	other, err := f.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	read(t, other, "PRI")
	for _, pair := range [][2]net.Conn{{agent, o.conn}, {client, other}} {
		late := time.AfterFunc(3*within, func() { _, _ = pair[0].Write([]byte("x")) })
		defer late.Stop()
		// Without a deadline of its own: the one of the listener must be gone.
		if _, err := pair[1].Read(make([]byte, 1)); err != nil {
			t.Errorf("reading later than the deadline: %v", err)
		}
	}
}

func TestListener_AFloodClosesItsOwnOldest(t *testing.T) {
	t.Parallel()
	const limit = 4
	f := start(t, limit, time.Minute)
	var flood []net.Conn
	for range limit {
		flood = append(flood, f.dial(t))
	}
	// Each further one pushes out the oldest, in order.
	for i := range limit {
		flood = append(flood, f.dial(t))
		wantClosed(t, flood[i])
	}
	wantTunnel(t, f, "honest")
}

func wantTunnel(t *testing.T, f *farm, id string) {
	t.Helper()
	conn, err := Dial(t.Context(), Plain, f.addr, id)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	select {
	case o := <-f.tunnels:
		defer o.conn.Close()
		if o.id != id {
			t.Errorf("tunnel %q, want %q", o.id, id)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("no tunnel")
	}
}

func TestListener_CloseEndsUndecidedAndAcceptButNotTunnels(t *testing.T) {
	t.Parallel()
	f := start(t, maxUndecided, time.Hour)
	silent := f.dial(t)
	waiting := f.write(t, "PRI") // decided, but nobody accepts it
	agent, err := Dial(t.Context(), Plain, f.addr, "lives-on")
	if err != nil {
		t.Fatal(err)
	}
	defer agent.Close()
	o := <-f.tunnels
	defer o.conn.Close()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, silent)
	wantClosed(t, waiting)
	if _, err := f.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	if _, err := io.WriteString(agent, "still"); err != nil {
		t.Fatal(err)
	}
	read(t, o.conn, "still")
}

// tired fails to accept, first passing, then for good.
type tired struct {
	net.Listener
	calls atomic.Int32
}

var errBroken = errors.New("broken")

func (l *tired) Accept() (net.Conn, error) {
	if l.calls.Add(1) == 1 {
		return nil, syscall.EMFILE
	}
	return nil, errBroken
}

func TestListener_RetriesPassingErrorsAndTellsLastingOnes(t *testing.T) {
	t.Parallel()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	broken := &tired{Listener: inner}
	l := NewListener(broken, Security{}, nil, slog.New(slog.DiscardHandler))
	defer func() { _ = l.Close() }()
	if _, err := l.Accept(); !errors.Is(err, errBroken) {
		t.Errorf("Accept: %v, want %v", err, errBroken)
	}
	if n := broken.calls.Load(); n != 2 {
		t.Errorf("accepted %d times, want 2", n)
	}
}

func TestListener_ServesGRPCBesideTunnels(t *testing.T) {
	t.Parallel()
	f := start(t, maxUndecided, decideWithin)
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- server.Serve(f) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Errorf("serving: %v", err)
		}
	}()

	cc, err := grpc.NewClient(f.addr.Addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		answer, err := healthpb.NewHealthClient(cc).Check(ctx, &healthpb.HealthCheckRequest{})
		cancel()
		if err != nil || answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Fatalf("health: %v, %v", answer, err)
		}
		wantTunnel(t, f, "beside")
	}
}

func TestDial_RefusesAnInvalidIDBeforeDialing(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"", "a b", "a\n", strings.Repeat("x", 65)} {
		if _, err := Dial(t.Context(), Plain, address.Address{}, id); !errors.Is(err, ErrInvalidID) {
			t.Errorf("Dial(%q): %v", id, err)
		}
	}
}
