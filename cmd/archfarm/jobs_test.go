package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
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
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/contextpack"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// jobFarm is a coordinator with one job, whose events are a script.
type jobFarm struct {
	archfarmv1.UnimplementedJobServiceServer
	archfarmv1.UnimplementedTagServiceServer
	archfarmv1.UnimplementedSecretServiceServer

	mu        sync.Mutex
	job       *archfarmv1.Job
	events    []*archfarmv1.JobEvent
	cuts      int // so many calls of Watch end after an event each
	forever   bool
	refuse    error
	submitted *archfarmv1.SubmitRequest
	list      *archfarmv1.ListRequest
	asked     []string
	chunks    map[string]bool
	secrets   map[string]string
	bindings  []*archfarmv1.TagBinding
}

func (f *jobFarm) Submit(_ context.Context, req *archfarmv1.SubmitRequest) (*archfarmv1.SubmitResponse, error) {
	f.submitted = req
	return &archfarmv1.SubmitResponse{Job: f.job}, f.refuse
}

func (f *jobFarm) Get(_ context.Context, req *archfarmv1.GetRequest) (*archfarmv1.GetResponse, error) {
	if !strings.HasPrefix(f.job.GetId(), req.GetId()) {
		return nil, status.Error(codes.NotFound, "there is no such job")
	}
	return &archfarmv1.GetResponse{Job: f.job}, nil
}

func (f *jobFarm) List(_ context.Context, req *archfarmv1.ListRequest) (*archfarmv1.ListResponse, error) {
	f.list = req
	return &archfarmv1.ListResponse{Jobs: []*archfarmv1.Job{f.job}}, nil
}

func (f *jobFarm) Watch(req *archfarmv1.WatchRequest, stream grpc.ServerStreamingServer[archfarmv1.WatchResponse]) error {
	for i, event := range f.events[min(int(req.GetAfterSeq()), len(f.events)):] {
		f.mu.Lock()
		cut := i > 0 && f.cuts > 0
		if cut {
			f.cuts--
		}
		f.mu.Unlock()
		if cut {
			return status.Error(codes.Unavailable, "the coordinator stops")
		}
		if err := stream.Send(&archfarmv1.WatchResponse{Event: event}); err != nil {
			return err
		}
	}
	if f.forever {
		<-stream.Context().Done()
	}
	return nil
}

func (f *jobFarm) Cancel(_ context.Context, req *archfarmv1.CancelRequest) (*archfarmv1.CancelResponse, error) {
	f.asked = append(f.asked, "cancel "+req.GetId())
	return &archfarmv1.CancelResponse{Job: f.job}, nil
}

func (f *jobFarm) Retry(_ context.Context, req *archfarmv1.RetryRequest) (*archfarmv1.RetryResponse, error) {
	f.asked = append(f.asked, fmt.Sprint("retry ", req.GetId(), req.GetPlatforms()))
	return &archfarmv1.RetryResponse{Job: f.job}, nil
}

func (f *jobFarm) FindMissing(_ context.Context, req *archfarmv1.FindMissingRequest) (*archfarmv1.FindMissingResponse, error) {
	return &archfarmv1.FindMissingResponse{Digests: slices.DeleteFunc(slices.Clone(req.GetDigests()), func(d string) bool { return f.chunks[d] })}, nil
}

func (f *jobFarm) UploadContext(stream grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) error {
	for {
		part, err := stream.Recv()
		if err != nil {
			return err
		}
		if whole := part.GetWhole(); whole != nil {
			return stream.SendAndClose(&archfarmv1.UploadContextResponse{Digest: contextpack.Digest(whole)})
		}
	}
}

func (f *jobFarm) ListTags(_ context.Context, req *archfarmv1.ListTagsRequest) (*archfarmv1.ListTagsResponse, error) {
	f.asked = append(f.asked, "tags "+req.GetRepository()+" "+req.GetTag())
	return &archfarmv1.ListTagsResponse{Bindings: f.bindings}, nil
}

func (f *jobFarm) PutSecret(_ context.Context, req *archfarmv1.PutSecretRequest) (*archfarmv1.PutSecretResponse, error) {
	f.secrets[req.GetName()] = string(req.GetValue())
	return &archfarmv1.PutSecretResponse{}, nil
}

