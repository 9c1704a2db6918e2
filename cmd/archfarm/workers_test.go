package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// fleet answers as a coordinator does.
type fleet struct {
	archfarmv1.UnimplementedFleetServiceServer
	workers     []*archfarmv1.Worker
	queue       []*archfarmv1.QueuedLeg
	explanation []*archfarmv1.LegExplanation

	orders, questions []string // one call at a time
}

func (f *fleet) ListWorkers(context.Context, *archfarmv1.ListWorkersRequest) (*archfarmv1.ListWorkersResponse, error) {
	return &archfarmv1.ListWorkersResponse{Workers: f.workers}, nil
}

func (f *fleet) ChangeWorker(_ context.Context, req *archfarmv1.ChangeWorkerRequest) (*archfarmv1.ChangeWorkerResponse, error) {
	i := slices.IndexFunc(f.workers, func(w *archfarmv1.Worker) bool { return w.GetName() == req.GetName() })
	if i < 0 {
		return nil, status.Errorf(codes.NotFound, "no worker of that name is attached")
	}
	f.orders = append(f.orders, fmt.Sprintf("%s %s %s", req.GetName(), req.GetChange().GetAction(), req.GetChange().GetReason()))
	f.workers[i].State = map[archfarmv1.WorkerChange_Action]archfarmv1.Worker_State{
		archfarmv1.WorkerChange_ACTION_DRAIN: archfarmv1.Worker_STATE_DRAINING, archfarmv1.WorkerChange_ACTION_CORDON: archfarmv1.Worker_STATE_CORDONED,
		archfarmv1.WorkerChange_ACTION_UNCORDON: archfarmv1.Worker_STATE_READY,
	}[req.GetChange().GetAction()]
	return &archfarmv1.ChangeWorkerResponse{Worker: f.workers[i]}, nil
}

func (f *fleet) ListQueue(context.Context, *archfarmv1.ListQueueRequest) (*archfarmv1.ListQueueResponse, error) {
	return &archfarmv1.ListQueueResponse{Legs: f.queue}, nil
}

func (f *fleet) Explain(_ context.Context, req *archfarmv1.ExplainRequest) (*archfarmv1.ExplainResponse, error) {
	question := "build " + req.GetBuild()
	if req.GetPlatform() != "" {
		question = "platform " + req.GetPlatform()
	}
	f.questions = append(f.questions, question+" "+req.GetPool())
	return &archfarmv1.ExplainResponse{Legs: f.explanation}, nil
}

// serve returns the fleet's address, for --farm.
func (f *fleet) serve(t *testing.T) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "farm.sock")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	archfarmv1.RegisterFleetServiceServer(server, f)
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return "unix://" + socket
}

var since = time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)

