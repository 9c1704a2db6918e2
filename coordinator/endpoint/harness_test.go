package endpoint_test

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/endpoint"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/fleet/fleettest"
	"github.com/archfarm/archfarm/coordinator/history"
	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

// farm is the door of a coordinator, as a client reaches it.
type farm struct {
	shared  *dispatch.Farm
	door    *fleettest.Door
	builds  *dispatch.Builds
	history *history.History
	cc      *grpc.ClientConn
	stop    func() // of the door
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
	workers := fleet.New(log, func(ws []*fleet.Worker) {
		var out []schedule.Worker
		for _, w := range ws {
			out = append(out, schedule.Worker{Name: w.Name, Platforms: w.Platforms, Slots: 1})
		}
		scheduler.Update(out)
	})
	shared := &dispatch.Farm{
		Fleet: workers, Scheduler: scheduler, Sessions: sessions, Relays: session.NewRelays(sessions, log),
		Metrics: dispatch.NewMetrics(prometheus.NewRegistry()), Log: log,
	}
	dir := t.TempDir()
	records, err := sqlite.Open(t.Context(), sqlite.Options{Path: filepath.Join(dir, "archfarm.db"), BlobDir: filepath.Join(dir, "blobs")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := records.Close(); err != nil {
			t.Error(err)
		}
	})
	past, err := history.Open(t.Context(), history.Options{Store: records, Dir: filepath.Join(dir, "history"), Workers: endpoint.Workers{Fleet: workers}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := past.Finish(context.Background()); err != nil { // t.Context has ended
			t.Error(err)
		}
	})
	f := &farm{shared: shared, door: fleettest.Serve(t, workers), builds: dispatch.NewBuilds(shared), history: past}
	t.Cleanup(func() { _ = f.builds.Drain(context.Background()) }) // t.Context has ended
	control := &endpoint.Control{Builds: f.builds, Farm: shared, History: f.history}
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	controlapi.RegisterControlServer(server, control)
	gwpb.RegisterLLBBridgeServer(server, &endpoint.Gateway{Builds: f.builds, Control: control})
	contentapi.RegisterContentServer(server, endpoint.Content(f.history))
	l := bufconn.Listen(1 << 16)
	var running sync.WaitGroup
	running.Go(func() { _ = server.Serve(l) })
	f.stop = func() { server.Stop(); running.Wait() }
	t.Cleanup(f.stop)
	f.cc, err = grpc.NewClient("passthrough:///farm", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStaticStreamWindowSize(1<<16),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.cc.Close() })
	return f
}

// daemon is a buildkitd with a content store, which remembers what it is told to.
type daemon struct {
	controlapi.UnimplementedControlServer
	*fleettest.Worker
	records map[string]*controlapi.BuildHistoryRecord
	content content.Store
}

func (f *farm) worker(t *testing.T, name string, records ...*controlapi.BuildHistoryRecord) *daemon {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{records: map[string]*controlapi.BuildHistoryRecord{}, content: store}
	for _, r := range records {
		d.records[r.GetRef()] = r
	}
	d.Worker = f.door.Attach(t, name, []string{"linux/amd64"}, 1, func(s *grpc.Server) {
		controlapi.RegisterControlServer(s, d)
		contentapi.RegisterContentServer(s, contentserver.New(store))
	})
	synctest.Wait()
	return d
}

func (d *daemon) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	for _, ref := range []string{"another", req.GetRef()} { // what was not asked for is passed over
		if r, ok := d.records[ref]; ok {
			if err := stream.Send(&controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: r}); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *farm) control() controlapi.ControlClient { return controlapi.NewControlClient(f.cc) }

func (f *farm) begin(t *testing.T, ref string) *dispatch.Build {
	t.Helper()
	b, err := f.builds.Begin(t.Context(), &controlapi.SolveRequest{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.builds.End(b, nil) })
	return b
}
