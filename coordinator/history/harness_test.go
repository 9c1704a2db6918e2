package history

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

// daemon is a worker's buildkitd as far as the history asks it, with a real
// content store.
type daemon struct {
	controlapi.UnimplementedControlServer
	store content.Store
	conn  *grpc.ClientConn

	mu      sync.Mutex
	gone    bool // from the farm
	frozen  bool
	records map[string]*controlapi.BuildHistoryRecord
	traces  map[string]*controlapi.Descriptor // that finalizing adds
	removed []string
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{store: store, records: map[string]*controlapi.BuildHistoryRecord{}, traces: map[string]*controlapi.Descriptor{}}
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	controlapi.RegisterControlServer(server, d)
	contentapi.RegisterContentServer(server, contentserver.New(store))
	l := bufconn.Listen(1 << 16)
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() { server.Stop(); running.Wait() })
	d.conn, err = grpc.NewClient("passthrough:///worker", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.conn.Close() })
	return d
}

func (d *daemon) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	d.mu.Lock()
	frozen, record := d.frozen, d.records[req.GetRef()]
	d.mu.Unlock()
	if frozen {
		<-stream.Context().Done()
		return nil
	}
	if record == nil {
		return nil
	}
	return stream.Send(&controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: record})
}

func (d *daemon) UpdateBuildHistory(_ context.Context, req *controlapi.UpdateBuildHistoryRequest) (*controlapi.UpdateBuildHistoryResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if record := d.records[req.GetRef()]; req.GetFinalize() && record != nil {
		record.Trace = d.traces[req.GetRef()]
	}
	if req.GetDelete() {
		d.removed = append(d.removed, req.GetRef())
	}
	return &controlapi.UpdateBuildHistoryResponse{}, nil
}

// blob puts content into the daemon's store.
func (d *daemon) blob(t *testing.T, mediaType string, data []byte) ocispecs.Descriptor {
	t.Helper()
	desc := ocispecs.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(t.Context(), d.store, desc.Digest.String(), bytes.NewReader(data), desc); err != nil {
		t.Fatal(err)
	}
	return desc
}

func (d *daemon) json(t *testing.T, mediaType string, v any) ocispecs.Descriptor {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return d.blob(t, mediaType, raw)
}

func (d *daemon) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gone = true
}

type daemons map[string]*daemon

func (ds daemons) BuildKit(_ context.Context, name string) (grpc.ClientConnInterface, error) {
	d, ok := ds[name]
	if ok {
		d.mu.Lock()
		defer d.mu.Unlock()
	}
	if !ok || d.gone {
		return nil, status.Error(codes.Unavailable, "not attached")
	}
	return d.conn, nil
}

// traced is a trace that is the same for every build.
type traced []tracetest.SpanStub

func (s traced) Record(context.Context) func() []tracetest.SpanStub {
	return func() []tracetest.SpanStub { return s }
}

// bubble runs a test with a clock of its own.
func bubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, test)
}

// database opens the store in a folder, which is to be closed.
func database(t testing.TB, dir string) store.Store {
	t.Helper()
	s, err := sqlite.Open(context.Background(), sqlite.Options{Path: filepath.Join(dir, "archfarm.db"), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// open opens a history, whose store is in options.Dir, until the test's end, or until
// the function that it returns is called.
func open(t *testing.T, options Options) (*History, func()) {
	t.Helper()
	if options.Dir == "" {
		options.Dir = t.TempDir()
	}
	db := database(t, options.Dir)
	options.Store, options.Dir = db, filepath.Join(options.Dir, "history")
	if options.Workers == nil {
		options.Workers = daemons{}
	}
	h, err := Open(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		if err := errors.Join(h.Finish(context.WithoutCancel(t.Context())), db.Close()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(end)
	return h, end
}

// running is a build under way.
type running struct {
	*Recorder
	progress *progress.Stream
}

func begin(t *testing.T, h *History, req *controlapi.SolveRequest) running {
	t.Helper()
	stream := progress.NewStream(0)
	return running{h.Begin(t.Context(), req, req.GetExporters(), stream), stream}
}

func (r running) end(legs []Leg, err error) {
	r.Complete(legs, err)
	r.progress.Close()
}

// built is a build that has succeeded, and whose record is in the store.
func built(t *testing.T, h *History, ref string, legs ...Leg) {
	t.Helper()
	b := begin(t, h, &controlapi.SolveRequest{Ref: ref})
	b.Built(t.Context(), legs, nil)
	b.end(legs, nil)
	if err := h.stored(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
}

// listed returns what a request that exits early is sent.
func listed(t *testing.T, h *History, req *controlapi.BuildHistoryRequest) []*controlapi.BuildHistoryEvent {
	t.Helper()
	req.EarlyExit = true
	var out []*controlapi.BuildHistoryEvent
	if err := h.Listen(t.Context(), req, func(e *controlapi.BuildHistoryEvent) error { out = append(out, e); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// the returns the one record of a reference.
func the(t *testing.T, h *History, ref string) *controlapi.BuildHistoryRecord {
	t.Helper()
	events := listed(t, h, &controlapi.BuildHistoryRequest{Ref: ref})
	if len(events) != 1 || events[0].GetType() != controlapi.BuildHistoryEventType_COMPLETE {
		t.Fatalf("of %s: %v", ref, events)
	}
	return events[0].GetRecord()
}

// ear listens in the background.
type ear struct {
	mu     sync.Mutex
	events []string
	end    func()
	result chan error
}

func listen(t *testing.T, h *History, req *controlapi.BuildHistoryRequest) *ear {
	t.Helper()
	ctx, cancel := context.WithCancelCause(t.Context())
	e := &ear{result: make(chan error, 1), end: func() { cancel(io.ErrClosedPipe) }}
	go func() {
		e.result <- h.Listen(ctx, req, func(event *controlapi.BuildHistoryEvent) error {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.events = append(e.events, event.GetType().String()+" "+event.GetRecord().GetRef())
			return nil
		})
	}()
	synctest.Wait()
	return e
}

func (e *ear) heard() []string {
	synctest.Wait()
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.events
}

func (e *ear) leave(t *testing.T) {
	t.Helper()
	e.end()
	if err := <-e.result; !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("at the end: %v", err)
	}
}

func readAll(t *testing.T, h *History, dgst string) ([]byte, error) {
	t.Helper()
	return content.ReadBlob(t.Context(), h.Content(), ocispecs.Descriptor{Digest: digest.Digest(dgst)})
}

const patience = 2 * tracePatience // until nothing is under way any more

func pass(d time.Duration) {
	time.Sleep(d) // of the bubble's clock
	synctest.Wait()
}
