package fleet_test

import (
	"context"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func list(t *testing.T, f *farm) []*archfarmv1.Worker {
	t.Helper()
	return must(t, func(ctx ctx) (*archfarmv1.ListWorkersResponse, error) {
		return archfarmv1.NewFleetServiceClient(f.dial(t)).ListWorkers(ctx, &archfarmv1.ListWorkersRequest{})
	}).GetWorkers()
}

func TestListWorkers_TellsAllThatTheAgentSaid(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		h := hello("amd-1")
		h.Pool, h.Labels = "office", map[string]string{"zone": "attic"}
		h.Report.Emulated = []string{"linux/arm64/v8", "linux/riscv64"}
		h.Report.Load = &archfarmv1.Load{
			Cpu: proto.Float64(1.25), CpuPressure: proto.Float64(-1), MemoryPressure: proto.Float64(math.NaN()), IoPressure: proto.Float64(0.5),
			MemoryTotalBytes: 10, MemoryAvailableBytes: 11, DiskTotalBytes: 20, DiskFreeBytes: 19, CacheBytes: proto.Uint64(7), OomKills: proto.Uint64(0),
		}
		a, w := f.enter(t, h)
		got := list(t, f)[0]
		want := &archfarmv1.Load{
			Cpu: proto.Float64(1), CpuPressure: proto.Float64(0), IoPressure: proto.Float64(0.5),
			MemoryTotalBytes: 10, MemoryAvailableBytes: 10, DiskTotalBytes: 20, DiskFreeBytes: 19, CacheBytes: proto.Uint64(7), OomKills: proto.Uint64(0),
		}
		if got.GetPool() != "office" || !maps.Equal(got.GetLabels(), h.Labels) || !slices.Equal(got.GetEmulated(), []string{"linux/arm64", "linux/riscv64"}) || !proto.Equal(got.GetLoad(), want) {
			t.Errorf("got %v", got)
		}
		was := w.Emulated()
		next := report(archfarmv1.Worker_STATE_CORDONED, 2, 0)
		next.Reason, next.Emulated = "the disk is full", h.Report.Emulated
		a.report(next)
		if got := list(t, f)[0]; got.GetState() != archfarmv1.Worker_STATE_CORDONED || got.GetReason() != "the disk is full" || got.GetLoad() != nil || &w.Emulated()[0] != &was[0] {
			t.Errorf("then %v", got)
		}
		a.report(report(archfarmv1.Worker_STATE_READY, 2, 0))
		if got := list(t, f)[0]; len(got.GetEmulated()) != 0 || len(w.Emulated()) != 0 {
			t.Errorf("without emulators %v", got)
		}
	})
}

func TestFleet_RefusesHostileEmulatedPlatforms(t *testing.T) {
	for name, emulated := range map[string][]string{
		"none such": {"linux/arm64", "no/such/platform/at/all"}, "empty": {""}, "too many": slices.Repeat([]string{"linux/arm64"}, 65),
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				a, _ := f.enter(t, hello("amd-1"))
				a.report(&archfarmv1.Report{Emulated: emulated})
				if _, err := a.stream.Recv(); status.Code(err) != codes.InvalidArgument {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestListWorkers_ShowsAClientItsPools(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		for name, pool := range map[string]string{"a": "office", "b": "cloud", "c": "", "d": "office"} {
			h := hello(name)
			h.Pool = pool
			f.enter(t, h)
		}
		client := func(pools ...string) identity.Identity {
			return identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "acme", Pools: pools}
		}
		for _, c := range []struct {
			as   identity.Identity
			want string
		}{
			{identity.Identity{}, "abcd"},
			{identity.Identity{Kind: identity.Admin, Name: "root", Tenant: "default", Pools: []string{"cloud"}}, "abcd"},
			{client(), "abcd"},
			{client("office"), "ad"},
			{client("cloud", "default"), "bc"},
			{client("Office"), ""},
		} {
			f.as = c.as
			var names strings.Builder
			for _, w := range list(t, f) {
				names.WriteString(w.GetName())
			}
			if names.String() != c.want {
				t.Errorf("%s %v sees %q, want %q", c.as, c.as.Pools, names.String(), c.want)
			}
		}
	})
}

func change(ctx context.Context, t *testing.T, f *farm, name string, action archfarmv1.WorkerChange_Action, reason string) (*archfarmv1.Worker, error) {
	t.Helper()
	response, err := archfarmv1.NewFleetServiceClient(f.dial(t)).ChangeWorker(ctx, &archfarmv1.ChangeWorkerRequest{
		Name: name, Change: &archfarmv1.WorkerChange{Action: action, Reason: reason},
	})
	return response.GetWorker(), err
}