func farmOfTwo() *fleet {
	return &fleet{workers: []*archfarmv1.Worker{
		{
			Name: "amd-1", Platforms: []string{"linux/amd64", "linux/386"}, Slots: &archfarmv1.Slots{Total: 4, Used: 1}, State: archfarmv1.Worker_STATE_READY,
			Version: "v1.2.3", BuildkitVersion: "v0.34.2", Since: timestamppb.New(since), Machine: "linux/amd64/v3",
			Pool: "cloud", Labels: map[string]string{"zone": "b", "rack": "7"}, Emulated: []string{"linux/arm64"},
			Load: &archfarmv1.Load{
				Cpu: proto.Float64(0.25), MemoryTotalBytes: 16 << 30, MemoryAvailableBytes: 4 << 30, DiskTotalBytes: 100 << 30, DiskFreeBytes: 90 << 30,
				CacheBytes: proto.Uint64(0), IoPressure: proto.Float64(0.5),
			},
		},
		{
			Name: "mac-mini-3", State: archfarmv1.Worker_STATE_UNAVAILABLE, Slots: &archfarmv1.Slots{Total: 2}, BuildkitVersion: "\x1b[2Jv0\n",
			Reason: "buildkitd does not answer\x1b", Since: timestamppb.New(since.Add(time.Hour)), Pool: "office",
		},
	}}
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	root := newRoot(nil)
	root.SetOut(&out)
	root.SetArgs(args)
	if err := root.ExecuteContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestWorkers_AsJSON(t *testing.T) {
	t.Parallel()
	const want = `[
  {
    "name": "amd-1",
    "pool": "cloud",
    "labels": {
      "rack": "7",
      "zone": "b"
    },
    "platforms": [
      "linux/amd64",
      "linux/386"
    ],
    "emulated": [
      "linux/arm64"
    ],
    "slots": {
      "total": 4,
      "used": 1
    },
    "state": "ready",
    "load": {
      "cpu": 0.25,
      "memoryTotalBytes": 17179869184,
      "memoryAvailableBytes": 4294967296,
      "diskTotalBytes": 107374182400,
      "diskFreeBytes": 96636764160,
      "cacheBytes": 0,
      "ioPressure": 0.5
    },
    "version": "v1.2.3",
    "buildkit": "v0.34.2",
    "machine": "linux/amd64/v3",
    "since": "2026-02-03T04:05:06Z"
  },
  {
    "name": "mac-mini-3",
    "pool": "office",
    "labels": {},
    "platforms": [],
    "emulated": [],
    "slots": {
      "total": 2,
      "used": 0
    },
    "state": "unavailable",
    "reason": "buildkitd does not answer\u001b",
    "version": "",
    "buildkit": "\u001b[2Jv0\n",
    "machine": "",
    "since": "2026-02-03T05:05:06Z"
  }
]
`
	if got := run(t, "workers", "--farm", farmOfTwo().serve(t), "-o", "json"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := run(t, "workers", "--farm", (&fleet{}).serve(t), "--output", "json"); got != "[]\n" {
		t.Errorf("of an empty farm: %q", got)
	}
}

func TestWorkers_AsATable(t *testing.T) {
	t.Parallel()
	for output, want := range map[string]string{
		"table": `NAME         POOL     PLATFORMS               SLOTS   STATE         AGE      REASON
amd-1        cloud    linux/amd64,linux/386   1/4     ready         2h0m0s   
mac-mini-3   office   -                       0/2     unavailable   1h0m0s   buildkitd does not answer?
`,
		"wide": `NAME         POOL     PLATFORMS               SLOTS   STATE         AGE      EMULATED      LABELS          CPU   MEMORY            DISK               MACHINE          BUILDKIT   VERSION   REASON
amd-1        cloud    linux/amd64,linux/386   1/4     ready         2h0m0s   linux/arm64   rack=7,zone=b   25%   75% of 16.0 GiB   10% of 100.0 GiB   linux/amd64/v3   v0.34.2    v1.2.3    
mac-mini-3   office   -                       0/2     unavailable   1h0m0s   -             -               -     -                 -                  -                ?[2Jv0?    -         buildkitd does not answer?
`,
	} {
		var out bytes.Buffer
		if err := printWorkers(&out, output, farmOfTwo().workers, since.Add(2*time.Hour)); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Errorf("%s: got\n%s\nwant\n%s", output, out.String(), want)
		}
	}
	if got := run(t, "workers", "--farm", farmOfTwo().serve(t)); !strings.HasPrefix(got, "NAME") || strings.Count(got, "\n") != 3 {
		t.Errorf("by default:\n%s", got)
	}
}

func TestWorkers_Filtered(t *testing.T) {
	t.Parallel()
	farm := farmOfTwo().serve(t)
	for args, want := range map[string]string{
		"--pool office": "mac-mini-3", "--pool office --pool cloud": "amd-1 mac-mini-3", "--pool nowhere": "",
		"--platform linux/386": "amd-1", "--platform amd64": "amd-1", "--platform x86_64 --platform 386": "amd-1", "--platform linux/arm64": "",
		"--state ready": "amd-1", "--state ready --state unavailable": "amd-1 mac-mini-3", "--state cordoned": "",
		"--label zone=b": "amd-1", "--label zone": "amd-1", "--label zone=": "", "--label zone=b --label rack=8": "", "--pool cloud --state unavailable": "",
	} {
		var names []string
		for _, w := range decoded[[]workerJSON](t, run(t, append([]string{"workers", "--farm", farm, "-o", "json"}, strings.Fields(args)...)...)) {
			names = append(names, w.Name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s: got %q, want %q", args, got, want)
		}
	}
}

// decoded reads what --output json prints.
func decoded[T any](t *testing.T, text string) (value T) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &value); err != nil {
		t.Fatal(err)
	}
	return value
}

func TestWorkers_CommandLinesThatMakeNoSense(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"workers --output xml": "table, wide or json", "workers --platform a/b/c/d": "a/b/c/d", "workers --state asleep": "ready, draining, unavailable, cordoned",
		"drain": "the workers' names", "cordon": "the workers' names", "uncordon": "the workers' names",
		"drain a --timeout 3s": "--wait", "drain a --wait --timeout -3s": "--timeout", "queue now": "takes no argument", "queue -o wide": "table or json",
		"explain": "one argument", "explain a b": "one argument", "explain some-build --pool x": "--pool", "uncordon a --reason x": "--reason",
	} {
		root := newRoot(nil)
		root.SetOut(io.Discard)
		root.SetArgs(strings.Fields(line))
		err := root.ExecuteContext(t.Context())
		if err == nil || !strings.Contains(err.Error(), want) || exitCode(err) != exitUsage {
			t.Errorf("%s: %v", line, err)
		}
	}
}