func (f *jobFarm) ListSecrets(context.Context, *archfarmv1.ListSecretsRequest) (*archfarmv1.ListSecretsResponse, error) {
	var out []*archfarmv1.SecretInfo
	for _, name := range slices.Sorted(maps.Keys(f.secrets)) {
		out = append(out, &archfarmv1.SecretInfo{Name: name, UpdateTime: timestamppb.New(since)})
	}
	return &archfarmv1.ListSecretsResponse{Secrets: out}, nil
}

func (f *jobFarm) DeleteSecret(_ context.Context, req *archfarmv1.DeleteSecretRequest) (*archfarmv1.DeleteSecretResponse, error) {
	delete(f.secrets, req.GetName())
	return &archfarmv1.DeleteSecretResponse{}, nil
}

// serve returns the farm's address, for --farm.
func (f *jobFarm) serve(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "farm.sock")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(32 << 20))
	archfarmv1.RegisterJobServiceServer(server, f)
	archfarmv1.RegisterTagServiceServer(server, f)
	archfarmv1.RegisterSecretServiceServer(server, f)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // before it began
			t.Error(err)
		}
	})
	return "unix://" + socket
}

// ran is what a command has said, and how it ended.
type ran struct {
	stdout, stderr string
	err            error
}

func try(t *testing.T, stdin string, args ...string) ran {
	t.Helper()
	var out, errs bytes.Buffer
	root := newRoot(nil)
	root.SetIn(strings.NewReader(stdin))
	root.SetOut(&out)
	root.SetErr(&errs)
	root.SetArgs(args)
	err := root.ExecuteContext(t.Context())
	return ran{out.String(), errs.String(), err}
}

// scriptedJob is a job of two legs, one of which loses its first worker, and fails or
// not at the end.
func scriptedJob(state archfarmv1.Job_State, why string) *jobFarm {
	at := func(seq int64) *timestamppb.Timestamp {
		return timestamppb.New(since.Add(time.Duration(seq) * time.Second))
	}
	f := &jobFarm{secrets: map[string]string{}}
	add := func(e *archfarmv1.JobEvent) {
		e.Seq = int64(len(f.events) + 1)
		e.Time = at(e.GetSeq())
		f.events = append(f.events, e)
	}
	job := func(s archfarmv1.Job_State) *archfarmv1.Job {
		return &archfarmv1.Job{Id: "job-1", State: s, Tags: []string{"registry.example.com/app:abc"}, CreateTime: at(0), Spec: &archfarmv1.JobSpec{Platforms: []string{"linux/amd64", "linux/arm64"}}}
	}
	stateEvent := func(j *archfarmv1.Job) { add(&archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Job{Job: j}}) }
	leg := func(l *archfarmv1.JobLeg) { add(&archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Leg{Leg: l}}) }
	progress := func(p *archfarmv1.Progress) {
		add(&archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Progress{Progress: p}})
	}
	step := func(digest, name string, began, ended int64) *archfarmv1.Vertex {
		v := &archfarmv1.Vertex{Digest: digest, Name: name, Started: at(began)}
		if ended > 0 {
			v.Completed = at(ended)
		}
		return v
	}
	const first, second, other = "sha256:1111111111111111111111111111111111111111111111111111111111111111", "sha256:2222222222222222222222222222222222222222222222222222222222222222", "sha256:3333333333333333333333333333333333333333333333333333333333333333"
	stateEvent(job(archfarmv1.Job_STATE_QUEUED))
	stateEvent(job(archfarmv1.Job_STATE_RUNNING))
	leg(&archfarmv1.JobLeg{Platform: "linux/amd64", State: archfarmv1.JobLeg_STATE_RUNNING, Worker: "amd-1", Attempts: []*archfarmv1.LegAttempt{{Number: 1, Worker: "amd-1"}}})
	progress(&archfarmv1.Progress{Platform: "linux/amd64", Attempt: 1, Vertexes: []*archfarmv1.Vertex{step(first, "[2/2] RUN make", 4, 0)}, Logs: []*archfarmv1.VertexLog{{Vertex: first, Timestamp: at(4), Stream: 1, Msg: []byte("half a line")}}})
	leg(&archfarmv1.JobLeg{Platform: "linux/amd64", State: archfarmv1.JobLeg_STATE_RUNNING, Worker: "amd-2", Attempts: []*archfarmv1.LegAttempt{
		{Number: 1, Worker: "amd-1", Error: "the worker was lost"}, {Number: 2, Worker: "amd-2"},
	}})
	progress(&archfarmv1.Progress{Platform: "linux/amd64", Attempt: 2, Vertexes: []*archfarmv1.Vertex{step(second, "[2/2] RUN make", 6, 7)}, Logs: []*archfarmv1.VertexLog{{Vertex: second, Timestamp: at(6), Stream: 2, Msg: []byte("made\n")}}})
	progress(&archfarmv1.Progress{Platform: "linux/arm64", Attempt: 1, Vertexes: []*archfarmv1.Vertex{step(other, "[2/2] RUN make", 7, 8)}, Logs: []*archfarmv1.VertexLog{{Vertex: other, Timestamp: at(7), Stream: 1, Msg: []byte("made on arm\n")}}})
	add(&archfarmv1.JobEvent{Event: &archfarmv1.JobEvent_Notice{Notice: "the tag abc is mutable\x1b[2J"}})
	end := job(state)
	end.Error, end.EndTime = why, at(9)
	if state == archfarmv1.Job_STATE_SUCCEEDED {
		end.Digest = "sha256:feed"
	}
	stateEvent(end)
	f.job = end
	f.job.LastSeq = int64(len(f.events))
	return f
}

