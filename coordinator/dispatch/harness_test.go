package dispatch_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client/buildid"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/fleet/fleettest"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	amd64 = "linux/amd64"
	i386  = "linux/386"
	arm64 = "linux/arm64"
)

// farm is a whole one but for the daemons, which are scripts.
type farm struct {
	*dispatch.Farm
	door   *fleettest.Door
	builds *dispatch.Builds
}

func bubble(t *testing.T, test func(t *testing.T, f *farm)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { test(t, newFarm(t)) })
}

func newFarm(t *testing.T) *farm {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	sessions, err := session.NewRegistry()
	if err != nil {
		t.Fatal(err)
	}
	scheduler := schedule.New(nil)
	scheduler.Share = true
	workers := fleet.New(log, func(ws []*fleet.Worker) {
		var out []schedule.Worker
		for _, w := range ws {
			s := schedule.Worker{
				Name: w.Name, Platforms: w.Platforms, Reported: w.Reported(),
				Pool: w.Pool, Emulated: w.Emulated(), AllowEmulation: w.Pool == "emulating",
				Slots: int(w.Report().GetSlots().GetTotal()), Used: int(w.Report().GetSlots().GetUsed()),
			}
			if w.Report().GetState() != archfarmv1.Worker_STATE_READY {
				s.State = schedule.Draining
			}
			out = append(out, s)
		}
		scheduler.Update(out)
	})
	f := &farm{door: fleettest.Serve(t, workers), Farm: &dispatch.Farm{
		Fleet: workers, Scheduler: scheduler, Sessions: sessions, Relays: session.NewRelays(sessions, log),
		Metrics: dispatch.NewMetrics(prometheus.NewRegistry()), Log: log,
	}}
	f.builds = dispatch.NewBuilds(f.Farm)
	time.Sleep(scheduler.Grace) // long after the start, on the bubble's clock
	return f
}

// worker attaches a worker with a scripted daemon.
func (f *farm) worker(t *testing.T, name string, slots int, platforms ...string) *daemon {
	t.Helper()
	d := &daemon{name: name, jobs: map[string]*job{}, blobs: map[string][]byte{}, calls: map[string]int{}}
	d.Worker = f.door.Attach(t, name, platforms, slots, func(s *grpc.Server) {
		controlapi.RegisterControlServer(s, d)
		gwpb.RegisterLLBBridgeServer(s, &bridge{d: d})
		contentapi.RegisterContentServer(s, &store{d: d})
	})
	synctest.Wait()
	return d
}

// daemon is a buildkitd that does what a test tells it to.
type daemon struct {
	controlapi.UnimplementedControlServer
	*fleettest.Worker
	name string

	// Frontend answers LLBBridge.Solve, Export what happens after Return, Early
	// what happens before: nil for the usual. Set them before the build.
	Frontend func(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error)
	Export   func(ctx context.Context) error
	Early    func(ctx context.Context) error
	Exec     func(gwpb.LLBBridge_ExecProcessServer) error
	Ping     func(ctx context.Context) error
	Progress []*controlapi.StatusResponse
	// Forgetful daemons keep no build history.
	Forgetful bool

	mu     sync.Mutex
	jobs   map[string]*job
	order  []*job
	blobs  map[string][]byte
	calls  map[string]int // of the gateway, by method
	solves []*gwpb.SolveRequest
	refs   int
}

// job is one attempt as its daemon sees it.
type job struct {
	req      *controlapi.SolveRequest
	returned chan struct{}
	ended    chan struct{} // the solve has

	result *gwpb.Result // set when returned is closed
}

