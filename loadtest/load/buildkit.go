package load

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/client/buildid"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/e2e/farmtest"
)

// Tell sends a piece of a build's progress.
type Tell func(*controlapi.StatusResponse)

// BuildKit is a daemon that builds nothing: what a solve of a platform exports has been pushed before.
type BuildKit struct {
	controlapi.UnimplementedControlServer
	gwpb.UnimplementedLLBBridgeServer
	contentapi.UnimplementedContentServer

	// Images are what builds export, by platform; set before Serve.
	Images map[string]Image
	// Run, unless nil, is what a build does; set before Serve.
	Run func(ctx context.Context, tell Tell) error

	// Solves counts the builds that have begun.
	Solves atomic.Int64
	first  chan time.Time // of the first build; buffered
	refs   atomic.Int64

	mu     sync.Mutex
	builds map[string]*build
}

// build is a solve, as several calls know it by its reference.
type build struct {
	platform string
	progress chan *controlapi.StatusResponse
	returned chan struct{}
	once     sync.Once
	ended    chan struct{} // closed when nothing of it comes any more
}

// NewBuildKit returns one that is to be served.
func NewBuildKit() *BuildKit {
	return &BuildKit{first: make(chan time.Time, 1), builds: map[string]*build{}}
}

// First is told once when the first build began.
func (k *BuildKit) First() <-chan time.Time { return k.first }

// Serve serves it until t ends.
func (k *BuildKit) Serve(t farmtest.T) address.Address {
	t.Helper()
	path := filepath.Join(farmtest.Folder(t), "buildkitd.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatalf("serving a BuildKit: %v", err)
	}
	server := grpc.NewServer()
	controlapi.RegisterControlServer(server, k)
	gwpb.RegisterLLBBridgeServer(server, bridge{k: k})
	contentapi.RegisterContentServer(server, store{k: k})
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }() // ends with Stop
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Errorf("serving a BuildKit: %v", err)
		}
	})
	return address.Address{Network: "unix", Addr: path}
}

// of finds or makes a build: calls about it may come before it.
func (k *BuildKit) of(ref string) *build {
	k.mu.Lock()
	defer k.mu.Unlock()
	b := k.builds[ref]
	if b == nil {
		b = &build{progress: make(chan *controlapi.StatusResponse, 64), returned: make(chan struct{}), ended: make(chan struct{})}
		k.builds[ref] = b
	}
	return b
}

// Info implements controlapi.ControlServer.
func (k *BuildKit) Info(context.Context, *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: &apitypes.BuildkitVersion{Package: "github.com/moby/buildkit", Version: "v0.34.2"}}, nil
}

// ListWorkers implements controlapi.ControlServer.
func (k *BuildKit) ListWorkers(context.Context, *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{ID: "stub"}}}, nil
}

// DiskUsage implements controlapi.ControlServer.
func (k *BuildKit) DiskUsage(context.Context, *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	return &controlapi.DiskUsageResponse{}, nil
}

// ListenBuildHistory implements controlapi.ControlServer: every build that is asked for has left an empty record.
func (k *BuildKit) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	return stream.Send(&controlapi.BuildHistoryEvent{
		Type: controlapi.BuildHistoryEventType_COMPLETE, Record: &controlapi.BuildHistoryRecord{Ref: req.GetRef(), Frontend: "dockerfile.v0"},
	})
}

// UpdateBuildHistory implements controlapi.ControlServer: no record has a trace to complete.
func (k *BuildKit) UpdateBuildHistory(context.Context, *controlapi.UpdateBuildHistoryRequest) (*controlapi.UpdateBuildHistoryResponse, error) {
	return &controlapi.UpdateBuildHistoryResponse{}, nil
}

// Session implements controlapi.ControlServer: it asks nothing of the client.
func (k *BuildKit) Session(stream controlapi.Control_SessionServer) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return nil //nolint:nilerr // the client has left
		}
	}
}

