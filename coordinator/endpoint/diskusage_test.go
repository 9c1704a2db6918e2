package endpoint_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/fleet/fleettest"
)

// keeper is a buildkitd with records in its cache.
type keeper struct {
	controlapi.UnimplementedControlServer
	*fleettest.Worker
	records []*controlapi.UsageRecord

	asked   atomic.Int64 // ListWorkers
	usage   atomic.Pointer[controlapi.DiskUsageRequest]
	pruned  atomic.Pointer[controlapi.PruneRequest]
	ended   atomic.Bool // a Prune has
	mood    atomic.Pointer[mood]
	waiting chan struct{} // to go on after a record, unless nil
	label   string        // of its worker
}

// mood is how every call ends.
type mood struct {
	frozen bool // not at all
	err    error
}

func (k *keeper) will(m mood) { k.mood.Store(&m) }

func (f *farm) keeper(t *testing.T, name, platform string, ids ...string) *keeper {
	t.Helper()
	k := &keeper{label: "oci"}
	for i, id := range ids {
		k.records = append(k.records, &controlapi.UsageRecord{ID: id, Parents: slices.Clone(ids[:i]), Description: "about " + id, Size: int64(i)})
	}
	k.Worker = f.door.Attach(t, name, []string{platform}, 1, func(s *grpc.Server) { controlapi.RegisterControlServer(s, k) })
	synctest.Wait()
	return k
}

func (k *keeper) act(ctx context.Context) error {
	m := k.mood.Load()
	if m == nil {
		return nil
	}
	if m.frozen {
		<-ctx.Done()
	}
	return m.err
}

func (k *keeper) DiskUsage(ctx context.Context, req *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	k.usage.Store(req)
	return &controlapi.DiskUsageResponse{Record: k.records}, k.act(ctx)
}

func (k *keeper) Prune(req *controlapi.PruneRequest, stream controlapi.Control_PruneServer) error {
	k.pruned.Store(req)
	defer func() { k.ended.Store(true) }()
	for _, r := range k.records {
		if err := stream.Send(r); err != nil {
			return err
		}
		if k.waiting != nil {
			select {
			case <-k.waiting:
			case <-stream.Context().Done():
				return stream.Context().Err()
			}
		}
	}
	return k.act(stream.Context())
}

func (k *keeper) ListWorkers(ctx context.Context, _ *controlapi.ListWorkersRequest) (*controlapi.ListWorkersResponse, error) {
	k.asked.Add(1)
	return &controlapi.ListWorkersResponse{Record: []*apitypes.WorkerRecord{{
		ID: "its own", Labels: map[string]string{"executor": k.label}, GCPolicy: []*apitypes.GCPolicy{{All: true}},
		CDIDevices: []*apitypes.CDIDevice{{Name: "vendor/gpu=" + k.Name}}, BuildkitVersion: &apitypes.BuildkitVersion{Version: "v1", Revision: "r1"},
	}, {ID: "another"}}}, k.act(ctx)
}

func (k *keeper) Info(ctx context.Context, _ *controlapi.InfoRequest) (*controlapi.InfoResponse, error) {
	return &controlapi.InfoResponse{BuildkitVersion: &apitypes.BuildkitVersion{Version: "v1", DockerfileVersion: "d1"}}, k.act(ctx)
}

func (f *farm) usage(t *testing.T, filter ...string) ([]string, error) {
	t.Helper()
	resp, err := f.control().DiskUsage(t.Context(), &controlapi.DiskUsageRequest{Filter: filter, AgeLimit: 7})
	var ids []string
	for _, r := range resp.GetRecord() {
		ids = append(ids, strings.Join(append([]string{r.GetID()}, r.GetParents()...), "<"))
	}
	return ids, err
}

func same(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func TestDiskUsage_OneWorkerIsABuildkitd(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		w := f.keeper(t, "a", "linux/amd64", "x", "y")
		got, err := f.usage(t, "mutable", "worker==a,shared")
		if err != nil {
			t.Fatal(err)
		}
		same(t, "records", got, "x", "y<x")
		same(t, "filter", w.usage.Load().GetFilter(), "mutable", "shared")
		if w.usage.Load().GetAgeLimit() != 7 {
			t.Errorf("age limit %d", w.usage.Load().GetAgeLimit())
		}
		w.will(mood{err: status.Error(codes.DataLoss, "its own words")})
		if _, err = f.usage(t); status.Code(err) != codes.DataLoss || status.Convert(err).Message() != "its own words" {
			t.Errorf("its error: %v", err)
		}
	})
}

func TestDiskUsage_SeveralWorkersAreToldApart(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		b, a := f.keeper(t, "b", "linux/arm64", "z", "y"), f.keeper(t, "a", "linux/amd64", "x")
		got, err := f.usage(t)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "records", got, "x@a", "z@b", "y@b<z@b")
		got, err = f.usage(t, "worker==b,id==z@b")
		if err != nil {
			t.Fatal(err)
		}
		same(t, "of b", got, "z@b", "y@b<z@b") // this daemon does not filter
		same(t, "filter of b", b.usage.Load().GetFilter(), "id==z")
		if len(a.usage.Load().GetFilter()) != 0 {
			t.Errorf("a was asked for what is b's: %v", a.usage.Load())
		}
		if _, err := f.usage(t, "worker==c"); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "attached are a, b") {
			t.Errorf("of c: %v", err)
		}
		if _, err := f.usage(t, "id=z"); err == nil || !strings.Contains(err.Error(), "failed to parse diskusage filters") {
			t.Errorf("not a filter: %v", err)
		}
	})
}

