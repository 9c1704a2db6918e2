package dispatch_test

import (
	"context"
	"errors"
	"io"
	"testing"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
)

// terminal is a client's ExecProcess stream.
type terminal struct {
	grpc.ServerStream
	ctx  context.Context
	says chan *gwpb.ExecMessage // closed: the client has nothing more to say
	sees chan *gwpb.ExecMessage
}

func newTerminal(ctx context.Context) *terminal {
	return &terminal{ctx: ctx, says: make(chan *gwpb.ExecMessage), sees: make(chan *gwpb.ExecMessage, 100)}
}

func (c *terminal) Context() context.Context { return c.ctx }

func (c *terminal) Recv() (*gwpb.ExecMessage, error) {
	select {
	case m, ok := <-c.says:
		if !ok {
			return nil, io.EOF
		}
		return m, nil
	case <-c.ctx.Done():
		return nil, c.ctx.Err()
	}
}

func (c *terminal) Send(m *gwpb.ExecMessage) error {
	c.sees <- m
	return nil
}

func start(process, container string) *gwpb.ExecMessage {
	return &gwpb.ExecMessage{ProcessID: process, Input: &gwpb.ExecMessage_Init{Init: &gwpb.InitMessage{ContainerID: container}}}
}

// shell answers each message, until there are no more.
func shell(name string) func(gwpb.LLBBridge_ExecProcessServer) error {
	return func(stream gwpb.LLBBridge_ExecProcessServer) error {
		for {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := stream.Send(&gwpb.ExecMessage{ProcessID: m.GetProcessID(), Input: &gwpb.ExecMessage_File{File: &gwpb.FdMessage{Data: []byte(name)}}}); err != nil {
				return err
			}
		}
	}
}

// containers starts one container on each of two workers.
func containers(t *testing.T, f *farm) (b *dispatch.Build, amd, arm *daemon) {
	t.Helper()
	amd, arm = f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
	amd.Exec, arm.Exec = shell("amd"), shell("arm")
	b, _ = f.begin(t.Context(), t, request("b", both, ""))
	must(b.Solve(t.Context(), frontend(both)))(t)
	for id, arch := range map[string]string{"on-amd": "amd64", "on-arm": "arm64"} {
		must(b.NewContainer(t.Context(), &gwpb.NewContainerRequest{ContainerID: id, Platform: &pb.Platform{OS: "linux", Architecture: arch}}))(t)
	}
	return b, amd, arm
}

func TestBuild_ProcessesOfOneStreamRunOnSeveralWorkers(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		b, _, _ := containers(t, f)
		c := newTerminal(t.Context())
		ended := beside(func() error { return b.ExecProcess(c) })
		for process, want := range map[string]string{"1": "amd", "2": "arm"} {
			c.says <- start(process, "on-"+want)
			if got := <-c.sees; got.GetProcessID() != process || string(got.GetFile().GetData()) != want {
				t.Errorf("process %s: %v", process, got)
			}
		}
		close(c.says)
		if err := ended(t); err != nil {
			t.Error(err)
		}
	})
}

func TestBuild_AProcessNobodyStartedEndsTheStream(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		b, amd, _ := containers(t, f)
		amd.Exec = func(stream gwpb.LLBBridge_ExecProcessServer) error { // does not care for the end of its input
			<-stream.Context().Done()
			return nil
		}
		c := newTerminal(t.Context())
		ended := beside(func() error { return b.ExecProcess(c) })
		c.says <- start("1", "on-amd")
		c.says <- &gwpb.ExecMessage{ProcessID: "2"}
		if err := ended(t); status.Code(err) != codes.NotFound {
			t.Errorf("got %v", err)
		}
		for _, m := range []*gwpb.ExecMessage{start("1", "another-build's"), {}} {
			c := newTerminal(t.Context())
			ended := beside(func() error { return b.ExecProcess(c) })
			c.says <- m
			if err := ended(t); status.Code(err) != codes.NotFound {
				t.Errorf("got %v", err)
			}
		}
	})
}

// The client waits for its process to answer and says nothing meanwhile.
func TestBuild_AProcessOnAWorkerThatIsLostEndsTheStream(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		b, _, arm := containers(t, f)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		c := newTerminal(ctx)
		ended := beside(func() error { return b.ExecProcess(c) })
		c.says <- start("1", "on-arm")
		<-c.sees
		arm.Cut()
		legError(t, "the stream", ended(t), arm64, "arm")
	})
}
