package main

import (
	"bytes"
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// fleet answers as a coordinator does.
type fleet struct {
	archfarmv1.UnimplementedFleetServiceServer
	workers []*archfarmv1.Worker
}

func (f *fleet) ListWorkers(context.Context, *archfarmv1.ListWorkersRequest) (*archfarmv1.ListWorkersResponse, error) {
	return &archfarmv1.ListWorkersResponse{Workers: f.workers}, nil
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
		},
		{
			Name: "mac-mini-3", State: archfarmv1.Worker_STATE_UNAVAILABLE, Slots: &archfarmv1.Slots{Total: 2}, BuildkitVersion: "\x1b[2Jv0\n",
			Reason: "buildkitd does not answer", Since: timestamppb.New(since.Add(time.Hour)),
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
    "platforms": [
      "linux/amd64",
      "linux/386"
    ],
    "slots": {
      "total": 4,
      "used": 1
    },
    "state": "ready",
    "version": "v1.2.3",
    "buildkit": "v0.34.2",
    "machine": "linux/amd64/v3",
    "since": "2026-02-03T04:05:06Z"
  },
  {
    "name": "mac-mini-3",
    "platforms": [],
    "slots": {
      "total": 2,
      "used": 0
    },
    "state": "unavailable",
    "reason": "buildkitd does not answer",
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
	const want = `NAME         STATE         SLOTS   PLATFORMS               BUILDKIT   SINCE
amd-1        ready         1/4     linux/amd64,linux/386   v0.34.2    2h0m0s
mac-mini-3   unavailable   0/2                             ?[2Jv0?    1h0m0s
`
	var out bytes.Buffer
	if err := printWorkers(&out, "table", farmOfTwo().workers, since.Add(2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
	if got := run(t, "workers", "--farm", farmOfTwo().serve(t)); !strings.HasPrefix(got, "NAME") || strings.Count(got, "\n") != 3 {
		t.Errorf("by default:\n%s", got)
	}
}
