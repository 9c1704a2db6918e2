package job

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/gitref"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestJob_BuildsEachPlatformAndPublishesOneDigest(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	submitted := c.submit(request(t))
	wantState(t, submitted, archfarmv1.Job_STATE_QUEUED)
	j := c.ended(submitted.GetId())
	wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
	if got := tagged(t, repository(t)+":"+commit); got == "" || got != j.GetDigest() {
		t.Errorf("the tag is %q, the job says %q", got, j.GetDigest())
	}
	for _, platform := range []string{amd64, arm64} {
		l := legOf(j, platform)
		if l.GetState() != archfarmv1.JobLeg_STATE_SUCCEEDED || l.GetDigest() == "" || l.GetWorker() != "worker-"+platform || len(l.GetAttempts()) != 1 {
			t.Errorf("leg is %v", l)
		}
	}
	if j.GetStartTime() == nil || j.GetEndTime() == nil || j.GetSpec().GetContext().GetSource().GetCommit() != commit {
		t.Errorf("job is %v", j)
	}
}

func TestJob_OnePlatformIsPublishedAsItIs(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	req := request(t)
	req.Spec.Platforms = []string{arm64}
	j := c.ended(c.submit(req).GetId())
	wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
	if j.GetDigest() != legOf(j, arm64).GetDigest() || tagged(t, repository(t)+":"+commit) != j.GetDigest() {
		t.Errorf("published %s, the leg pushed %s", j.GetDigest(), legOf(j, arm64).GetDigest())
	}
}

func TestJob_WithoutTagsBuildsAndPublishesNothing(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	req := request(t)
	req.Spec.Tags = nil
	j := c.ended(c.submit(req).GetId())
	wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
	if j.GetDigest() != "" || c.count(amd64) != 1 {
		t.Errorf("job is %v", j)
	}
}

func TestJob_LegThatFailsLetsTheOtherEndAndRetryUsesIt(t *testing.T) {
	t.Parallel()
	var broken atomic.Bool
	broken.Store(true)
	b := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		if leg.Platform == arm64 && broken.Load() {
			return ocispecs.Descriptor{}, status.Error(codes.InvalidArgument, "no such stage")
		}
		return pushes(ctx, leg, report)
	}}
	c := newFarm(t).start(b, nil)
	id := c.submit(request(t)).GetId()
	j := c.ended(id)
	wantState(t, j, archfarmv1.Job_STATE_FAILED)
	if want := arm64 + ": no such stage"; j.GetError() != want {
		t.Errorf("error is %q, want %q", j.GetError(), want)
	}
	if legOf(j, amd64).GetState() != archfarmv1.JobLeg_STATE_SUCCEEDED || b.count(arm64) != 1 || tagged(t, repository(t)+":"+commit) != "" {
		t.Errorf("legs are %v, %d attempts", j.GetLegs(), b.count(arm64))
	}
	broken.Store(false)
	resp, err := c.Retry(t.Context(), &archfarmv1.RetryRequest{Id: id})
	if err != nil {
		t.Fatal(err)
	}
	wantState(t, resp.GetJob(), archfarmv1.Job_STATE_QUEUED)
	events := c.watched(id, j.GetLastSeq()) // the retry's, and not the end before it
	wantState(t, events[0].GetJob(), archfarmv1.Job_STATE_QUEUED)
	j = c.get(id)
	wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
	if b.count(amd64) != 1 || b.count(arm64) != 2 || tagged(t, repository(t)+":"+commit) != j.GetDigest() || j.GetRetries() != 1 {
		t.Errorf("%d and %d attempts, job %v", b.count(amd64), b.count(arm64), j)
	}
	if got := c.watched(id, j.GetLastSeq()); len(got) != 0 {
		t.Errorf("after the end come %v", got)
	}
}

