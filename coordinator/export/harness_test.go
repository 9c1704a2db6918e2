package export

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	bksession "github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/coordinator/split"
)

// patience bounds every wait of these tests; nothing comes near it unless it hangs.
const patience = time.Minute

// tester is a *testing.T or a *rapid.T.
type tester interface {
	Helper()
	Cleanup(func())
	Fatal(...any)
	Fatalf(string, ...any)
	Errorf(string, ...any)
}

// clientOf is a client's session that takes exports, as the coordinator sees it.
func clientOf(t tester, takes ...bksession.Attachable) bksession.Caller {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	manager, err := bksession.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	s, err := bksession.NewSession(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range takes {
		s.Allow(a)
	}
	var serving sync.WaitGroup
	dial := func(_ context.Context, _ string, meta map[string][]string) (net.Conn, error) {
		ours, theirs := net.Pipe()
		serving.Go(func() { _ = manager.HandleConn(ctx, ours, meta) })
		return theirs, nil
	}
	serving.Go(func() { _ = s.Run(ctx, dial) })
	caller, err := manager.Get(ctx, s.ID(), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = s.Close()
		serving.Wait()
	})
	return caller
}

// worker is a leg's worker: what it exports to its client's session comes here.
type worker struct{ conn *grpc.ClientConn }

func (w worker) Context(ctx context.Context) context.Context { return ctx }
func (w worker) Supports(string) bool                        { return true }
func (w worker) Conn() *grpc.ClientConn                      { return w.conn }
func (w worker) SharedKey() string                           { return "" }

// rig is a build whose legs export.
type rig struct {
	*Merge
	spool   *Spool
	workers []worker
}

// newRig starts the merging of exports for a client. The parts' legs are counted from 0.
func newRig(t tester, spoolDir string, client bksession.Caller, exports []split.Export, parts ...Part) *rig {
	t.Helper()
	spool, err := NewSpool(spoolDir, 0)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{Merge: New(context.Background(), spool), spool: spool}
	for range parts {
		r.workers = append(r.workers, r.worker(t, len(r.workers)))
	}
	r.Begin(Beginning{Client: client, Exports: exports, Parts: parts})
	t.Cleanup(func() { // after the workers, which were started later
		if err := r.Close(); err != nil {
			t.Errorf("closing: %v", err)
		}
		if used := spool.Used(); used != 0 {
			t.Errorf("%d bytes are still reserved", used)
		}
	})
	return r
}

// worker connects a leg's worker, as the relay of its session does.
func (r *rig) worker(t tester, leg int) worker {
	t.Helper()
	answers := r.Leg(leg).Intercept
	server := grpc.NewServer(grpc.WaitForHandlers(true), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		md, _ := metadata.FromIncomingContext(stream.Context())
		answer := answers(method, md)
		if answer == nil {
			return errors.New("not intercepted")
		}
		return answer(stream)
	}))
	listener := bufconn.Listen(1 << 20)
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	conn, err := grpc.NewClient("passthrough:///worker", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithStreamInterceptor(grpcerrors.StreamClientInterceptor))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
		serving.Wait()
	})
	return worker{conn}
}

// each runs the workers' exports beside each other and returns their errors.
func (r *rig) each(export func(leg int, w worker) error) []error {
	errs := make([]error, len(r.workers))
	var running sync.WaitGroup
	for i, w := range r.workers {
		running.Go(func() { errs[i] = export(i, w) })
	}
	running.Wait()
	return errs
}

// sendFiles is what BuildKit's local exporter does, in mode=delete.
func sendFiles(ctx context.Context, w worker, files fsutil.FS) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return filesync.CopyToCaller(ctx, files, 0, w, nil, filesync.WithExporterMultiPlatformTransfer())
}

// sendFile is what exporters of single files do.
func sendFile(ctx context.Context, w worker, header map[string]string, write func(io.Writer) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	out, err := filesync.CopyFileWriter(ctx, header, 0, w)
	if err != nil {
		return err
	}
	if err := write(out); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}

// target is a file of the client.
type target struct {
	refuse error // instead of taking it
	none   bool  // the client has it already
	broken error // of its disk

	mu      sync.Mutex
	header  map[string]string
	content []byte
	closed  bool
}

func (f *target) attach() bksession.Attachable {
	return filesync.NewFSSyncTarget(filesync.WithFSSync(0, func(header map[string]string) (io.WriteCloser, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.header = header
		if f.none || f.refuse != nil {
			return nil, f.refuse
		}
		return f, nil
	}))
}

func (f *target) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken != nil {
		return 0, f.broken
	}
	f.content = append(f.content, p...)
	return len(p), nil
}

func (f *target) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return nil
}

// wantNone checks that there was no error.
func wantNone(t tester, errs ...error) {
	t.Helper()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
}

func parts(n int) []Part {
	keys := []string{"linux/amd64", "linux/arm64", "linux/arm/v7", "windows(10)/amd64"}
	var out []Part
	for i := range n {
		out = append(out, Part{Leg: i, Key: keys[i]})
	}
	return out
}
