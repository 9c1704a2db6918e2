package client

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// farm answers as a coordinator does that has one job, and may do anything that a
// coordinator and what is in between can do to a stream.
type farm struct {
	archfarmv1.UnimplementedJobServiceServer
	archfarmv1.UnimplementedTagServiceServer

	mu      sync.Mutex
	events  []*archfarmv1.JobEvent
	script  []cut // of the calls of Watch, in order; then all is well
	asked   []int64
	submits []*archfarmv1.SubmitRequest
	refuse  []error // of the calls of Submit, in order
	failGet int     // so many calls of Get fail
	jobs    []*archfarmv1.Job
	lists   []*archfarmv1.ListRequest
}

// cut is what a call of Watch does.
type cut struct {
	after int // events, then the stream ends so:
	err   error
	again int // it begins with as many that were sent before
	skip  int // it leaves out as many, so that there is a gap
}

func (f *farm) Watch(req *archfarmv1.WatchRequest, stream grpc.ServerStreamingServer[archfarmv1.WatchResponse]) error {
	f.mu.Lock()
	f.asked = append(f.asked, req.GetAfterSeq())
	how := cut{after: len(f.events)}
	if len(f.script) > 0 {
		how, f.script = f.script[0], f.script[1:]
	}
	f.mu.Unlock()
	from := min(max(int(req.GetAfterSeq())-how.again, 0)+how.skip, len(f.events))
	rest := f.events[from:]
	for _, event := range rest[:min(how.after, len(rest))] {
		if err := stream.Send(&archfarmv1.WatchResponse{Event: event}); err != nil {
			return err
		}
	}
	return how.err
}

func (f *farm) Get(context.Context, *archfarmv1.GetRequest) (*archfarmv1.GetResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failGet > 0 {
		f.failGet--
		return nil, status.Error(codes.Unavailable, "restarting")
	}
	last := f.events[len(f.events)-1]
	return &archfarmv1.GetResponse{Job: &archfarmv1.Job{Id: "j", State: last.GetJob().GetState(), LastSeq: last.GetSeq()}}, nil
}

func (f *farm) Submit(_ context.Context, req *archfarmv1.SubmitRequest) (*archfarmv1.SubmitResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.submits = append(f.submits, req)
	if len(f.refuse) > 0 {
		err := f.refuse[0]
		f.refuse = f.refuse[1:]
		return nil, err
	}
	return &archfarmv1.SubmitResponse{Job: &archfarmv1.Job{Id: "j", RequestId: req.GetRequestId()}, Existed: len(f.submits) > 1}, nil
}

func (f *farm) List(_ context.Context, req *archfarmv1.ListRequest) (*archfarmv1.ListResponse, error) {
	f.lists = append(f.lists, req)
	from := 0
	_, _ = fmt.Sscan(req.GetPageToken(), &from)
	to := min(from+int(req.GetPageSize()), len(f.jobs))
	answer := &archfarmv1.ListResponse{Jobs: f.jobs[from:to]}
	if to < len(f.jobs) {
		answer.NextPageToken = fmt.Sprint(to)
	}
	return answer, nil
}

func (f *farm) ListTags(_ context.Context, req *archfarmv1.ListTagsRequest) (*archfarmv1.ListTagsResponse, error) {
	if req.GetPageToken() == "" {
		return &archfarmv1.ListTagsResponse{Bindings: []*archfarmv1.TagBinding{{Tag: "v2"}}, NextPageToken: "same"}, nil
	}
	return &archfarmv1.ListTagsResponse{Bindings: []*archfarmv1.TagBinding{{Tag: "v1"}}, NextPageToken: "same"}, nil
}

// fataler is testing.TB, or a try of rapid's.
type fataler interface {
	Fatal(...any)
	Errorf(string, ...any)
}

// serve returns a client of the farm that does not wait between tries, and the end of both.
func (f *farm) serve(t fataler, dir string) (*Client, func()) {
	socket := filepath.Join(dir, "farm.sock")
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	archfarmv1.RegisterJobServiceServer(server, f)
	archfarmv1.RegisterTagServiceServer(server, f)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	client, err := Dial(Config{Farm: "unix://" + socket})
	if err != nil {
		t.Fatal(err)
	}
	client.pause = func(ctx context.Context, _ time.Duration) error { return ctx.Err() }
	return client, func() {
		_ = client.Close()
		server.Stop()
		if err := <-ended; err != nil {
			t.Errorf("serving: %v", err)
		}
	}
}

func dialed(t *testing.T, f *farm) *Client {
	t.Helper()
	client, end := f.serve(t, t.TempDir())
	t.Cleanup(end)
	return client
}