func TestWatch_ShowsTheJobThroughCuts(t *testing.T) {
	t.Parallel()
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	f.cuts = 2
	got := try(t, "", "watch", "job", "--progress", "plain", "--output", "json", "--farm", f.serve(t))
	if got.err != nil {
		t.Fatal(got.err, got.stderr)
	}
	for _, words := range []string{
		"[archfarm] job job-1", "queued", "running", "linux/amd64: attempt 1 runs on amd-1", "linux/amd64: attempt 1 failed: the worker was lost", "attempt 2 runs on amd-2",
		"[linux/amd64 2/2] RUN make", "ERROR: interrupted", "[linux/arm64 2/2] RUN make", "made on arm", "the tag abc is mutable?[2J", "published registry.example.com/app:abc@sha256:feed",
	} {
		if strings.Count(got.stderr, words) == 0 {
			t.Errorf("it does not show %q:\n%s", words, got.stderr)
		}
	}
	if n := strings.Count(got.stderr, "attempt 2 runs on"); n != 1 {
		t.Errorf("attempt 2 is told %d times", n)
	}
	if strings.Count(got.stderr, "trying again: the coordinator stops") != 2 || strings.Count(got.stderr, "answers again") != 2 {
		t.Errorf("the cuts are not told:\n%s", got.stderr)
	}
	var job struct{ ID, State, Digest string }
	if err := json.Unmarshal([]byte(got.stdout), &job); err != nil || job.ID != "job-1" || job.State != "succeeded" || job.Digest != "sha256:feed" {
		t.Errorf("%v: %s", err, got.stdout)
	}
}

func TestWatch_ExitsAsTheJobHasEnded(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		state archfarmv1.Job_State
		why   string
		code  int
		words string
	}{
		{archfarmv1.Job_STATE_FAILED, "linux/arm64: make: exit code 2\x1b", exitError, "job job-1 failed: linux/arm64: make: exit code 2?"},
		{archfarmv1.Job_STATE_CANCELLED, "", exitCancelled, "job job-1 was cancelled"},
	} {
		got := try(t, "", "watch", "job-1", "--progress", "quiet", "--farm", scriptedJob(test.state, test.why).serve(t))
		if got.err == nil || exitCode(got.err) != test.code || got.err.Error() != test.words || got.stdout != "" {
			t.Errorf("%v: exit code %d, %q", test.state, exitCode(got.err), got.err)
		}
	}
	f := scriptedJob(archfarmv1.Job_STATE_FAILED, "")
	f.events, f.forever = f.events[:3], true
	got := try(t, "", "watch", "job-1", "--progress", "quiet", "--timeout", "50ms", "--farm", f.serve(t))
	if got.err == nil || exitCode(got.err) != exitTimeout || !strings.Contains(got.err.Error(), "goes on") {
		t.Errorf("after --timeout: %v", got.err)
	}
	if got := try(t, "", "watch", "another", "--farm", f.serve(t)); exitCode(got.err) != exitError || !strings.Contains(got.err.Error(), "there is no such job") {
		t.Errorf("of another job: %v", got.err)
	}
}