// Solve implements controlapi.ControlServer.
func (k *BuildKit) Solve(ctx context.Context, req *controlapi.SolveRequest) (*controlapi.SolveResponse, error) {
	if k.Solves.Add(1) == 1 {
		k.first <- time.Now()
	}
	b := k.of(req.GetRef())
	defer close(b.ended) // it stays known: Status may come later
	select {
	case <-b.returned:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	response := map[string]string{}
	if len(req.GetExporters()) == 0 && req.GetExporterDeprecated() == "" {
		return &controlapi.SolveResponse{ExporterResponse: response}, nil
	}
	image, ok := k.Images[b.platform]
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "there is no image of %q", b.platform)
	}
	raw, err := json.Marshal(image.Descriptor)
	if err != nil {
		return nil, err
	}
	response[exptypes.ExporterImageDescriptorKey] = base64.StdEncoding.EncodeToString(raw)
	response[exptypes.ExporterImageDigestKey] = image.Descriptor.Digest.String()
	return &controlapi.SolveResponse{ExporterResponse: response}, nil
}

// Status implements controlapi.ControlServer.
func (k *BuildKit) Status(req *controlapi.StatusRequest, stream controlapi.Control_StatusServer) error {
	b := k.of(req.GetRef())
	for {
		select {
		case p := <-b.progress:
			if err := stream.Send(p); err != nil {
				return err
			}
		case <-b.ended:
			if len(b.progress) == 0 {
				return nil
			}
		case <-stream.Context().Done():
			return nil
		}
	}
}

// bridge is the daemon's gateway.
type bridge struct {
	gwpb.UnimplementedLLBBridgeServer
	k *BuildKit
}

func (g bridge) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	b := g.k.of(buildid.FromIncomingContext(ctx))
	b.platform = req.GetFrontendOpt()["platform"] // read by who waits for returned
	if g.k.Run != nil {
		err := g.k.Run(ctx, func(p *controlapi.StatusResponse) {
			select {
			case b.progress <- p:
			case <-ctx.Done():
			}
		})
		if err != nil {
			return nil, err
		}
	}
	ref := &gwpb.Ref{Id: fmt.Sprintf("stub-%d", g.k.refs.Add(1))}
	return &gwpb.SolveResponse{Result: &gwpb.Result{Result: &gwpb.Result_Ref{Ref: ref}}}, nil
}

func (g bridge) Evaluate(context.Context, *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	return &gwpb.EvaluateResponse{}, nil
}

func (g bridge) Return(ctx context.Context, _ *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	b := g.k.of(buildid.FromIncomingContext(ctx))
	b.once.Do(func() { close(b.returned) })
	return &gwpb.ReturnResponse{}, nil
}

// store is the daemon's content: the manifests of its images.
type store struct {
	contentapi.UnimplementedContentServer
	k *BuildKit
}

func (s store) find(digest string) (Image, error) {
	for _, image := range s.k.Images {
		if image.Descriptor.Digest.String() == digest {
			return image, nil
		}
	}
	return Image{}, status.Error(codes.NotFound, "no such blob")
}

func (s store) Info(_ context.Context, req *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	image, err := s.find(req.GetDigest())
	if err != nil {
		return nil, err
	}
	return &contentapi.InfoResponse{Info: &contentapi.Info{Digest: req.GetDigest(), Size: image.Descriptor.Size}}, nil
}

func (s store) Read(req *contentapi.ReadContentRequest, stream contentapi.Content_ReadServer) error {
	image, err := s.find(req.GetDigest())
	if err != nil {
		return err
	}
	if req.GetOffset() < 0 || req.GetOffset() > int64(len(image.Manifest)) {
		return status.Error(codes.OutOfRange, "beyond the blob")
	}
	return stream.Send(&contentapi.ReadContentResponse{Offset: req.GetOffset(), Data: image.Manifest[req.GetOffset():]})
}

// Image is one platform's, without layers.
type Image struct {
	Descriptor       ocispecs.Descriptor
	Manifest, Config []byte
}
