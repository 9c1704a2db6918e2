package job

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestAwait_ALegWaitsForItsWorkerAndSaysSo(t *testing.T) {
	t.Parallel()
	var attached atomic.Bool
	b := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		if leg.Platform == arm64 && !attached.Load() {
			return ocispecs.Descriptor{}, status.Error(codes.FailedPrecondition, "no native worker")
		}
		return pushes(ctx, leg, report)
	}}
	c := newFarm(t).start(b, func(o *Options) {
		o.Runs = func(platform string, pools []string) bool {
			if !slices.Equal(pools, []string{"cloud", "office"}) {
				t.Errorf("asked for the pools %q", pools)
			}
			return platform == amd64 || attached.Load()
		}
	})
	req := request(t)
	req.Spec.BuildArgs = map[string]string{"archfarm.pool": "office, cloud"}
	id := c.submit(req).GetId()
	if said := waitNotice(t, c, id); !strings.Contains(said, "no native worker for linux/arm64 is attached") {
		t.Errorf("it says %q", said)
	}
	attached.Store(true)
	wantState(t, c.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
	if n := b.count(arm64); n != 1 {
		t.Errorf("%d attempts, want the one with a worker", n)
	}
}

func TestAwait_NotForEver(t *testing.T) {
	t.Parallel()
	b := &builds{do: func(context.Context, Leg, Report) (ocispecs.Descriptor, error) {
		return ocispecs.Descriptor{}, status.Error(codes.FailedPrecondition, "no native worker for linux/arm64: the farm has none")
	}}
	c := newFarm(t).start(b, func(o *Options) {
		o.Runs, o.WorkerWait = func(string, []string) bool { return false }, time.Millisecond
	})
	job := c.ended(c.submit(request(t)).GetId())
	wantState(t, job, archfarmv1.Job_STATE_FAILED)
	if !strings.Contains(job.GetError(), "the farm has none") {
		t.Errorf("the error is %q", job.GetError())
	}
}

// waitNotice returns a job's first notice.
func waitNotice(t *testing.T, c *coordinator, id string) string {
	t.Helper()
	stream, err := c.Watch(t.Context(), &archfarmv1.WatchRequest{Id: id})
	for err == nil {
		var answer *archfarmv1.WatchResponse
		if answer, err = stream.Recv(); answer.GetEvent().GetNotice() != "" {
			return answer.GetEvent().GetNotice()
		}
	}
	t.Fatal(err)
	return ""
}