func TestDiskUsage_AWorkerThatDoesNotAnswerIsShown(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, b := f.keeper(t, "a", "linux/amd64", "x"), f.keeper(t, "b", "linux/arm64", "y")
		b.will(mood{frozen: true})
		start := time.Now()
		resp, err := f.control().DiskUsage(t.Context(), &controlapi.DiskUsageRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != time.Minute {
			t.Errorf("took %s", took)
		}
		if len(resp.GetRecord()) != 2 || resp.GetRecord()[0].GetID() != "x@a" {
			t.Fatalf("got %v", resp)
		}
		r := resp.GetRecord()[1]
		if r.GetID() != "unreachable@b" || !r.GetInUse() || r.GetSize() != 0 || r.GetDescription() != "worker b does not tell its disk usage: no answer within 1m0s" {
			t.Errorf("got %v", r)
		}
		a.will(mood{err: status.Error(codes.Unavailable, "down")})
		b.will(mood{err: errors.New("broken")})
		_, err = f.usage(t)
		if status.Code(err) != codes.Unavailable || status.Convert(err).Message() != "no worker tells its disk usage: worker a: down; worker b: broken" {
			t.Errorf("when none answers: %v", err)
		}
	})
}

func TestDiskUsage_AnEmptyFarmHasNobodyToAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		if _, err := f.usage(t); status.Code(err) != codes.Unavailable {
			t.Errorf("usage: %v", err)
		}
		if _, err := f.prune(t, nil); status.Code(err) != codes.Unavailable {
			t.Errorf("prune: %v", err)
		}
	})
}

// prune returns what was pruned until the end, or until next says so.
func (f *farm) prune(t *testing.T, next func(id string)) (ids []string, err error) {
	t.Helper()
	stream, err := f.control().Prune(t.Context(), &controlapi.PruneRequest{Filter: []string{"shared,worker!=z"}, All: true, KeepDuration: 1, ReservedSpace: 2, MaxUsedSpace: 3, MinFreeSpace: 4})
	if err != nil {
		t.Fatal(err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return ids, nil
		}
		if err != nil {
			return ids, err
		}
		ids = append(ids, r.GetID())
		if next != nil {
			next(r.GetID())
		}
	}
}

func TestPrune_RecordsComeAsTheyArePruned(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, b := f.keeper(t, "a", "linux/amd64", "x"), f.keeper(t, "b", "linux/arm64", "y", "z")
		a.waiting, b.waiting = make(chan struct{}), make(chan struct{})
		got, err := f.prune(t, func(id string) { // a waits for b, which waits for the client
			switch id {
			case "y@b":
				close(b.waiting)
			case "z@b":
				close(a.waiting)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(got)
		same(t, "pruned", got, "x@a", "y@b", "z@b")
		for _, k := range []*keeper{a, b} {
			p := k.pruned.Load()
			if !p.GetAll() || p.GetKeepDuration() != 1 || p.GetReservedSpace() != 2 || p.GetMaxUsedSpace() != 3 || p.GetMinFreeSpace() != 4 || !slices.Equal(p.GetFilter(), []string{"shared"}) {
				t.Errorf("%s was told %v", k.Name, p)
			}
		}
	})
}

func TestPrune_AWorkerThatFailsStopsNoOtherAndIsTold(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, b := f.keeper(t, "a", "linux/amd64"), f.keeper(t, "b", "linux/arm64", "y", "z")
		a.will(mood{err: status.Error(codes.Internal, "no space to free space")})
		b.waiting = make(chan struct{})
		got, err := f.prune(t, func(id string) {
			synctest.Wait() // by now a has failed
			if !a.ended.Load() {
				t.Error("a still prunes")
			}
			if id == "y@b" {
				close(b.waiting)
			}
		})
		same(t, "pruned", got, "y@b", "z@b")
		if status.Code(err) != codes.Internal || status.Convert(err).Message() != "not every worker is pruned: worker a: no space to free space" {
			t.Errorf("got %v", err)
		}
	})
}

func TestPrune_EndsWithTheClient(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, b := f.keeper(t, "a", "linux/amd64", "x"), f.keeper(t, "b", "linux/arm64")
		a.waiting = make(chan struct{})
		b.will(mood{frozen: true})
		ctx, cancel := context.WithCancel(t.Context())
		stream, err := f.control().Prune(ctx, &controlapi.PruneRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := stream.Recv(); err != nil || r.GetID() != "x@a" {
			t.Fatalf("got %v, %v", r, err)
		}
		synctest.Wait() // until b has been told, too
		cancel()
		synctest.Wait()
		if !a.ended.Load() || !b.ended.Load() {
			t.Errorf("ended: a %t, b %t", a.ended.Load(), b.ended.Load())
		}
	})
}

