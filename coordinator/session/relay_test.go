package session_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"
)

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func TestRelays_EveryWorkerReachesTheClientsFilesAndSecrets(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "Dockerfile"), []byte("FROM scratch\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fs, err := fsutil.NewFS(source)
	if err != nil {
		t.Fatal(err)
	}
	s, _ := f.client(t, filesync.NewFSSyncProvider(filesync.StaticDirSource{"context": fs}),
		secretsprovider.FromMap(map[string][]byte{"token": []byte("hunter2")}))
	for _, name := range []string{"a", "b", "c"} {
		w := newWorker(t, name)
		f.expose(t, w, s.ID())
		caller := w.caller(t, s.ID())
		if got, err := secrets.GetSecret(t.Context(), caller, "token"); err != nil || string(got) != "hunter2" {
			t.Errorf("worker %s got the secret %q, %v", name, got, err)
		}
		if _, err := secrets.GetSecret(t.Context(), caller, "other"); !errors.Is(err, secrets.ErrNotFound) {
			t.Errorf("worker %s: a secret that does not exist: %v", name, err)
		}
		dest := t.TempDir()
		if err := filesync.FSSync(t.Context(), caller, filesync.FSSendRequestOpt{Name: "context", DestDir: dest}); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dest, "Dockerfile")); err != nil || string(got) != "FROM scratch\n" {
			t.Errorf("worker %s got the file %q, %v", name, got, err)
		}
		if caller.SharedKey() != "shared-key" || !caller.Supports("/moby.filesync.v1.FileSync/DiffCopy") || caller.Supports("/moby.sshforward.v1.SSH/CheckAgent") {
			t.Errorf("worker %s does not see the session as the client described it", name)
		}
	}
	if got := f.registry.SharedKey(s.ID()); got != "shared-key" {
		t.Errorf("the registry has the shared key %q", got)
	}
}

func TestRelays_MetadataDescribesTheCallAndNotTheConnection(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	seen := make(chan metadata.MD, 1)
	s, _ := f.client(t, &probe{unary: func(ctx context.Context) ([]byte, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		if _, bounded := ctx.Deadline(); bounded {
			md.Set("deadline", "yes")
		}
		seen <- md
		return nil, nil
	}})
	f.expose(t, w, s.ID())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "dir-name", "context", "followpaths", "a", "followpaths", "b", "exporter-md-x-bin", "\x00\xff")
	if _, err := callUnary(ctx, w.caller(t, s.ID())); err != nil {
		t.Fatal(err)
	}
	got := <-seen
	for key, want := range map[string][]string{"dir-name": {"context"}, "followpaths": {"a", "b"}, "exporter-md-x-bin": {"\x00\xff"}, "deadline": {"yes"}} {
		if !slices.Equal(got.Get(key), want) {
			t.Errorf("%s: got %q, want %q", key, got.Get(key), want)
		}
	}
	// The last hop has its own of these, and exactly one.
	for _, key := range []string{":authority", "user-agent", "content-type"} {
		if len(got.Get(key)) != 1 {
			t.Errorf("%s: got %q", key, got.Get(key))
		}
	}
	for _, key := range slices.Collect(maps.Keys(got)) {
		if strings.HasPrefix(key, "x-docker-") {
			t.Errorf("%s was sent along with a call", key)
		}
	}
}

func TestRelays_StatusDetailsHeadersAndTrailersSurvive(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	refused, err := status.New(codes.PermissionDenied, "not for you").WithDetails(durationpb.New(42 * time.Second))
	if err != nil {
		t.Fatal(err)
	}
	s, _ := f.client(t, &probe{unary: func(ctx context.Context) ([]byte, error) {
		_ = grpc.SetHeader(ctx, metadata.Pairs("h", "1"))
		_ = grpc.SetTrailer(ctx, metadata.Pairs("t", "2", "t", "3"))
		return nil, refused.Err()
	}})
	f.expose(t, w, s.ID())
	var header, trailer metadata.MD
	caller := w.caller(t, s.ID())
	_, err = callUnary(t.Context(), caller, grpc.Header(&header), grpc.Trailer(&trailer))
	got, _ := status.FromError(err)
	direct, err := f.registry.Manager().Get(t.Context(), s.ID(), false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = callUnary(t.Context(), direct)
	want, _ := status.FromError(err)
	if !proto.Equal(got.Proto(), want.Proto()) || got.Code() != codes.PermissionDenied || len(got.Details()) != 1 {
		t.Errorf("the worker sees %v, the coordinator %v", got.Proto(), want.Proto())
	}
	if !slices.Equal(header.Get("h"), []string{"1"}) || !slices.Equal(trailer.Get("t"), []string{"2", "3"}) {
		t.Errorf("the worker sees the header %v and the trailer %v", header, trailer)
	}
	if err := caller.Conn().Invoke(t.Context(), "/archfarm.test.Nothing/Here", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue)); status.Code(err) != codes.Unimplemented {
		t.Errorf("a service that the client does not have: %v", err)
	}
}

func TestRelays_HeaderArrivesBeforeTheFirstMessage(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{echo: func(stream grpc.ServerStream) error {
		if err := stream.SendHeader(metadata.Pairs("h", "1")); err != nil {
			return err
		}
		return echo(stream) // says nothing before it is spoken to
	}})
	f.expose(t, w, s.ID())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream := callEcho(ctx, t, w.caller(t, s.ID()))
	if header, err := stream.Header(); err != nil || !slices.Equal(header.Get("h"), []string{"1"}) {
		t.Errorf("header %v, %v", header, err)
	}
}