// life is a job's events: states among notices, the end last.
func life(n int) []*archfarmv1.JobEvent {
	var out []*archfarmv1.JobEvent
	for seq := int64(1); seq <= int64(n); seq++ {
		event := &archfarmv1.JobEvent{Seq: seq, Event: &archfarmv1.JobEvent_Notice{Notice: fmt.Sprint(seq)}}
		switch {
		case seq == int64(n):
			event.Event = &archfarmv1.JobEvent_Job{Job: &archfarmv1.Job{State: archfarmv1.Job_STATE_SUCCEEDED}}
		case seq%5 == 1:
			event.Event = &archfarmv1.JobEvent_Job{Job: &archfarmv1.Job{State: archfarmv1.Job_STATE_RUNNING}}
		}
		out = append(out, event)
	}
	return out
}

func TestWatch_HasEachEventOnceWhereverItIsCut(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(1, 40).Draw(rt, "events")
		f := &farm{events: life(n), failGet: rapid.IntRange(0, 2).Draw(rt, "failing gets")}
		ends := []error{
			nil, status.Error(codes.Unavailable, "draining"), status.Error(codes.Aborted, "elsewhere"), status.Error(codes.Canceled, "closing"),
			status.Error(codes.ResourceExhausted, "too many watchers"), status.Error(codes.Internal, "stream terminated by RST_STREAM with error code: INTERNAL_ERROR"),
		}
		for range rapid.IntRange(0, 12).Draw(rt, "cuts") {
			f.script = append(f.script, cut{
				after: rapid.IntRange(0, n).Draw(rt, "after"), err: rapid.SampledFrom(ends).Draw(rt, "end"),
				again: rapid.IntRange(0, 3).Draw(rt, "again"), skip: rapid.SampledFrom([]int{0, 0, 0, 1, 4}).Draw(rt, "skip"),
			})
		}
		dir, err := filepath.Abs(base)
		if err != nil {
			rt.Fatal(err)
		}
		client, end := f.serve(rt, dir)
		defer end()
		after := rapid.Int64Range(0, int64(n)).Draw(rt, "from")
		var got []int64
		for event, err := range client.Watch(context.Background(), "j", after) {
			if err != nil {
				rt.Fatal(err)
			}
			got = append(got, event.GetSeq())
		}
		var want []int64
		for seq := after + 1; seq <= int64(n); seq++ {
			want = append(want, seq)
		}
		if !slices.Equal(got, want) {
			rt.Fatalf("events %v, want %v; asked after %v", got, want, f.asked)
		}
	})
}

func TestWatch_EndsWithWhatAnotherTryWouldNotChange(t *testing.T) {
	t.Parallel()
	f := &farm{events: life(9), script: []cut{{after: 3, err: status.Error(codes.Unavailable, "restarting")}, {err: status.Error(codes.NotFound, "no such job")}}}
	client := dialed(t, f)
	var told []string
	client.Retrying = func(err error) { told = append(told, status.Convert(err).Message()) }
	var last error
	n := 0
	for event, err := range client.Watch(t.Context(), "j", 0) {
		if last = err; event != nil {
			n++
		}
	}
	if n != 3 || status.Code(last) != codes.NotFound || !slices.Equal(told, []string{"restarting"}) || !slices.Equal(f.asked, []int64{0, 3}) {
		t.Errorf("%d events, then %v; told %q; asked after %v", n, last, told, f.asked)
	}
}

func TestWatch_LosesItsPatience(t *testing.T) {
	t.Parallel()
	f := &farm{events: life(3)}
	for range 10_000 {
		f.script = append(f.script, cut{err: status.Error(codes.Unavailable, "down")})
	}
	client := dialed(t, f)
	client.Patience = time.Millisecond
	for _, err := range client.Watch(t.Context(), "j", 0) {
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "has not answered for") {
			t.Errorf("it ends with %v", err)
		}
	}
}

func TestWatch_TellsWhyItsContextEnded(t *testing.T) {
	t.Parallel()
	f := &farm{events: life(9), script: []cut{{after: 3, err: status.Error(codes.Unavailable, "restarting")}}}
	client := dialed(t, f)
	why := errors.New("no more time")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	client.Retrying = func(error) { cancel(why) }
	var last error
	for _, err := range client.Watch(ctx, "j", 0) {
		last = err
	}
	if !errors.Is(last, why) {
		t.Errorf("it ends with %v", last)
	}
}

func TestWatch_CanBeLeft(t *testing.T) {
	t.Parallel()
	client := dialed(t, &farm{events: life(9)})
	for _, err := range client.Watch(t.Context(), "j", 0) {
		if err != nil {
			t.Error(err)
		}
		break
	}
}