func (d *daemon) Solve(ctx context.Context, req *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	j := d.job(req.GetRef())
	j.req = req
	d.mu.Lock()
	d.order = append(d.order, j)
	d.mu.Unlock()
	defer close(j.ended)
	if d.Early != nil {
		if err := d.Early(ctx); err != nil {
			return nil, err
		}
	}
	select {
	case <-j.returned:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	if d.Export != nil {
		if err := d.Export(ctx); err != nil {
			return nil, err
		}
	}
	return &controlapi.SolveResponse{ExporterResponse: d.image()}, nil
}

// image is what an image exporter answers; its index is in the content store.
func (d *daemon) image() map[string]string {
	blob := []byte(`{"schemaVersion":2,"made by":"` + d.name + `"}`)
	desc := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	raw, _ := json.Marshal(desc)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.blobs[desc.Digest.String()] = blob
	return map[string]string{exptypes.ExporterImageDescriptorKey: base64.StdEncoding.EncodeToString(raw), "by": d.name, "only." + d.name: "yes"}
}

func (d *daemon) Info(ctx context.Context, _ *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	if d.Ping != nil {
		if err := d.Ping(ctx); err != nil {
			return nil, err
		}
	}
	return &controlapi.InfoResponse{}, nil
}

// job finds or makes the job: calls about it may come before it.
func (d *daemon) job(ref string) *job {
	d.mu.Lock()
	defer d.mu.Unlock()
	j, ok := d.jobs[ref]
	if !ok {
		j = &job{returned: make(chan struct{}), ended: make(chan struct{})}
		d.jobs[ref] = j
	}
	return j
}

func (d *daemon) Status(req *controlapi.StatusRequest, stream controlapi.Control_StatusServer) error {
	for _, s := range d.Progress {
		if err := stream.Send(s); err != nil {
			return err
		}
	}
	select {
	case <-d.job(req.GetRef()).ended:
	case <-stream.Context().Done():
	}
	return nil
}

func (d *daemon) attempts() []*job {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.order
}

func (d *daemon) called(method string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[method]
}

// bridge is the daemon's gateway.
type bridge struct {
	gwpb.UnimplementedLLBBridgeServer
	d *daemon
}

func (b *bridge) count(method string) {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	b.d.calls[method]++
}

func (b *bridge) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	b.count("Solve")
	b.d.mu.Lock()
	b.d.solves = append(b.d.solves, req)
	b.d.mu.Unlock()
	result, err := b.frontend(ctx, req)
	if err != nil {
		return nil, err
	}
	return &gwpb.SolveResponse{Result: result}, nil
}

func (b *bridge) frontend(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error) {
	if b.d.Frontend != nil {
		return b.d.Frontend(ctx, req)
	}
	return b.d.reference(nil), nil
}

// reference is a result with one new reference.
func (d *daemon) reference(def *pb.Definition) *gwpb.Result {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refs++
	return &gwpb.Result{
		Result:   &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: fmt.Sprintf("%s-%d", d.name, d.refs), Def: def}},
		Metadata: map[string][]byte{exptypes.ExporterImageConfigKey: []byte(d.name)},
	}
}

func (b *bridge) Return(ctx context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	b.count("Return")
	j := b.d.job(buildid.FromIncomingContext(ctx))
	j.result = req.GetResult()
	close(j.returned)
	return &gwpb.ReturnResponse{}, nil
}

func (b *bridge) Evaluate(_ context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	b.count("Evaluate " + req.GetRef())
	return &gwpb.EvaluateResponse{}, nil
}

func (b *bridge) ReadFile(_ context.Context, req *gwpb.ReadFileRequest) (*gwpb.ReadFileResponse, error) {
	return &gwpb.ReadFileResponse{Data: []byte(b.d.name + ":" + req.GetRef() + ":" + req.GetFilePath())}, nil
}

func (b *bridge) ResolveSourceMeta(context.Context, *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	b.count("ResolveSourceMeta")
	return &gwpb.ResolveSourceMetaResponse{}, nil
}

func (b *bridge) NewContainer(context.Context, *gwpb.NewContainerRequest) (*gwpb.NewContainerResponse, error) {
	return &gwpb.NewContainerResponse{}, nil
}

func (b *bridge) ExecProcess(stream gwpb.LLBBridge_ExecProcessServer) error { return b.d.Exec(stream) }

