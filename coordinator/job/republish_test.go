package job

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/publish"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// moody is a publisher that fails so often, before or after it has published.
type moody struct {
	Publisher
	code  codes.Code
	after bool
	left  atomic.Int32
	tried chan struct{} // told, if there is one and it has room
}

func (m *moody) Publish(ctx context.Context, r publish.Request, o publish.Observer) error {
	fails := m.left.Add(-1) >= 0
	select {
	case m.tried <- struct{}{}:
	default:
	}
	if fails && !m.after {
		return status.Error(m.code, "the registry is moody")
	}
	if err := m.Publisher.Publish(ctx, r, o); err != nil {
		return err
	}
	if fails {
		return status.Error(m.code, "the registry is moody")
	}
	return nil
}

func TestPublish_IsTriedAgainWhenTheRegistryMayBeBack(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		code     codes.Code
		after    bool
		failures int32
		want     archfarmv1.Job_State
		again    int // how often it is tried again
	}{
		"twice away":                    {code: codes.Unavailable, failures: 2, want: archfarmv1.Job_STATE_SUCCEEDED, again: 2},
		"away once it has the tag":      {code: codes.Unavailable, after: true, failures: 1, want: archfarmv1.Job_STATE_SUCCEEDED, again: 1},
		"away for longer than attempts": {code: codes.Unavailable, failures: 3, want: archfarmv1.Job_STATE_FAILED, again: 2},
		"a refusal":                     {code: codes.PermissionDenied, failures: 1, want: archfarmv1.Job_STATE_FAILED},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFarm(t)
			m := &moody{code: c.code, after: c.after}
			m.left.Store(c.failures)
			again := &builds{}
			co := f.start(again, func(o *Options) { m.Publisher, o.Publisher, o.MaxAttempts = o.Publisher, m, 3 })
			id := co.submit(request(t)).GetId()
			j := co.ended(id)
			wantState(t, j, c.want)
			notices := 0
			for _, e := range co.watched(id, 0) {
				if strings.HasPrefix(e.GetNotice(), "publishing is tried again: the registry is moody") {
					notices++
				}
			}
			if notices != c.again || again.count(amd64) != 1 {
				t.Errorf("tried again %d times, want %d; %d builds", notices, c.again, again.count(amd64))
			}
			want := ""
			if c.want == archfarmv1.Job_STATE_SUCCEEDED {
				want = j.GetDigest()
			}
			if got := tagged(t, repository(t)+":"+commit); got != want {
				t.Errorf("the tag is %q, want %q", got, want)
			}
			resp, err := co.ListTags(t.Context(), &archfarmv1.ListTagsRequest{Repository: repository(t)})
			if err != nil || slices.ContainsFunc(resp.GetBindings(), func(b *archfarmv1.TagBinding) bool {
				return b.GetState() != archfarmv1.TagBinding_STATE_PUBLISHED
			}) {
				t.Errorf("tags are %v, %v", resp, err)
			}
		})
	}
}

func TestPublish_GoesOnElsewhereWhenItsCoordinatorDrains(t *testing.T) {
	t.Parallel()
	f := newFarm(t)
	m := &moody{code: codes.Unavailable, tried: make(chan struct{}, 1)}
	m.left.Store(1 << 20)
	c := f.start(&builds{}, func(o *Options) { m.Publisher, o.Publisher, o.MaxAttempts = o.Publisher, m, 1<<20 })
	id := c.submit(request(t)).GetId()
	receive(t, m.tried)
	c.stop()
	again := &builds{}
	d := f.start(again, func(o *Options) { o.Owner = "coordinator-2" })
	wantState(t, d.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
	if n := again.count(amd64) + again.count(arm64); n > 0 {
		t.Errorf("%d legs were built again", n)
	}
}