func TestRelays_ACancelledCallEndsAtTheClient(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	begun, ended := make(chan struct{}), make(chan struct{})
	s, _ := f.client(t, &probe{unary: func(ctx context.Context) ([]byte, error) {
		close(begun)
		<-ctx.Done()
		close(ended)
		return nil, nil
	}})
	f.expose(t, w, s.ID())
	caller := w.caller(t, s.ID())
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	if _, err := callUnary(ctx, caller); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
	await(t, "the client's handler ends", ended)
}

// blob is one message of a big stream.
var blob = bytes.Repeat([]byte("0123456789abcdef"), 4<<10) // 64 KiB

func TestRelays_AStalledWorkerStallsNoOtherAndFillsNoMemory(t *testing.T) {
	t.Parallel()
	f, reader, stalled := newFarm(t), newWorker(t, "reader"), newWorker(t, "stalled")
	const size = 64 << 20
	var toStalled atomic.Int64
	s, _ := f.client(t, &probe{echo: func(stream grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(stream.Context())
		for sent := 0; sent < size; sent += len(blob) {
			if err := stream.SendMsg(wrapperspb.Bytes(blob)); err != nil {
				return err
			}
			if len(md.Get("stalled")) > 0 {
				toStalled.Add(int64(len(blob)))
			}
		}
		return nil
	}})
	f.expose(t, reader, s.ID())
	f.expose(t, stalled, s.ID())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	first := callEcho(metadata.AppendToOutgoingContext(ctx, "stalled", "yes"), t, stalled.caller(t, s.ID()))
	if err := first.RecvMsg(new(wrapperspb.BytesValue)); err != nil { // one, and then no more
		t.Fatal(err)
	}
	stream, got := callEcho(ctx, t, reader.caller(t, s.ID())), 0
	for {
		var m wrapperspb.BytesValue
		err := stream.RecvMsg(&m)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.GetValue(), blob) {
			t.Fatal("a message came out changed")
		}
		got += len(m.GetValue())
	}
	if got != size {
		t.Errorf("the reader got %d bytes, want %d", got, size)
	}
	if n := toStalled.Load(); n > size/4 {
		t.Errorf("%d MiB of the stalled worker's stream are somewhere on the way", n>>20)
	}
}

func TestRelays_UploadsFromAWorkerPass(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	const size = 16 << 20
	received := 0
	s, _ := f.client(t, &probe{echo: func(stream grpc.ServerStream) error {
		for {
			var m wrapperspb.BytesValue
			if err := stream.RecvMsg(&m); err != nil {
				return ignoreEOF(err)
			}
			received += len(m.GetValue())
		}
	}})
	f.expose(t, w, s.ID())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream := callEcho(ctx, t, w.caller(t, s.ID()))
	for range size / len(blob) {
		if err := stream.SendMsg(wrapperspb.Bytes(blob)); err != nil {
			t.Fatal(err)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(new(wrapperspb.BytesValue)); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if received != size {
		t.Errorf("the client got %d bytes, want %d", received, size)
	}
}

func TestRelays_MessagesComeOutUnchanged(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	s, _ := f.client(t, &probe{echo: echo})
	f.expose(t, w, s.ID())
	caller := w.caller(t, s.ID())
	rapid.Check(t, func(rt *rapid.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		stream := callEcho(ctx, t, caller)
		sizes := rapid.SliceOfN(rapid.OneOf(rapid.IntRange(0, 40), rapid.IntRange(16<<10-40, 16<<10+40), rapid.IntRange(0, 100<<10)), 0, 5).Draw(rt, "sizes")
		for i, n := range sizes {
			sent := bytes.Repeat([]byte{byte(i), byte(n), 7}, n/3+1)[:n]
			if err := stream.SendMsg(wrapperspb.Bytes(sent)); err != nil {
				rt.Fatal(err)
			}
			var got wrapperspb.BytesValue
			if err := stream.RecvMsg(&got); err != nil {
				rt.Fatal(err)
			}
			if !bytes.Equal(got.GetValue(), sent) {
				rt.Fatalf("message %d of %d bytes was changed", i, n)
			}
		}
		if err := stream.CloseSend(); err != nil {
			rt.Fatal(err)
		}
		if err := stream.RecvMsg(new(wrapperspb.BytesValue)); !errors.Is(err, io.EOF) {
			rt.Fatalf("at the end: %v", err)
		}
	})
}

func TestRelays_MessagesUpToBuildKitsCapPass(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	answer := make([]byte, maxMessage-1024)
	s, _ := f.client(t, &probe{unary: func(context.Context) ([]byte, error) { return answer, nil }})
	f.expose(t, w, s.ID())
	caller := w.caller(t, s.ID())
	if got, err := callUnary(t.Context(), caller); err != nil || len(got) != len(answer) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	answer = make([]byte, maxMessage+1)
	if _, err := callUnary(t.Context(), caller); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a message over the cap: %v", err)
	}
}

func TestRelays_HealthIsAnsweredByTheRelay(t *testing.T) {
	t.Parallel()
	f, w := newFarm(t), newWorker(t, "w")
	stuck := make(chan struct{})
	s, _ := f.client(t, &probe{unary: func(ctx context.Context) ([]byte, error) { <-stuck; return nil, nil }})
	defer close(stuck)
	f.expose(t, w, s.ID())
	answer, err := healthpb.NewHealthClient(w.caller(t, s.ID()).Conn()).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v", answer, err)
	}
}