func TestChange_TellsOfEachWorker(t *testing.T) {
	t.Parallel()
	f := farmOfTwo()
	farm := f.serve(t)
	if got := run(t, "drain", "--farm", farm, "amd-1", "mac-mini-3", "amd-1", "--reason", "a new disk"); got != "amd-1: draining, 1 attempt still runs\nmac-mini-3: draining, nothing runs there\n" {
		t.Errorf("drain: %q", got)
	}
	if got := run(t, "cordon", "--farm", farm, "amd-1", "--reason", "slow"); got != "amd-1: cordoned, 1 attempt still runs\n" {
		t.Errorf("cordon: %q", got)
	}
	if got := run(t, "uncordon", "--farm", farm, "amd-1"); got != "amd-1: ready, 1 attempt still runs\n" {
		t.Errorf("uncordon: %q", got)
	}
	if got, want := strings.Join(f.orders, ", "), "amd-1 ACTION_DRAIN a new disk, mac-mini-3 ACTION_DRAIN a new disk, amd-1 ACTION_CORDON slow, amd-1 ACTION_UNCORDON "; got != want {
		t.Errorf("the farm was told %q, want %q", got, want)
	}
	var out bytes.Buffer
	root := newRoot(nil)
	root.SetOut(&out)
	root.SetArgs([]string{"drain", "--farm", farm, "--wait", "nobody", "mac-mini-3"})
	err := root.ExecuteContext(t.Context())
	if status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "drain nobody at unix://") || exitCode(err) != exitError || out.String() != "mac-mini-3: draining, nothing runs there\nmac-mini-3: drained\n" {
		t.Errorf("one that is not there, and one that is: %v, %q", err, out.String())
	}
}

func TestChange_CompletesWorkersNames(t *testing.T) {
	t.Parallel()
	farm := farmOfTwo().serve(t)
	for _, command := range []string{"drain", "cordon", "uncordon"} {
		if got := run(t, "__complete", command, "--farm", farm, "amd-1", ""); !strings.HasPrefix(got, "mac-mini-3\tunavailable, 0 of 2 slots used\n:4\n") {
			t.Errorf("%s: %q", command, got)
		}
	}
}

// watching runs a drainWatch over what a farm answers, second by second; the last
// answer stays.
func watching(t *testing.T, timeout time.Duration, answers ...any) (string, error) {
	t.Helper()
	var out bytes.Buffer
	var err error
	synctest.Test(t, func(t *testing.T) {
		d := &drainWatch{out: &out, waiting: []string{"a", "b"}, told: map[string]uint32{}, timeout: timeout, list: func(context.Context) ([]*archfarmv1.Worker, error) {
			now := answers[0]
			if len(answers) > 1 {
				answers = answers[1:]
			}
			if err, bad := now.(error); bad {
				return nil, err
			}
			return now.([]*archfarmv1.Worker), nil
		}}
		err = d.run(t.Context())
	})
	return out.String(), err
}

// busy is workers a, b, … with so many slots used: those of -1 are not attached, and
// those of -2 ready.
func busy(used ...int) (out []*archfarmv1.Worker) {
	for i, n := range used {
		w := &archfarmv1.Worker{Name: string(rune('a' + i)), State: archfarmv1.Worker_STATE_DRAINING, Slots: &archfarmv1.Slots{Total: 9, Used: uint32(max(n, 0))}}
		if n == -2 {
			w.State = archfarmv1.Worker_STATE_READY
		}
		if n != -1 {
			out = append(out, w)
		}
	}
	return out
}