// store is the daemon's content.
type store struct {
	contentapi.UnimplementedContentServer
	d *daemon
}

func (s *store) Info(_ context.Context, req *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	blob, ok := s.d.blobs[req.GetDigest()]
	if !ok {
		return nil, status.Error(codes.NotFound, "no such blob")
	}
	return &contentapi.InfoResponse{Info: &contentapi.Info{Digest: req.GetDigest(), Size: int64(len(blob))}}, nil
}

func (s *store) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	s.d.mu.Lock()
	blob := s.d.blobs[req.GetDigest()]
	s.d.mu.Unlock()
	return stream.Send(&contentapi.ReadContentResponse{Offset: req.GetOffset(), Data: blob[req.GetOffset():]})
}

// request is a build of a Dockerfile for some platforms, pushed if named.
func request(ref string, platforms string, name string) *controlapi.SolveRequest {
	req := &controlapi.SolveRequest{Ref: ref, FrontendAttrs: map[string]string{}}
	if platforms != "" {
		req.FrontendAttrs["platform"] = platforms
	}
	if name != "" {
		req.Exporters = []*controlapi.Exporter{{Type: "image", Attrs: map[string]string{"name": name, "push": "true"}}}
	}
	return req
}

// frontend is the client's first call of such a build.
func frontend(platforms string) *gwpb.SolveRequest {
	req := &gwpb.SolveRequest{Frontend: "dockerfile.v0", FrontendOpt: map[string]string{}, AllowResultReturn: true, AllowResultArrayRef: true}
	if platforms != "" {
		req.FrontendOpt["platform"] = platforms
	}
	return req
}

// begin starts a build that ends at the test's end, if it has not by then.
func (f *farm) begin(ctx context.Context, t *testing.T, req *controlapi.SolveRequest) (b *dispatch.Build, end func(error)) {
	t.Helper()
	b, err := f.Begin(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	end = func(reason error) { once.Do(func() { b.End(reason) }) }
	t.Cleanup(func() { end(nil) })
	return b, end
}

// idle checks that nothing is left of any build.
func (f *farm) idle(t *testing.T, daemons ...*daemon) {
	t.Helper()
	time.Sleep(time.Second) // for everybody's next report
	synctest.Wait()
	for _, w := range f.Scheduler.Snapshot() {
		if w.Used != 0 {
			t.Errorf("the scheduler counts %d slots of %s as used", w.Used, w.Name)
		}
	}
	for _, d := range daemons {
		if d.Used() != 0 || d.Open() != 0 {
			t.Errorf("%s has %d slots used, %d connections", d.name, d.Used(), d.Open())
		}
	}
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// beside runs f beside the test; done gives its error, or fails if it still runs.
func beside(f func() error) (done func(t *testing.T) error) {
	ended := make(chan error, 1)
	go func() { ended <- f() }()
	return func(t *testing.T) error {
		t.Helper()
		synctest.Wait()
		select {
		case err := <-ended:
			return err
		default:
			t.Fatal("it still waits")
			return nil
		}
	}
}

// runsOn is an architecture as BuildKit's messages have it.
func runsOn(arch string) *pb.Platform { return &pb.Platform{OS: "linux", Architecture: arch} }

// runs is a definition that executes something on each of the platforms.
func runs(platforms ...string) *pb.Definition {
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}
	for i, arch := range platforms {
		op := &pb.Op{
			Op:       &pb.Op_Exec{Exec: &pb.ExecOp{Meta: &pb.Meta{Args: []string{"make", fmt.Sprint(i)}}}},
			Platform: runsOn(arch),
		}
		raw, err := op.MarshalVT()
		if err != nil {
			panic(err)
		}
		def.Def = append(def.Def, raw)
		def.Metadata[digest.FromBytes(raw).String()] = &pb.OpMetadata{Description: map[string]string{"llb.customname": fmt.Sprintf("[%d/%d] RUN make", i+1, len(platforms))}}
	}
	return def
}
