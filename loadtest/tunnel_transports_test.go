package loadtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"testing"

	"github.com/archfarm/archfarm/address"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/tunnel"
	"github.com/hashicorp/yamux"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// transport is one way in which a coordinator gets a connection to the backend
// beside an agent that has dialed it.
type transport struct {
	name string
	// start connects an agent for backend, over link, and returns how the
	// coordinator then opens a connection.
	start func(b *testing.B, backend address.Address, link link) (open func() (io.ReadWriteCloser, error))
}

// link is how an agent reaches a coordinator: it returns where to dial.
type link func(b *testing.B, coordinator string) string

func direct(_ *testing.B, coordinator string) string { return coordinator }

var transports = []transport{
	{"dialback", startDialback},
	{"yamux", func(b *testing.B, backend address.Address, link link) func() (io.ReadWriteCloser, error) {
		return startYamux(b, backend, link, yamux.DefaultConfig())
	}},
	{"yamux-4MiB", func(b *testing.B, backend address.Address, link link) func() (io.ReadWriteCloser, error) {
		wide := yamux.DefaultConfig()
		wide.MaxStreamWindowSize = 4 << 20 // of 256 KiB
		return startYamux(b, backend, link, wide)
	}},
	{"grpc", startGRPC},
}

// join copies both ways as an agent does. Only net.Conn pairs are spliced.
func join(a, b io.ReadWriteCloser) {
	var both sync.WaitGroup
	one := func(dst, src io.ReadWriteCloser) {
		_, _ = io.Copy(dst, src)
		_ = dst.Close()
		_ = src.Close()
	}
	both.Go(func() { one(a, b) })
	one(b, a)
	both.Wait()
}

// orders is the coordinator's side of the Attach stream, reduced to Open.
type orders struct {
	archfarmv1.UnimplementedAgentServiceServer
	opens chan string
	ended chan struct{}
}

func (o *orders) Attach(rpc grpc.BidiStreamingServer[archfarmv1.AttachRequest, archfarmv1.AttachResponse]) error {
	for {
		select {
		case id := <-o.opens:
			err := rpc.Send(&archfarmv1.AttachResponse{Message: &archfarmv1.AttachResponse_Open{Open: &archfarmv1.Open{ConnectionId: id}}})
			if err != nil {
				return err
			}
		case <-o.ended:
			return nil
		}
	}
}