func TestJob_RetryBuildsAgainWhatItNamesAndWhatTheRegistryLost(t *testing.T) {
	t.Parallel()
	b := &builds{}
	c := newFarm(t).start(b, nil)
	id := c.submit(request(t)).GetId()
	j := c.ended(id)
	if _, err := c.Retry(t.Context(), &archfarmv1.RetryRequest{Id: id, Platforms: []string{"arm64"}}); err != nil {
		t.Fatal(err)
	}
	wantState(t, c.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
	if b.count(amd64) != 1 || b.count(arm64) != 2 {
		t.Fatalf("%d and %d attempts", b.count(amd64), b.count(arm64))
	}
	host, name, _ := strings.Cut(repository(t), "/")
	if _, err := send(t.Context(), http.MethodDelete, "http://"+host+"/v2/"+name+"/manifests/"+legOf(j, amd64).GetDigest(), "", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Retry(t.Context(), &archfarmv1.RetryRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	wantState(t, c.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
	if b.count(amd64) != 2 || b.count(arm64) != 2 {
		t.Errorf("%d and %d attempts", b.count(amd64), b.count(arm64))
	}
}

func TestJob_AttemptsForWhatIsNotTheBuildsFault(t *testing.T) {
	t.Parallel()
	b := &builds{}
	b.do = func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		if leg.Platform == arm64 || leg.Attempt == 1 {
			return ocispecs.Descriptor{}, &build.LostError{Worker: "mac-1"}
		}
		return pushes(ctx, leg, report)
	}
	c := newFarm(t).start(b, nil)
	req := request(t)
	req.Spec.MaxAttempts = 2
	j := c.ended(c.submit(req).GetId())
	wantState(t, j, archfarmv1.Job_STATE_FAILED)
	if l := legOf(j, amd64); l.GetState() != archfarmv1.JobLeg_STATE_SUCCEEDED || len(l.GetAttempts()) != 2 || l.GetAttempts()[0].GetError() != "worker mac-1 was lost" {
		t.Errorf("leg is %v", l)
	}
	if l := legOf(j, arm64); l.GetState() != archfarmv1.JobLeg_STATE_FAILED || len(l.GetAttempts()) != 2 {
		t.Errorf("leg is %v", l)
	}
	refs := map[string]bool{}
	for _, l := range b.begun {
		refs[l.Ref] = true
	}
	if len(refs) != 4 {
		t.Errorf("4 attempts have the references %v", refs)
	}
}

// untilDone is a build that ends with its context; began gets its attempts.
func untilDone(began chan<- Leg) func(context.Context, Leg, Report) (ocispecs.Descriptor, error) {
	return func(ctx context.Context, leg Leg, _ Report) (ocispecs.Descriptor, error) {
		select {
		case began <- leg:
			<-ctx.Done()
		case <-ctx.Done(): // an attempt that nobody waits for
		}
		return ocispecs.Descriptor{}, status.FromContextError(ctx.Err()).Err()
	}
}

func receive[T any](t *testing.T, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-time.After(soon):
		t.Fatal("waited in vain")
	}
	return v
}

func TestJob_CancelledWhileItRuns(t *testing.T) {
	t.Parallel()
	began := make(chan Leg, 2)
	c := newFarm(t).start(&builds{do: untilDone(began)}, nil)
	id := c.submit(request(t)).GetId()
	receive(t, began)
	receive(t, began)
	if _, err := c.Cancel(t.Context(), &archfarmv1.CancelRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	j := c.ended(id)
	wantState(t, j, archfarmv1.Job_STATE_CANCELLED)
	if l := legOf(j, amd64); l.GetState() != archfarmv1.JobLeg_STATE_CANCELLED || l.GetAttempts()[0].GetEndTime() == nil {
		t.Errorf("leg is %v", l)
	}
	if resp, err := c.Cancel(t.Context(), &archfarmv1.CancelRequest{Id: id}); err != nil || resp.GetJob().GetLastSeq() != j.GetLastSeq() {
		t.Errorf("cancelled again: %v, %v", resp, err)
	}
}

func TestJob_CancelledInTheQueue(t *testing.T) {
	t.Parallel()
	began := make(chan Leg, 2)
	b := &builds{do: untilDone(began)}
	c := newFarm(t).start(b, func(o *Options) { o.MaxJobs = 1 })
	c.submit(request(t))
	receive(t, began)
	receive(t, began)
	id := c.submit(request(t)).GetId()
	if _, err := c.Cancel(t.Context(), &archfarmv1.CancelRequest{Id: id}); err != nil {
		t.Fatal(err)
	}
	wantState(t, c.ended(id), archfarmv1.Job_STATE_CANCELLED)
	if got := b.count(amd64); got != 1 {
		t.Errorf("%d jobs were built, not one", got)
	}
}

func TestJob_TimeIsCountedFromItsStart(t *testing.T) {
	t.Parallel()
	began := make(chan Leg, 2)
	c := newFarm(t).start(&builds{do: untilDone(began)}, func(o *Options) { o.Timeout = 300 * time.Millisecond })
	j := c.ended(c.submit(request(t)).GetId())
	wantState(t, j, archfarmv1.Job_STATE_FAILED)
	if !strings.Contains(j.GetError(), "300ms") || legOf(j, arm64).GetState() != archfarmv1.JobLeg_STATE_CANCELLED {
		t.Errorf("job is %v", j)
	}
}

func TestSubmit_ARequestIsOneJob(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	req := request(t)
	req.RequestId = "pipeline-17"
	var group errgroup.Group
	ids := make([]string, 8)
	for i := range ids {
		group.Go(func() error {
			resp, err := c.Submit(t.Context(), req)
			ids[i] = resp.GetJob().GetId()
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("jobs are %v", ids)
		}
	}
	c.ended(ids[0])
	resp, err := c.Submit(t.Context(), req)
	if err != nil || !resp.GetExisted() || resp.GetJob().GetState() != archfarmv1.Job_STATE_SUCCEEDED {
		t.Fatalf("submitted again: %v, %v", resp, err)
	}
	req.Spec.Target = "other"
	_, err = c.Submit(t.Context(), req)
	wantCode(t, err, codes.AlreadyExists, ids[0])
}

func TestSubmit_ARequestsCommitIsFoundOutOnce(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	c := newFarm(t).start(&builds{}, func(o *Options) {
		o.Resolve = func(context.Context, *archfarmv1.GitContext, gitref.Auth) (*archfarmv1.Source, error) {
			if asked.Add(1) > 1 {
				return nil, status.Error(codes.NotFound, "the branch was deleted")
			}
			return &archfarmv1.Source{Commit: commit}, nil
		}
	})
	req := request(t)
	req.RequestId = "pipeline-17"
	id := c.submit(req).GetId()
	if resp, err := c.Submit(t.Context(), req); err != nil || resp.GetJob().GetId() != id || !resp.GetExisted() {
		t.Errorf("submitted again: %v, %v", resp, err)
	}
	req.Spec.Target = "other"
	_, err := c.Submit(t.Context(), req)
	wantCode(t, err, codes.AlreadyExists, id)
}

func TestSubmit_NothingSecretIsStoredOrShown(t *testing.T) {
	t.Parallel()
	const password, token, stored = "s3cret-password", "s3cret-token", "s3cret-stored"
	f := newFarm(t)
	got := make(chan Leg, 2)
	began := make(chan struct{})
	b := &builds{do: func(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error) {
		got <- leg
		<-began
		return pushes(ctx, leg, report)
	}}
	c := f.start(b, nil)
	if _, err := c.PutSecret(t.Context(), &archfarmv1.PutSecretRequest{Name: "npm", Value: []byte(stored)}); err != nil {
		t.Fatal(err)
	}
	req := request(t)
	req.Spec.Secrets = []*archfarmv1.SecretRef{{Id: "a"}, {Id: "b", Name: "npm"}}
	req.Secrets = map[string][]byte{"a": []byte(token)}
	req.Credentials = []*archfarmv1.RegistryCredential{{Host: "registry.example.com", Username: "ci", Password: password}}
	id := c.submit(req).GetId()
	leg := receive(t, got)
	if string(leg.Secrets["a"]) != token || string(leg.Secrets["b"]) != stored || leg.Credentials[0].GetPassword() != password {
		t.Errorf("the build gets %v", leg.Secrets)
	}
	raw, err := f.store.Job(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if len(raw.Sealed) == 0 || strings.Contains(string(raw.Spec)+string(raw.Sealed)+raw.SpecDigest, "s3cret") {
		t.Errorf("stored is %+v", raw)
	}
	close(began)
	wantState(t, c.ended(id), archfarmv1.Job_STATE_SUCCEEDED)
	for _, e := range c.watched(id, 0) {
		if strings.Contains(e.String(), "s3cret") {
			t.Errorf("event %v", e)
		}
	}
	if raw, err = f.store.Job(t.Context(), id); err != nil || len(raw.Sealed) > 0 {
		t.Errorf("what is sealed is still there: %v", err)
	}
	_, err = c.Retry(t.Context(), &archfarmv1.RetryRequest{Id: id})
	wantCode(t, err, codes.FailedPrecondition, "erased")
	req.Spec.Secrets[1].Name = "nmp"
	_, err = c.Submit(t.Context(), req)
	wantCode(t, err, codes.InvalidArgument, "spec.secrets[1].name", "nmp")
}

func TestService_TenantsSeeTheirOwn(t *testing.T) {
	t.Parallel()
	began := make(chan Leg, 2)
	c := newFarm(t).start(&builds{do: untilDone(began)}, nil)
	acme, other := as(t.Context(), "acme"), as(t.Context(), "other")
	resp, err := c.Submit(acme, request(t))
	if err != nil {
		t.Fatal(err)
	}
	id := resp.GetJob().GetId()
	if who := receive(t, began).Who; who.Tenant != "acme" || who.Name != "ci-acme" || !who.MayUse("office") || who.MayUse("cloud") {
		t.Errorf("it is built for %+v", who)
	}
	_, err = c.Get(other, &archfarmv1.GetRequest{Id: id})
	wantCode(t, err, codes.NotFound)
	_, err = c.Cancel(other, &archfarmv1.CancelRequest{Id: id})
	wantCode(t, err, codes.NotFound)
	_, err = c.watch(other, id, 0)
	wantCode(t, err, codes.NotFound)
	if list, err := c.List(other, &archfarmv1.ListRequest{}); err != nil || len(list.GetJobs()) > 0 {
		t.Errorf("another tenant sees %v, %v", list, err)
	}
	for _, ctx := range []context.Context{acme, t.Context()} { // an operator sees all
		if list, err := c.List(ctx, &archfarmv1.ListRequest{}); err != nil || len(list.GetJobs()) != 1 {
			t.Errorf("the list is %v, %v", list, err)
		}
		if got, err := c.Get(ctx, &archfarmv1.GetRequest{Id: id[:13]}); err != nil || got.GetJob().GetId() != id {
			t.Errorf("by prefix: %v, %v", got, err)
		}
	}
}

func TestList_PagesAndFilters(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	req := request(t)
	req.Spec.Platforms, req.Spec.Tags = []string{amd64}, []string{"registry.example.com/app"}
	var ids []string
	for range 5 {
		ids = append(ids, c.submit(req).GetId())
	}
	slices.Reverse(ids)
	var got []string
	for token, more := "", true; more; more = token != "" {
		resp, err := c.List(t.Context(), &archfarmv1.ListRequest{PageSize: 2, PageToken: token, Repository: "registry.example.com/app"})
		if err != nil {
			t.Fatal(err)
		}
		for _, j := range resp.GetJobs() {
			got = append(got, j.GetId())
		}
		token = resp.GetNextPageToken()
	}
	if !slices.Equal(got, ids) {
		t.Errorf("jobs are %v, want %v", got, ids)
	}
	for _, bad := range []*archfarmv1.ListRequest{
		{PageSize: -1}, {PageSize: 1001}, {PageToken: "x"}, {Repository: "a:b:c"}, {Repository: "app:latest"}, {States: []archfarmv1.Job_State{77}},
	} {
		_, err := c.List(t.Context(), bad)
		wantCode(t, err, codes.InvalidArgument)
	}
}

func TestTags_ShowsWhatAJobPublished(t *testing.T) {
	t.Parallel()
	c := newFarm(t).start(&builds{}, nil)
	j := c.ended(c.submit(request(t)).GetId())
	wantState(t, j, archfarmv1.Job_STATE_SUCCEEDED)
	resp, err := c.ListTags(t.Context(), &archfarmv1.ListTagsRequest{Repository: repository(t)})
	if err != nil || len(resp.GetBindings()) != 1 {
		t.Fatalf("tags are %v, %v", resp, err)
	}
	b := resp.GetBindings()[0]
	if b.GetTag() != commit || b.GetDigest() != j.GetDigest() || b.GetJob() != j.GetId() || !b.GetCurrent() || !b.GetImmutable() ||
		b.GetState() != archfarmv1.TagBinding_STATE_PUBLISHED || b.GetSource().GetCommit() != commit {
		t.Errorf("binding is %v", b)
	}
}