func TestChangeWorker_ReturnsTheWorkerAsItsAgentConfirmed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, _ := f.attach(t, "amd-1")
		go func() {
			order := <-a.orders
			if c := order.GetChange(); c.GetAction() != archfarmv1.WorkerChange_ACTION_DRAIN || c.GetReason() != "a new  disk" {
				t.Errorf("the agent is told %v", order)
			}
			_ = a.stream.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Report{Report: report(archfarmv1.Worker_STATE_DRAINING, 2, 1)}})
			_ = a.stream.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Done{Done: &archfarmv1.Done{DirectiveId: order.GetId()}}})
		}()
		w, err := change(t.Context(), t, f, "amd-1", archfarmv1.WorkerChange_ACTION_DRAIN, "a new \x07disk")
		if err != nil || w.GetState() != archfarmv1.Worker_STATE_DRAINING || w.GetSlots().GetUsed() != 1 {
			t.Errorf("got %v, %v", w, err)
		}
	})
}

func TestChangeWorker_IsForOperators(t *testing.T) {
	for name, c := range map[string]struct {
		as   identity.Identity
		want codes.Code
	}{
		"this machine":     {identity.Identity{}, codes.FailedPrecondition}, // the agent's answer
		"an administrator": {identity.Identity{Kind: identity.Admin, Name: "root", Tenant: "default"}, codes.FailedPrecondition},
		"a client":         {identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "default"}, codes.PermissionDenied},
		"the worker":       {workerCertificate("amd-1", "default"), codes.PermissionDenied},
		"a coordinator":    {identity.Identity{Kind: identity.Coordinator, Name: "farm-1"}, codes.PermissionDenied},
		"nobody":           {identity.Identity{Kind: identity.Anonymous}, codes.PermissionDenied},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				a, _ := f.attach(t, "amd-1")
				f.as = c.as
				go func() {
					select {
					case order := <-a.orders:
						_ = a.stream.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Done{Done: &archfarmv1.Done{DirectiveId: order.GetId(), Error: "not today"}}})
					case <-t.Context().Done():
					}
				}()
				for _, worker := range []string{"amd-1", "no-such"} {
					_, err := change(t.Context(), t, f, worker, archfarmv1.WorkerChange_ACTION_CORDON, "")
					if want := c.want; status.Code(err) != want && (worker == "amd-1" || want == codes.PermissionDenied) {
						t.Errorf("%s: got %v", worker, err)
					}
					if c.want != codes.PermissionDenied && worker == "amd-1" && !strings.Contains(err.Error(), "cordoning worker amd-1: worker amd-1: not today") {
						t.Errorf("got %v", err)
					}
				}
			})
		})
	}
}

func TestChangeWorker_SaysWhatMayHaveBeenMeant(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		_, err := change(t.Context(), t, f, "mac-2", archfarmv1.WorkerChange_ACTION_DRAIN, "")
		if status.Code(err) != codes.NotFound || !strings.HasSuffix(err.Error(), "no worker is") {
			t.Errorf("of an empty fleet: %v", err)
		}
		for _, name := range []string{"mac-mini-1", "mac-mini-2", "graviton-a"} {
			f.attach(t, name)
		}
		for asked, want := range map[string]string{
			"Mac-Mini-1": "did you mean mac-mini-1 or mac-mini-2?", "mac-mni-2": "did you mean mac-mini-2 or mac-mini-1?", "graviton": "did you mean graviton-a?",
			"zzz": "attached are: graviton-a, mac-mini-1, mac-mini-2", "": "attached are: graviton-a, mac-mini-1, mac-mini-2",
		} {
			if _, err := change(t.Context(), t, f, asked, archfarmv1.WorkerChange_ACTION_DRAIN, ""); status.Code(err) != codes.NotFound || !strings.HasSuffix(err.Error(), want) {
				t.Errorf("%q: %v, want %s", asked, err, want)
			}
		}
		f.attach(t, "s390x")
		if _, err := change(t.Context(), t, f, strings.Repeat("z\x1b", 1<<16), archfarmv1.WorkerChange_ACTION_DRAIN, ""); status.Code(err) != codes.NotFound || len(err.Error()) > 1000 || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("of an endless name: %.1000v", err)
		}
		for _, action := range []archfarmv1.WorkerChange_Action{archfarmv1.WorkerChange_ACTION_UNSPECIFIED, 99} {
			if _, err := change(t.Context(), t, f, "s390x", action, ""); status.Code(err) != codes.InvalidArgument {
				t.Errorf("action %d: %v", action, err)
			}
		}
		synctest.Wait()
	})
}