// attach runs an agent that calls serve for every Open, until the benchmark
// ends.
func attach(b *testing.B, l net.Listener, where string, server *grpc.Server, serve func(cc *grpc.ClientConn, id string)) *orders {
	b.Helper()
	o := &orders{opens: make(chan string), ended: make(chan struct{})}
	archfarmv1.RegisterAgentServiceServer(server, o)
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	cc, err := grpc.NewClient(where, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	// Not b's context, which ends before the cleanup that ends the stream.
	stream, err := archfarmv1.NewAgentServiceClient(cc).Attach(context.WithoutCancel(b.Context()))
	if err != nil {
		b.Fatal(err)
	}
	running.Go(func() {
		for {
			m, err := stream.Recv()
			if err != nil {
				return
			}
			running.Go(func() { serve(cc, m.GetOpen().GetConnectionId()) })
		}
	})
	b.Cleanup(func() {
		close(o.ended)
		_ = cc.Close()
		server.Stop()
		running.Wait()
	})
	return o
}

// startDialback is what archfarm does: package tunnel.
func startDialback(b *testing.B, backend address.Address, link link) func() (io.ReadWriteCloser, error) {
	inner := listen(b)
	where := address.Address{Network: "tcp", Addr: link(b, inner.Addr().String())}
	arrived := make(chan net.Conn)
	l := tunnel.NewListener(inner, tunnel.Security{}, func(_ string, conn net.Conn) { arrived <- conn }, slog.New(slog.DiscardHandler))
	ctx := context.WithoutCancel(b.Context())
	o := attach(b, l, where.Addr, grpc.NewServer(), func(_ *grpc.ClientConn, id string) {
		local, err := backend.Dial(ctx)
		if err != nil {
			b.Error(err)
			return
		}
		back, err := tunnel.Dial(ctx, tunnel.Plain, where, id)
		if err != nil {
			b.Error(err)
			return
		}
		_ = tunnel.Splice(back, local)
	})
	var opened int
	return func() (io.ReadWriteCloser, error) {
		opened++
		o.opens <- fmt.Sprintf("connection-%d", opened)
		return <-arrived, nil
	}
}

// startYamux multiplexes all connections over one that the agent dials.
func startYamux(b *testing.B, backend address.Address, link link, cfg *yamux.Config) func() (io.ReadWriteCloser, error) {
	cfg.LogOutput = io.Discard
	l := listen(b)
	out, err := net.Dial("tcp", link(b, l.Addr().String()))
	if err != nil {
		b.Fatal(err)
	}
	in, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	agent, err := yamux.Server(out, cfg)
	if err != nil {
		b.Fatal(err)
	}
	coordinator, err := yamux.Client(in, cfg)
	if err != nil {
		b.Fatal(err)
	}
	ctx := context.WithoutCancel(b.Context())
	var running sync.WaitGroup
	running.Go(func() {
		for {
			stream, err := agent.AcceptStream()
			if err != nil {
				return
			}
			running.Go(func() {
				local, err := backend.Dial(ctx)
				if err != nil {
					b.Error(err)
					return
				}
				join(stream, local)
			})
		}
	})
	b.Cleanup(func() {
		_ = l.Close()
		_ = coordinator.Close()
		_ = agent.Close()
		running.Wait()
	})
	return func() (io.ReadWriteCloser, error) { return coordinator.OpenStream() }
}

// bytesStream is both sides of the gRPC stream that wraps bytes.
type bytesStream interface {
	SendMsg(m any) error
	RecvMsg(m any) error
}

// wrapped makes a connection of it.
type wrapped struct {
	bytesStream
	rest  []byte
	close func()
}

func (w *wrapped) Read(p []byte) (int, error) {
	for len(w.rest) == 0 {
		var m wrapperspb.BytesValue
		if err := w.RecvMsg(&m); err != nil {
			return 0, err
		}
		w.rest = m.GetValue()
	}
	n := copy(p, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

func (w *wrapped) Write(p []byte) (int, error) {
	if err := w.SendMsg(&wrapperspb.BytesValue{Value: p}); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (w *wrapped) Close() error { w.close(); return nil }

// startGRPC wraps the bytes of every connection in a stream of its own on the
// agent's one gRPC connection.
func startGRPC(b *testing.B, backend address.Address, link link) func() (io.ReadWriteCloser, error) {
	arrived := make(chan *wrapped)
	server := grpc.NewServer()
	carry := grpc.StreamDesc{StreamName: "Carry", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		ended := make(chan struct{})
		arrived <- &wrapped{bytesStream: s, close: sync.OnceFunc(func() { close(ended) })}
		select {
		case <-ended:
			return nil
		case <-s.Context().Done():
			return errors.New("the agent left")
		}
	}}
	server.RegisterService(&grpc.ServiceDesc{ServiceName: "loadtest.Carrier", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{carry}}, struct{}{})
	background := context.WithoutCancel(b.Context())
	l := listen(b)
	o := attach(b, l, link(b, l.Addr().String()), server, func(cc *grpc.ClientConn, _ string) {
		local, err := backend.Dial(background)
		if err != nil {
			b.Error(err)
			return
		}
		ctx, cancel := context.WithCancel(background)
		stream, err := cc.NewStream(ctx, &carry, "/loadtest.Carrier/Carry")
		if err != nil {
			cancel()
			b.Error(err)
			return
		}
		join(&wrapped{bytesStream: stream, close: cancel}, local)
	})
	return func() (io.ReadWriteCloser, error) {
		o.opens <- "unused"
		return <-arrived, nil
	}
}

func listen(b *testing.B) net.Listener {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = l.Close() })
	return l
}