func TestPrune_EndsWithTheWorker(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		a, b := f.keeper(t, "a", "linux/amd64", "x"), f.keeper(t, "b", "linux/arm64")
		b.will(mood{frozen: true})
		got, err := f.prune(t, func(string) { b.Kill() })
		same(t, "pruned", got, "x@a")
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "worker b was lost") || !a.ended.Load() {
			t.Errorf("got %v", err)
		}
	})
}

func (f *farm) list(t *testing.T, filter ...string) []*apitypes.WorkerRecord {
	t.Helper()
	resp, err := f.control().ListWorkers(t.Context(), &controlapi.ListWorkersRequest{Filter: filter})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetRecord()
}

func ids(records []*apitypes.WorkerRecord) []string {
	var out []string
	for _, r := range records {
		out = append(out, r.GetID())
	}
	return out
}

func TestListWorkers_TellsWhatTheDaemonsSay(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		same(t, "an empty farm", ids(f.list(t, "id==archfarm")), "archfarm")
		same(t, "an empty farm, filtered", ids(f.list(t, "id!=archfarm")))
		a, b := f.keeper(t, "a", "linux/s390x"), f.keeper(t, "b", "linux/amd64")
		f.keeper(t, "c", "linux/amd64")
		usual := []string{"b", "c", "a"}
		if p := f.shared.DefaultPlatform(); p.Architecture != "amd64" {
			usual = []string{"a", "b", "c"}
		}
		all := f.list(t)
		same(t, "workers of the default platform are first", ids(all), usual...)
		r := all[slices.Index(usual, "b")]
		if r.GetLabels()["executor"] != "oci" || r.GetLabels()["archfarm.worker"] != "b" || len(r.GetGCPolicy()) != 1 ||
			r.GetCDIDevices()[0].GetName() != "vendor/gpu=b" || r.GetBuildkitVersion().GetRevision() != "r1" || r.GetPlatforms()[0].GetArchitecture() != "amd64" {
			t.Errorf("got %v", r)
		}
		same(t, "by label", ids(f.list(t, "labels.executor==oci,labels.\"archfarm.worker\"!=b")), slices.DeleteFunc(slices.Clone(usual), func(s string) bool { return s == "b" })...)
		same(t, "by id", ids(f.list(t, "id==a", "id==z")), "a")
		if _, err := f.control().ListWorkers(t.Context(), &controlapi.ListWorkersRequest{Filter: []string{"id=a"}}); err == nil {
			t.Error("a filter that is none is taken")
		}
		info, err := f.control().Info(t.Context(), &controlapi.InfoRequest{})
		if err != nil || info.GetBuildkitVersion().GetDockerfileVersion() != "d1" {
			t.Errorf("info %v, %v", info, err)
		}
		if a.asked.Load() != 1 || b.asked.Load() != 1 {
			t.Errorf("the daemons were asked %d and %d times for one moment's answer", a.asked.Load(), b.asked.Load())
		}
		time.Sleep(2 * time.Second) // of the bubble
		f.list(t)
		if a.asked.Load() != 2 {
			t.Errorf("2 s later: asked %d times", a.asked.Load())
		}
	})
}

func TestListWorkers_ADaemonThatDoesNotAnswerIsDescribedAsItWas(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		w := f.keeper(t, "a", "linux/amd64")
		w.will(mood{frozen: true})
		took := func() time.Duration {
			start := time.Now()
			same(t, "workers", ids(f.list(t)), "a")
			return time.Since(start)
		}
		if d := took(); d != 2*time.Second {
			t.Errorf("waited %s for a frozen daemon", d)
		}
		if v := f.list(t)[0].GetBuildkitVersion().GetVersion(); v != "test" {
			t.Errorf("version %q, its agent said otherwise", v)
		}
		if d := took(); d != 0 || w.asked.Load() != 1 {
			t.Errorf("waited %s for it again", d)
		}
		w.will(mood{})
		time.Sleep(10 * time.Second) // of the bubble
		if d := f.list(t)[0].GetCDIDevices(); len(d) != 1 {
			t.Errorf("once it answers: %v", d)
		}
		w.Cut() // it restarts, and is asked at once
		synctest.Wait()
		before := w.asked.Load()
		if d := f.list(t)[0].GetCDIDevices(); len(d) != 1 || w.asked.Load() == before {
			t.Errorf("after its restart: %v, asked %d times", d, w.asked.Load()-before)
		}
		w.will(mood{frozen: true})
		time.Sleep(2 * time.Second)
		if d := f.list(t)[0].GetCDIDevices(); len(d) != 1 {
			t.Errorf("frozen again: %v", d)
		}
	})
}

func TestListWorkers_ADaemonThatSaysTooMuchIsNotRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.keeper(t, "a", "linux/amd64").label = strings.Repeat("x", 256<<10)
		if r := f.list(t)[0]; len(r.GetLabels()["executor"]) != 0 || r.GetLabels()["archfarm.worker"] != "a" {
			t.Errorf("got %d labels", len(r.GetLabels()))
		}
	})
}