func TestWait_ReturnsTheJobAfterItsEnd(t *testing.T) {
	t.Parallel()
	f := &farm{events: life(9), failGet: 2}
	job, err := dialed(t, f).Wait(t.Context(), "j")
	if err != nil || job.GetState() != archfarmv1.Job_STATE_SUCCEEDED {
		t.Errorf("%v, %v", job, err)
	}
}

func TestSubmit_TriesAgainUnderOneRequestID(t *testing.T) {
	t.Parallel()
	f := &farm{refuse: []error{status.Error(codes.Unavailable, "restarting"), status.Error(codes.Unavailable, "restarting")}}
	job, existed, err := dialed(t, f).Submit(t.Context(), &archfarmv1.SubmitRequest{Spec: &archfarmv1.JobSpec{Target: "t"}, Secrets: map[string][]byte{"a": []byte("b")}})
	if err != nil || !existed || job.GetRequestId() == "" || len(f.submits) != 3 {
		t.Fatalf("%v, %v, %v after %d tries", job, existed, err, len(f.submits))
	}
	for _, req := range f.submits {
		if req.GetRequestId() != job.GetRequestId() || req.GetSpec().GetTarget() != "t" || string(req.GetSecrets()["a"]) != "b" {
			t.Errorf("a try asked for %v", req)
		}
	}
}

func TestSubmit_TellsEveryFault(t *testing.T) {
	t.Parallel()
	refused, err := status.New(codes.InvalidArgument, "two faults").WithDetails(&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: "spec.context", Description: "required"}, {Field: "spec.tags[0]", Description: "no reference"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	f := &farm{refuse: []error{refused.Err()}}
	_, _, err = dialed(t, f).Submit(t.Context(), &archfarmv1.SubmitRequest{RequestId: "mine"})
	want := []Fault{{"spec.context", "required"}, {"spec.tags[0]", "no reference"}}
	if got := Faults(fmt.Errorf("around it: %w", err)); !slices.Equal(got, want) || len(f.submits) != 1 || f.submits[0].GetRequestId() != "mine" {
		t.Errorf("%v after %d tries: %v", got, len(f.submits), err)
	}
	if got := Faults(errors.New("something else")); got != nil {
		t.Errorf("of another error: %v", got)
	}
}

func TestList_AsksForPagesAsTheyAreNeeded(t *testing.T) {
	t.Parallel()
	f := &farm{}
	for i := range 7 {
		f.jobs = append(f.jobs, &archfarmv1.Job{Id: fmt.Sprint(i)})
	}
	client := dialed(t, f)
	got := ""
	for job, err := range client.List(t.Context(), &archfarmv1.ListRequest{PageSize: 3, Repository: "r"}) {
		if err != nil {
			t.Fatal(err)
		}
		got += job.GetId()
	}
	if got != "0123456" || len(f.lists) != 3 || f.lists[2].GetRepository() != "r" {
		t.Errorf("%s in %d pages", got, len(f.lists))
	}
	f.lists = nil
	for _, err := range client.List(t.Context(), &archfarmv1.ListRequest{PageSize: 3}) {
		if err != nil {
			t.Error(err)
		}
		break
	}
	if len(f.lists) != 1 {
		t.Errorf("%d pages for one job", len(f.lists))
	}
}

func TestTags_DoesNotGoRoundForEver(t *testing.T) {
	t.Parallel()
	got, last := "", error(nil)
	for binding, err := range dialed(t, &farm{}).Tags(t.Context(), &archfarmv1.ListTagsRequest{Repository: "r"}) {
		got, last = got+" "+binding.GetTag(), err
	}
	if got != " v2 v1 " || status.Code(last) != codes.Internal {
		t.Errorf("%q, then %v", got, last)
	}
}

func TestDial_WantsACertificateForAnotherMachine(t *testing.T) {
	t.Parallel()
	for farm, want := range map[string]error{"farm.example:1": ErrPlaintext, "127.0.0.1:1": nil, "unix:///run/a.sock": nil} {
		client, err := Dial(Config{Farm: farm})
		if !errors.Is(err, want) {
			t.Errorf("%s: %v", farm, err)
		}
		if err == nil {
			_ = client.Close()
		}
	}
	if _, err := Dial(Config{Farm: "nonsense"}); err == nil {
		t.Error("dialing nonsense is no error")
	}
	if _, err := Dial(Config{Farm: "farm.example:1", CertDir: t.TempDir()}); err == nil {
		t.Error("a folder without a certificate is no error")
	}
}