func TestDrainWatch(t *testing.T) {
	t.Parallel()
	restarting := status.Error(codes.Unavailable, "restarting")
	for name, c := range map[string]struct {
		timeout time.Duration
		answers []any
		want    string // printed
		err     string
		code    int
	}{
		"one after the other": {0, []any{busy(2, 1), busy(2, 0), busy(1, 0), busy(1, 5), busy(0, 0)},
			"a: 2 attempts still run\nb: 1 attempt still runs\nb: drained\na: 1 attempt still runs\na: drained\n", "", 0},
		"at once":                   {0, []any{busy(0, 0)}, "a: drained\nb: drained\n", "", 0},
		"too slow":                  {5 * time.Second, []any{busy(3, 0)}, "a: 3 attempts still run\nb: drained\n", "after 5s: a (3 attempts still run); draining goes on", exitTimeout},
		"the farm notices it first": {1500 * time.Millisecond, []any{busy(1, 0), status.Error(codes.DeadlineExceeded, "late")}, "a: 1 attempt still runs\nb: drained\n", "after 1.5s: a (1 attempt still runs); draining goes on", exitTimeout},
		"in the last moment":        {3500 * time.Millisecond, []any{busy(1, 0), busy(1, 0), busy(1, 0), busy(0, 0)}, "a: 1 attempt still runs\nb: drained\na: drained\n", "", 0},
		"uncordoned by another":     {0, []any{busy(2, 1), busy(-2, 1), busy(-2, 0)}, "a: 2 attempts still run\nb: 1 attempt still runs\nb: drained\n", "worker a is draining no more", exitError},
		"a coordinator's restart":   {0, []any{busy(2, 0), restarting, restarting, busy(-1), busy(-1), busy(1), busy(0)}, "a: 2 attempts still run\nb: drained\na: 1 attempt still runs\na: drained\n", "", 0},
		"a coordinator's end":       {0, []any{busy(2, 0), restarting}, "a: 2 attempts still run\nb: drained\n", "restarting", exitError},
		"a worker's end":            {0, []any{busy(2, 1), busy(-1, 0)}, "a: 2 attempts still run\nb: 1 attempt still runs\nb: drained\n", "worker a has left the farm", exitError},
		"not allowed to look":       {0, []any{status.Error(codes.PermissionDenied, "go away")}, "", "go away", exitError},
		"a farm that answers never": {time.Minute, []any{busy(2, 2), busy(-1, 2)}, "a: 2 attempts still run\nb: 2 attempts still run\n", "after 1m0s: b (2 attempts still run)", exitTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := watching(t, c.timeout, c.answers...)
			if got != c.want {
				t.Errorf("printed\n%s\nwant\n%s", got, c.want)
			}
			if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err) || exitCode(err) != c.code) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestQueue(t *testing.T) {
	t.Parallel()
	f := &fleet{queue: []*archfarmv1.QueuedLeg{
		{Build: "b1", Platform: "linux/arm64", Pools: []string{"office", "cloud"}, Tenant: "acme", Since: timestamppb.New(since), Ahead: 3, Reason: "linux/arm64: 2 full\x1b", Estimate: durationpb.New(95400 * time.Millisecond)},
		{Build: "b2", Platform: "any", Since: timestamppb.New(since.Add(time.Minute))},
	}}
	const want = `BUILD   PLATFORM      POOLS          TENANT   WAITING   AHEAD   STARTS IN     REASON
b1      linux/arm64   office,cloud   acme     2m0s      3       about 1m35s   linux/arm64: 2 full?
b2      any           any            -        1m0s      0       -             
`
	var out bytes.Buffer
	if err := printQueue(&out, "table", f.queue, since.Add(2*time.Minute)); err != nil || out.String() != want {
		t.Errorf("%v, got\n%s\nwant\n%s", err, out.String(), want)
	}
	list := decoded[[]queuedJSON](t, run(t, "queue", "--farm", f.serve(t), "-o", "json"))
	if len(list) != 2 || list[0].Build != "b1" || list[0].Ahead != 3 || list[0].Estimate != 95.4 || list[1].Estimate != 0 || !list[0].Since.Equal(since) || list[1].Pools == nil {
		t.Errorf("got %+v", list)
	}
	if got := run(t, "queue", "--farm", (&fleet{}).serve(t), "-o", "json"); got != "[]\n" {
		t.Errorf("of an empty queue: %q", got)
	}
}

func TestExplain(t *testing.T) {
	t.Parallel()
	f := &fleet{explanation: []*archfarmv1.LegExplanation{
		{Platform: "linux/arm64", Summary: "waiting 12 s: mac-2 is warm", Workers: []*archfarmv1.WorkerVerdict{{Worker: "amd-1", Reason: "runs linux/amd64 only"}, {Worker: "mac-2", Eligible: true, Reason: "full"}}},
		{Platform: "linux/amd64", Worker: "amd-1", Summary: "runs on amd-1"},
	}}
	farm := f.serve(t)
	const want = `linux/arm64: waiting 12 s: mac-2 is warm
  WORKER   ELIGIBLE   REASON
  amd-1    no         runs linux/amd64 only
  mac-2    yes        full

linux/amd64: runs on amd-1
`
	if got := run(t, "explain", "--farm", farm, "x3v0zl2kq5n8"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	list := decoded[[]explanationJSON](t, run(t, "explain", "--farm", farm, "linux/aarch64", "--pool", "office", "-o", "json"))
	if len(list) != 2 || !list[0].Workers[1].Eligible || list[1].Worker != "amd-1" || list[1].Workers == nil {
		t.Errorf("got %+v", list)
	}
	run(t, "explain", "--farm", farm, "aarch64")
	run(t, "explain", "--farm", farm, "windows/amd64")
	if got := strings.Join(f.questions, ", "); got != "build x3v0zl2kq5n8 , platform linux/arm64 office, platform linux/arm64 , platform windows/amd64 " {
		t.Errorf("the farm was asked %s", got)
	}
	if got := run(t, "explain", "--farm", (&fleet{}).serve(t), "some-build"); !strings.Contains(got, "no legs yet") {
		t.Errorf("of a build without legs: %q", got)
	}
}