func TestLogs_PrintWhatStepsHaveWritten(t *testing.T) {
	t.Parallel()
	farm := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "").serve(t)
	const want = "=== [linux/amd64 2/2] RUN make\nhalf a line\n=== [linux/amd64 2/2] RUN make (attempt 2)\nmade\n=== [linux/arm64 2/2] RUN make\nmade on arm\n"
	if got := run(t, "logs", "job", "--farm", farm); got != want {
		t.Errorf("got\n%s", got)
	}
	if got := run(t, "logs", "job", "--platform", "arm64", "--follow", "--farm", farm); got != "=== [linux/arm64 2/2] RUN make\nmade on arm\n" {
		t.Errorf("of arm64:\n%s", got)
	}
	const line = `{"seq":6,"time":"2026-02-03T04:05:12Z","platform":"linux/amd64","attempt":2,"step":"[linux/amd64 2/2] RUN make","stream":"stderr","text":"made\n"}`
	if got := run(t, "logs", "job", "--output", "json", "--farm", farm); strings.Count(got, "\n") != 3 || !strings.Contains(got, line) {
		t.Errorf("as JSON:\n%s", got)
	}
}

func TestJobs_AsksForWhatTheFlagsSay(t *testing.T) {
	t.Parallel()
	f := scriptedJob(archfarmv1.Job_STATE_SUCCEEDED, "")
	farm := f.serve(t)
	var jobs []struct {
		ID, State       string
		Tags, Platforms []string
	}
	got := run(t, "jobs", "--state", "succeeded,Failed", "--repo", "r.example/app", "--since", "2026-02-03T00:00:00Z", "--limit", "7", "--output", "json", "--farm", farm)
	if err := json.Unmarshal([]byte(got), &jobs); err != nil || len(jobs) != 1 || jobs[0].State != "succeeded" || len(jobs[0].Platforms) != 2 || len(jobs[0].Tags) != 1 {
		t.Errorf("%v: %s", err, got)
	}
	q := f.list
	if q.GetRepository() != "r.example/app" || q.GetPageSize() != 7 || q.GetSince().AsTime().Day() != 3 || !slices.Equal(q.GetStates(), []archfarmv1.Job_State{archfarmv1.Job_STATE_SUCCEEDED, archfarmv1.Job_STATE_FAILED}) {
		t.Errorf("it asks %v", q)
	}
	for _, args := range [][]string{{"--state", "done"}, {"--since", "yesterday"}, {"--limit", "-1"}} {
		if got := try(t, "", append([]string{"jobs", "--farm", farm}, args...)...); exitCode(got.err) != exitUsage {
			t.Errorf("%q: %v", args, got.err)
		}
	}
	if table := run(t, "jobs", "--farm", farm); !strings.HasPrefix(table, "ID ") || !strings.Contains(table, "job-1") {
		t.Errorf("as a table:\n%s", table)
	}
	if shown := run(t, "job", "show", "job", "--farm", farm); !strings.Contains(shown, "sha256:feed") {
		t.Errorf("shown:\n%s", shown)
	}
	run(t, "cancel", "job-1", "--farm", farm)
	run(t, "retry", "job-1", "--platform", "arm64,amd64", "--farm", farm)
	if !slices.Equal(f.asked, []string{"cancel job-1", "retry job-1[linux/arm64 linux/amd64]"}) {
		t.Errorf("asked %q", f.asked)
	}
	if words := run(t, "__completeNoDesc", "watch", "--farm", farm, ""); !strings.HasPrefix(words, "job-1\n") {
		t.Errorf("completed to %q", words)
	}
}

