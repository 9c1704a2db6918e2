package e2e_test

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/identity"
	"github.com/tonistiigi/fsutil"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	// chattySteps print chattyBytes each: as much as buildkitd passes on at once of one step.
	chattySteps = 8
	chattyBytes = 180 << 10
)

// chatty is a build that prints more than HTTP/2 sends without the receiver's consent.
func (r rig) chatty(t *testing.T, ref string) client.SolveOpt {
	t.Helper()
	dockerfile := "FROM scratch\nCOPY busybox /bin/busybox\n"
	for range chattySteps {
		dockerfile += farmtest.Run("/bin/busybox yes 'this step has much to say' | /bin/busybox head -c 184320") + "\n"
	}
	dir, err := fsutil.NewFS(r.context(t, map[string]string{"Dockerfile": strings.ReplaceAll(dockerfile, "RUN [", "RUN --network=none [")}))
	if err != nil {
		t.Fatal(err)
	}
	return client.SolveOpt{
		Ref: ref, Frontend: "dockerfile.v0", FrontendAttrs: map[string]string{"platform": "linux/amd64", "no-cache": ""},
		LocalMounts: map[string]fsutil.FS{"context": dir, "dockerfile": dir},
	}
}

// TestDoor_AFollowerThatReadsAByteASecondHoldsUpNobody follows a build's progress by a line as slow as that.
func TestDoor_AFollowerThatReadsAByteASecondHoldsUpNobody(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 2})
	r.buildsAMD64(t, "before")
	before := resident(t, r.Farm.Coordinator)
	ref, line := identity.NewID(), newNarrow(t, strings.TrimPrefix(r.Addr, "tcp://"))
	slow := follow(t, "tcp://"+line.addr, ref, line.narrow)
	brisk := follow(t, r.Addr, ref, nil)

	start := time.Now()
	if _, err := r.goClient(t, nil, r.chatty(t, ref)); err != nil {
		t.Fatal(err)
	}
	if err := brisk.wait(t, startLimit); err != nil || brisk.logs.Load() < chattySteps*chattyBytes {
		t.Errorf("the other follower got %d bytes of log and %v", brisk.logs.Load(), err)
	}
	t.Logf("built in %v", time.Since(start))
	r.buildsAMD64(t, "beside")
	if grown := resident(t, r.Farm.Coordinator) - before; grown > 64<<20 {
		t.Errorf("the coordinator has grown by %d MiB", grown>>20)
	}
	select {
	case <-slow.done:
		t.Fatalf("the slow follower has ended, so that nothing was tested: %v", slow.err)
	default:
	}
	r.Farm.Coordinator.Signal(syscall.SIGTERM)
	wantEqual(t, "exit code of the coordinator", r.Farm.Coordinator.Wait(t, startLimit), 0)
}

// follower follows a build's progress.
type follower struct {
	logs atomic.Int64 // bytes received so far
	done chan struct{}
	err  error // read after done
}

// follow starts to follow a build, and calls begun after the first message.
func follow(t *testing.T, addr, ref string, begun func()) *follower {
	t.Helper()
	c, err := client.New(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	stream, err := c.ControlClient().Status(t.Context(), &control.StatusRequest{Ref: ref})
	if err != nil {
		t.Fatal(err)
	}
	f := &follower{done: make(chan struct{})}
	go func() { // ends with the stream, at the latest with the test
		defer close(f.done)
		for first := true; ; first = false {
			m, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return
			}
			if f.err = err; err != nil {
				return
			}
			for _, l := range m.GetLogs() {
				f.logs.Add(int64(len(l.GetMsg())))
			}
			if first && begun != nil {
				begun()
			}
		}
	}()
	return f
}

func (f *follower) wait(t *testing.T, limit time.Duration) error {
	t.Helper()
	select {
	case <-f.done:
		return f.err
	case <-time.After(limit):
		t.Fatalf("still following after %v", limit)
		return nil
	}
}

// narrow is a line to an address over which, once it is narrow, a byte a second comes back.
type narrow struct {
	addr   string
	narrow func()
}

func newNarrow(t *testing.T, target string) *narrow {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background()) // until the clean-up
	slow := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			context.AfterFunc(ctx, func() { in.Close(); out.Close() })
			running.Go(func() { defer out.Close(); _, _ = io.Copy(out, in) })
			running.Go(func() { defer in.Close(); trickle(ctx, in, out, slow) })
		}
	})
	t.Cleanup(func() { l.Close(); cancel(); running.Wait() })
	return &narrow{addr: l.Addr().String(), narrow: sync.OnceFunc(func() { close(slow) })}
}

// trickle copies until slow is closed, and from then on a byte a second.
func trickle(ctx context.Context, dst io.Writer, src io.Reader, slow <-chan struct{}) {
	buf := make([]byte, 4<<10)
	for {
		size := len(buf)
		select {
		case <-slow:
			size = 1
			select {
			case <-time.After(time.Second):
			case <-ctx.Done():
				return
			}
		default:
		}
		n, err := src.Read(buf[:size])
		if _, writeErr := dst.Write(buf[:n]); err != nil || writeErr != nil {
			return
		}
	}
}
