package worker

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
	"github.com/archfarm/archfarm/worker/vitals"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

func (*fakeBuildkitd) DiskUsage(context.Context, *controlapi.DiskUsageRequest) (*controlapi.DiskUsageResponse, error) {
	return &controlapi.DiskUsageResponse{Record: []*controlapi.UsageRecord{{ID: "a", Size: 100}, {ID: "b", Size: 23}, {ID: "c", Size: 1000, Shared: true}}}, nil
}

func (b *fakeBuildkitd) Prune(req *controlapi.PruneRequest, stream grpc.ServerStreamingServer[controlapi.UsageRecord]) error {
	if b.pruned != nil {
		b.pruned(req)
	}
	return stream.Send(&controlapi.UsageRecord{ID: "a", Size: 100})
}

// fakeMachine is as busy as it is told.
type fakeMachine struct {
	load *archfarmv1.Load
	disk vitals.Disk
}

func (m *fakeMachine) Read(time.Time) (*archfarmv1.Load, vitals.Disk) {
	return proto.CloneOf(m.load), m.disk
}

func care(total int) (*caretaker, *fakeMachine) {
	m := &fakeMachine{load: &archfarmv1.Load{}, disk: vitals.Disk{Total: 1000, Free: 500, Reserved: 50}}
	return &caretaker{
		slots: newSlots(total), machine: m, timing: hasty, log: slog.New(slog.DiscardHandler),
		offered: total, fill: vitals.Fill{High: 0.95, Low: 0.90},
	}, m
}

func TestCaretaker_PressureLowersWhatIsOfferedAndNotWhatRuns(t *testing.T) {
	t.Parallel()
	c, m := care(4)
	for range 3 {
		if release, _ := c.slots.take(); release == nil {
			t.Fatal("no slot")
		}
	}
	at := time.Unix(1_700_000_000, 0)
	c.look(at)
	m.load.MemoryPressure = proto.Float64(0.5)
	for i, want := range []struct {
		total  uint32
		reason string
	}{{3, "3 of 4 slots"}, {3, "2 of 4 slots"}, {3, "1 of 4 slots"}} {
		c.look(at)
		r, _ := c.slots.report()
		if r.GetState() != ready || r.GetSlots().GetTotal() != want.total || r.GetSlots().GetUsed() != 3 || !strings.HasPrefix(r.GetReason(), want.reason+": memory pressure 50 %") {
			t.Errorf("step %d: %v", i, r)
		}
		if release, cause := c.slots.take(); release != nil || cause != archfarmv1.Refused_CAUSE_NO_SLOT {
			t.Errorf("step %d: took one more (%s)", i, cause)
		}
		at = at.Add(10 * time.Second)
	}
}

func TestCaretaker_AFullDiskIsPrunedUntilThereIsRoom(t *testing.T) {
	t.Parallel()
	b := startBuildkitd(t, socketPath(t))
	c, m := care(1)
	var err error
	if c.buildkit, err = newDaemon(t.Context(), b.addr, hasty, c.log); err != nil {
		t.Fatal(err)
	}
	defer c.buildkit.close()
	var requests []*controlapi.PruneRequest
	room := uint64(20)
	b.pruned = func(req *controlapi.PruneRequest) {
		requests = append(requests, req)
		m.disk.Free = room
	}
	m.disk.Free = 30
	if !c.look(time.Now()) {
		t.Fatal("a disk filled to 97 % is not full")
	}
	c.makeRoom(t.Context())
	r, _ := c.slots.report()
	if r.GetState() != cordoned || !strings.HasPrefix(r.GetReason(), "disk 98 % full: 20 B free of 1.0 kB, although") {
		t.Errorf("with nothing to prune: %v", r)
	}
	if len(requests) != 2 || requests[0].GetAll() || requests[0].GetMinFreeSpace() != 170 || !requests[1].GetAll() || requests[1].GetMinFreeSpace() != 0 {
		t.Errorf("pruned %v", requests)
	}
	room = 150
	c.makeRoom(t.Context())
	if r, _ := c.slots.report(); r.GetState() != ready || r.GetReason() != "" || len(requests) != 3 {
		t.Errorf("with room: %v after %d prunings", r, len(requests))
	}
}

func TestCaretaker_AnOperatorMayBuildOnAFullDisk(t *testing.T) {
	t.Parallel()
	c, m := care(1)
	m.disk.Free = 0
	c.look(time.Now())
	c.overrule()
	if full := c.look(time.Now()); full {
		t.Error("the disk counts as full again")
	}
	if release, cause := c.slots.take(); release == nil {
		t.Errorf("no slot: %s", cause)
	}
	m.disk.Free = 500
	c.look(time.Now())
	m.disk.Free = 0
	if full := c.look(time.Now()); !full {
		t.Error("it does not count as full the next time")
	}
}

func TestRun_ReportsTheCachesSize(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, hasty)
	a := c.attach(t)
	for {
		if load := a.wantReport(ready, 0).GetLoad(); load != nil && load.CacheBytes != nil { // the first report may be earlier than both
			if load.GetCacheBytes() != 123 {
				t.Errorf("load %v", load)
			}
			return
		}
	}
}