func TestTags_ShowsTheLedger(t *testing.T) {
	t.Parallel()
	f := &jobFarm{bindings: []*archfarmv1.TagBinding{
		{Repository: "r/app", Tag: "v1", Digest: "sha256:a", State: archfarmv1.TagBinding_STATE_PUBLISHED, Immutable: true, Current: true, Job: "job-1", BindTime: timestamppb.New(since), Source: &archfarmv1.Source{Commit: "abc"}},
		{Repository: "r/app", Tag: "latest", Digest: "sha256:b", State: archfarmv1.TagBinding_STATE_UNDONE, Build: "ref", BindTime: timestamppb.New(since)},
	}}
	farm := f.serve(t)
	table := run(t, "tags", "r/app", "--tag", "v1", "--farm", farm)
	if !strings.Contains(table, "v1 *") || !strings.Contains(table, "job-1") || !strings.Contains(table, "undone") || f.asked[0] != "tags r/app v1" {
		t.Errorf("%q:\n%s", f.asked, table)
	}
	var list []struct {
		Tag, Digest, State, Job, Build string
		Current, Immutable             bool
	}
	if err := json.Unmarshal([]byte(run(t, "tags", "r/app", "--output", "json", "--limit", "1", "--farm", farm)), &list); err != nil || len(list) != 1 || !list[0].Current || list[0].State != "published" {
		t.Errorf("%v: %v", err, list)
	}
}

func TestSecret_ComesFromWhereNobodySeesIt(t *testing.T) {
	t.Parallel()
	f := &jobFarm{secrets: map[string]string{}}
	farm := f.serve(t)
	path := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(path, []byte("from a file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := try(t, "from stdin", "secret", "create", "a", "--farm", farm); got.err != nil || f.secrets["a"] != "from stdin" || got.stdout+got.stderr != "" {
		t.Errorf("%v", got)
	}
	if got := try(t, "", "secret", "create", "b", "--from-file", path, "--farm", farm); got.err != nil || f.secrets["b"] != "from a file\n" {
		t.Errorf("%v", got)
	}
	for what, got := range map[string]ran{
		"nothing":  try(t, "", "secret", "create", "c", "--farm", farm),
		"too much": try(t, strings.Repeat("x", maxSecret+1), "secret", "create", "c", "--farm", farm),
		"argv":     try(t, "x", "secret", "create", "c", "value", "--farm", farm),
	} {
		if got.err == nil || f.secrets["c"] != "" {
			t.Errorf("%s is taken", what)
		}
	}
	if got := run(t, "__completeNoDesc", "secret", "delete", "--farm", farm, ""); !strings.HasPrefix(got, "a\nb\n:4\n") {
		t.Errorf("completed to %q", got)
	}
	if got := run(t, "secret", "delete", "a", "--output", "json", "--farm", farm); !strings.Contains(got, `"name": "a"`) {
		t.Errorf("deleted: %s", got)
	}
	if got := try(t, "hunter2", "secret", "create", "b", "--output", "json", "--farm", farm); got.err != nil || !strings.Contains(got.stdout, `"name": "b"`) || strings.Contains(got.stdout, "hunter2") {
		t.Errorf("created: %v", got)
	}
	if got := run(t, "secret", "list", "--output", "json", "--farm", farm); !strings.Contains(got, `"name": "b"`) || strings.Contains(got, "file") {
		t.Errorf("listed: %s", got)
	}
}

func faulty(t *testing.T, fields ...string) error {
	t.Helper()
	bad := &errdetails.BadRequest{}
	for _, f := range fields {
		bad.FieldViolations = append(bad.FieldViolations, &errdetails.BadRequest_FieldViolation{Field: f, Description: "wrong " + f})
	}
	refused, err := status.New(codes.InvalidArgument, "faults").WithDetails(bad)
	if err != nil {
		t.Fatal(err)
	}
	return refused.Err()
}

func TestExitCode_OfEachEndOfAJob(t *testing.T) {
	t.Parallel()
	for code, err := range map[int]error{
		exitError:     jobError{state: archfarmv1.Job_STATE_FAILED},
		exitCancelled: fmt.Errorf("around it: %w", jobError{state: archfarmv1.Job_STATE_CANCELLED}),
		exitTimeout:   timeoutError{errors.New("late")},
		exitUsage:     refusal(faulty(t, "spec.tags[1]")),
	} {
		if got := exitCode(err); got != code {
			t.Errorf("%v is exit code %d, want %d", err, got, code)
		}
	}
}
