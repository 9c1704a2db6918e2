package dispatch_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// connection makes what comes with ctx come over a connection of its own.
func connection(ctx context.Context, t *testing.T) context.Context {
	t.Helper()
	near, far := net.Pipe()
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	_, info, err := dispatch.Credentials(insecure.NewCredentials()).Clone().ServerHandshake(near)
	if err != nil {
		t.Fatal(err)
	}
	return peer.NewContext(ctx, &peer.Peer{AuthInfo: info})
}

// call runs beside the test.
type call struct {
	done chan struct{}
	err  error
}

func aside(f func() error) *call {
	c := &call{done: make(chan struct{})}
	go func() {
		defer close(c.done)
		c.err = f()
	}()
	return c
}

// over tells, once everybody has had all the time of the world, whether the call has ended.
func (c *call) over() bool {
	time.Sleep(5 * time.Second)
	synctest.Wait()
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *call) ended(t *testing.T) error {
	t.Helper()
	if !c.over() {
		t.Fatal("it still waits")
	}
	return c.err
}

func (c *call) waits(t *testing.T) {
	t.Helper()
	if c.over() {
		t.Fatalf("it has not waited: %v", c.err)
	}
}

// failedStep is a worker's error of a step that can be looked into.
func failedStep(input, mount string) error {
	return grpcerrors.ToGRPC(context.Background(), errdefs.WithSolveError(errors.New("exit code: 1"), nil, []string{input}, []string{mount, ""}))
}

// solving starts a build's frontend.
func (f *farm) solving(ctx context.Context, t *testing.T, ref string) (b *dispatch.Build, solve *call, end func(error)) {
	t.Helper()
	b, end = f.begin(ctx, t, request(ref, amd64, ""))
	return b, aside(func() error { _, err := b.Solve(ctx, frontend(amd64)); return err }), end
}

func TestLending_AQueuedBuildOfTheSameConnectionGetsTheSlotOfOneThatWaits(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		bake := connection(t.Context(), t)
		_, first, endFirst := f.solving(bake, t, "first")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		_, other, endOther := f.solving(connection(t.Context(), t), t, "another client's")
		_, second, endSecond := f.solving(bake, t, "second")
		if err := second.ended(t); err != nil {
			t.Fatal(err)
		}
		other.waits(t)
		if d.Used() != 1 || d.Open() != 2 {
			t.Errorf("%d slots used, %d connections", d.Used(), d.Open())
		}
		endSecond(nil)
		other.waits(t)
		endFirst(nil)
		if err := other.ended(t); err != nil {
			t.Error(err)
		}
		endOther(nil)
		f.idle(t, d)
	})
}

func TestLending_ABuildOfUnknownOriginLendsNothing(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		_, first, endFirst := f.solving(t.Context(), t, "first")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		_, second, endSecond := f.solving(t.Context(), t, "second")
		second.waits(t)
		endFirst(nil)
		if err := second.ended(t); err != nil {
			t.Error(err)
		}
		endSecond(nil)
		f.idle(t, d)
	})
}

// TestLending_NotWhileTheHostWorks has the host do each kind of work, until told to stop.
func TestLending_NotWhileTheHostWorks(t *testing.T) {
	for name, test := range map[string]struct {
		hold func(d *daemon, wait func())
		work func(ctx context.Context, b *dispatch.Build) error
	}{
		"frontend": {
			func(d *daemon, wait func()) {
				d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { wait(); return d.reference(nil), nil }
			},
			func(ctx context.Context, b *dispatch.Build) error {
				_, err := b.Solve(ctx, frontend(amd64))
				return err
			},
		},
		"export": {
			func(d *daemon, wait func()) { d.Export = func(context.Context) error { wait(); return nil } },
			func(ctx context.Context, b *dispatch.Build) error {
				resp, err := b.Solve(ctx, frontend(amd64))
				if err == nil {
					err = b.Return(&gwpb.ReturnRequest{Result: resp.GetResult()})
				}
				if err == nil {
					_, err = b.Export(ctx, resp.GetResult())
				}
				return err
			},
		},
		"export of a direct build": {
			func(d *daemon, wait func()) { d.Export = func(context.Context) error { wait(); return nil } },
			func(ctx context.Context, b *dispatch.Build) error {
				result, err := b.Result(ctx)
				if err == nil {
					_, err = b.Export(ctx, result)
				}
				return err
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				d := f.worker(t, "amd", 1, amd64)
				var once sync.Once
				stop := make(chan struct{})
				test.hold(d, func() { once.Do(func() { <-stop }) })
				bake := connection(t.Context(), t)
				req := request("first", amd64, "")
				if strings.Contains(name, "direct") {
					req.Frontend = "dockerfile.v0"
				}
				b, end := f.begin(bake, t, req)
				first := aside(func() error { return test.work(bake, b) })
				synctest.Wait()
				_, second, endSecond := f.solving(bake, t, "second")
				second.waits(t)
				close(stop)
				if err := first.ended(t); err != nil {
					t.Error(err)
				}
				ended := aside(func() error { end(nil); return nil })
				if err := second.ended(t); err != nil {
					t.Error(err)
				}
				endSecond(nil)
				_ = ended.ended(t)
				f.idle(t, d)
			})
		})
	}
}

func TestLending_NotWhileTheClientMayJustBeOnItsWay(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) {
			time.Sleep(time.Second)
			return d.reference(nil), nil
		}
		bake := connection(t.Context(), t)
		first, solve, endFirst := f.solving(bake, t, "first")
		synctest.Wait()
		_, second, endSecond := f.solving(bake, t, "second")
		<-solve.done
		time.Sleep(150 * time.Millisecond)
		if err := first.Return(&gwpb.ReturnRequest{Result: &gwpb.Result{}}); err != nil {
			t.Error(err)
		}
		second.waits(t)
		endFirst(nil)
		if err := errors.Join(solve.err, second.ended(t)); err != nil {
			t.Error(err)
		}
		endSecond(nil)
		f.idle(t, d)
	})
}

func TestLending_OneGuestAtATimeWorks(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		bake := connection(t.Context(), t)
		_, first, endFirst := f.solving(bake, t, "first")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		stop := make(chan struct{})
		d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { <-stop; return d.reference(nil), nil }
		_, second, endSecond := f.solving(bake, t, "second")
		second.waits(t)
		_, third, endThird := f.solving(bake, t, "third")
		third.waits(t)
		if n := len(d.attempts()); n != 2 {
			t.Errorf("%d attempts", n)
		}
		stop <- struct{}{}
		if err := second.ended(t); err != nil {
			t.Error(err)
		}
		close(stop)
		if err := third.ended(t); err != nil {
			t.Error(err)
		}
		endThird(nil)
		endSecond(nil)
		endFirst(nil)
		f.idle(t, d)
	})
}

func TestLending_AHostThatEndsIsAnsweredAndItsSlotIsItsGuests(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		bake := connection(t.Context(), t)
		host, first, endHost := f.solving(bake, t, "host")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		guest, second, endGuest := f.solving(bake, t, "guest")
		if err := second.ended(t); err != nil {
			t.Fatal(err)
		}
		told := aside(func() error {
			return host.Progress.Follow(t.Context(), func(*controlapi.StatusResponse) error { return nil })
		})
		must(host.Export(bake, &gwpb.Result{}))(t)
		ended := aside(func() error { endHost(nil); return nil })
		if err := told.ended(t); err != nil {
			t.Errorf("the host's progress: %v", err)
		}
		ended.waits(t)
		if used := f.Scheduler.Snapshot()[0].Used; used != 1 || d.Used() != 1 {
			t.Errorf("the scheduler counts %d slots, the agent %d", used, d.Used())
		}
		if _, err := guest.Solve(bake, frontend(amd64)); err != nil {
			t.Errorf("the guest: %v", err)
		}
		endGuest(nil)
		if err := ended.ended(t); err != nil {
			t.Error(err)
		}
		f.idle(t, d)
	})
}

func TestLending_AGuestThatIsGivenUpWhileItWaitsHoldsNothing(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		bake := connection(t.Context(), t)
		for _, after := range []time.Duration{time.Millisecond, 200 * time.Millisecond} { // before, and when, the slot would be lent
			_, first, endFirst := f.solving(bake, t, fmt.Sprint("first ", after))
			synctest.Wait()
			ctx, cancel := context.WithCancel(bake)
			b, second, endSecond := f.solving(ctx, t, fmt.Sprint("second ", after))
			time.Sleep(after)
			cancel()
			if err := second.ended(t); after < 100*time.Millisecond && err == nil {
				t.Error("it ended well")
			}
			if _, err := b.Result(t.Context()); err == nil {
				t.Error("the build ended well")
			}
			endSecond(nil)
			endFirst(nil)
			if err := first.ended(t); err != nil {
				t.Error(err)
			}
			f.idle(t, d)
		}
	})
}

func TestLending_NotTheSlotOfALostWorker(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		d := f.worker(t, "amd", 1, amd64)
		bake := connection(t.Context(), t)
		_, first, endFirst := f.solving(bake, t, "first")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		d.Cut()
		synctest.Wait()
		d.Occupy(1) // what was on it may still run
		_, second, endSecond := f.solving(bake, t, "second")
		second.waits(t)
		endFirst(nil)
		d.Occupy(0)
		if err := second.ended(t); err != nil {
			t.Error(err)
		}
		endSecond(nil)
		f.idle(t, d)
	})
}

// on is a definition that builds on what another one makes, as what clients pass on does.
func on(t *testing.T, step string) *pb.Definition {
	t.Helper()
	op, err := (&pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: step}}}).MarshalVT()
	if err != nil {
		t.Fatal(err)
	}
	head, err := (&pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(op).String()}}}).MarshalVT()
	if err != nil {
		t.Fatal(err)
	}
	return &pb.Definition{Def: [][]byte{op, head}}
}

// linked begins a build and the frontend of one on top of it, and tells where they ran.
func linked(ctx context.Context, t *testing.T, f *farm, name string, between func(base string), inputs func(*controlapi.SolveRequest, *gwpb.SolveRequest)) (base, top string) {
	t.Helper()
	b, endBase := f.begin(ctx, t, request("base "+name, amd64, ""))
	must(b.Solve(ctx, frontend(amd64)))(t)
	base = b.Legs()[0].Worker
	between(base)
	req, call := request("top "+name, amd64, ""), frontend(amd64)
	req.FrontendAttrs["filename"] = name // a project of its own: where nothing else decides, it is placed where there is most room
	inputs(req, call)
	b, endTop := f.begin(ctx, t, req)
	must(b.Solve(ctx, call))(t)
	top = b.Legs()[0].Worker
	endTop(nil)
	endBase(nil)
	return base, top
}

// linkable attaches two workers whose frontends answer with the definition.
func linkable(t *testing.T, f *farm, def *pb.Definition) map[string]*daemon {
	t.Helper()
	workers := map[string]*daemon{}
	for _, name := range []string{"a", "b"} {
		d := f.worker(t, name, 3, amd64)
		d.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { return d.reference(def), nil }
		workers[name] = d
	}
	return workers
}

func TestLinking_ABuildOnTheResultOfAnotherRunsOnItsWorker(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		def, other := on(t, "docker-image://base"), on(t, "docker-image://other")
		workers := linkable(t, f, def)
		inControl := func(def *pb.Definition) func(*controlapi.SolveRequest, *gwpb.SolveRequest) {
			return func(req *controlapi.SolveRequest, _ *gwpb.SolveRequest) {
				req.FrontendInputs = map[string]*pb.Definition{"base": def}
			}
		}
		inCall := func(_ *controlapi.SolveRequest, call *gwpb.SolveRequest) {
			call.FrontendInputs = map[string]*pb.Definition{"x": other, "base": def}
		}
		nothing := func(string) {}
		bake := connection(t.Context(), t)
		if base, top := linked(bake, t, f, "by the request", nothing, inControl(def)); top != base {
			t.Errorf("inputs in the request: %s on %s", top, base)
		}
		if base, top := linked(bake, t, f, "by the call", nothing, inCall); top != base {
			t.Errorf("inputs in the call: %s on %s", top, base)
		}
		if base, top := linked(bake, t, f, "unrelated", nothing, inControl(other)); top == base {
			t.Error("another input: on the same worker")
		}
		if base, top := linked(bake, t, f, "drained", func(base string) {
			workers[base].Become(archfarmv1.Worker_STATE_DRAINING)
			synctest.Wait()
		}, inControl(def)); top == base {
			t.Error("a draining worker was given more")
		}
	})
}

func TestLinking_ABuildWhoseWorkerLeavesGoesElsewhere(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		def := on(t, "docker-image://base")
		workers := linkable(t, f, def)
		bake := connection(t.Context(), t)
		b, endBase := f.begin(bake, t, request("base", amd64, ""))
		must(b.Solve(bake, frontend(amd64)))(t)
		base := workers[b.Legs()[0].Worker]
		hold := aside(func() error { // its slot is not lent
			base.Frontend = func(ctx context.Context, _ *gwpb.SolveRequest) (*gwpb.Result, error) {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			_, err := b.Solve(bake, frontend(amd64))
			return err
		})
		base.Occupy(2)
		synctest.Wait()
		req := request("top", amd64, "")
		req.FrontendInputs = map[string]*pb.Definition{"base": def}
		top, endTop := f.begin(bake, t, req)
		solve := aside(func() error { _, err := top.Solve(bake, frontend(amd64)); return err })
		solve.waits(t)
		base.Kill()
		time.Sleep(2 * f.Scheduler.Grace)
		if err := solve.ended(t); err != nil {
			t.Fatal(err)
		}
		if got := top.Legs()[0].Worker; workers[got] == base {
			t.Errorf("on %s", got)
		}
		if err := hold.ended(t); err == nil {
			t.Error("the base build was not told")
		}
		endTop(nil)
		endBase(nil)
	})
}

func TestFailedStep_ItsMountsAreFoundForContainers(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "amd", 1, amd64)
		arm := f.worker(t, "arm", 1, arm64)
		b, _ := f.begin(t.Context(), t, request("b", both, ""))
		arm.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) {
			return nil, failedStep("input-1", "mount-1")
		}
		if _, err := b.Solve(t.Context(), frontend(both)); err == nil || !strings.Contains(err.Error(), "exit code: 1") {
			t.Fatalf("got %v", err)
		}
		for _, id := range []string{"input-1", "mount-1"} {
			got := must(b.ReadFile(t.Context(), &gwpb.ReadFileRequest{Ref: id, FilePath: "/x"}))(t)
			if string(got.GetData()) != "arm:"+id+":/x" {
				t.Errorf("%s: read %q", id, got.GetData())
			}
		}
	})
}

// scenario is builds that build on each other, as a client runs the targets of a bake.
type scenario struct {
	slots     int
	platforms string
	builds    []target
}

type target struct {
	client int
	on     []int // earlier builds of the same client
}

func drawScenario(t *rapid.T) scenario {
	s := scenario{slots: rapid.IntRange(1, 2).Draw(t, "slots"), platforms: rapid.SampledFrom([]string{amd64, both, amd64 + "," + i386, both + "," + i386}).Draw(t, "platforms")}
	for i := range rapid.IntRange(1, 7).Draw(t, "builds") {
		b := target{client: rapid.IntRange(0, 1).Draw(t, "client")}
		for j := range i {
			if s.builds[j].client == b.client && rapid.Bool().Draw(t, "linked") {
				b.on = append(b.on, j)
			}
		}
		s.builds = append(s.builds, b)
	}
	return s
}

// TestLending_NoChainOfBuildsWaitsForeverNorDoMoreWorkThanThereAreSlots plays
// scenarios in which a build lets go of its slot only after all that build on it.
func TestLending_NoChainOfBuildsWaitsForeverNorDoMoreWorkThanThereAreSlots(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		s := drawScenario(rt)
		synctest.Test(t, func(t *testing.T) { s.play(t, newFarm(t)) })
	})
}

func (s scenario) play(t *testing.T, f *farm) {
	t.Helper()
	daemons := []*daemon{f.worker(t, "amd", s.slots, amd64, i386), f.worker(t, "arm", s.slots, arm64)}
	for _, d := range daemons {
		var mu sync.Mutex
		working := map[string]int{} // by the build; its legs may share a slot
		count := func(of *gwpb.SolveRequest, by int) int {
			mu.Lock()
			defer mu.Unlock()
			build := of.GetFrontendOpt()["build-arg:build"]
			if working[build] += by; working[build] == 0 {
				delete(working, build)
			}
			return len(working)
		}
		d.Frontend = func(_ context.Context, req *gwpb.SolveRequest) (*gwpb.Result, error) {
			defer count(req, -1)
			if n := count(req, 1); n > s.slots || d.Used() > s.slots {
				t.Errorf("%+v: the frontends of %d builds run in %d slots, %d are used", s, n, s.slots, d.Used())
			}
			time.Sleep(time.Second)
			return d.reference(nil), nil
		}
	}
	clients := []context.Context{connection(t.Context(), t), connection(t.Context(), t)}
	solved, over := make([]chan struct{}, len(s.builds)), make([]chan struct{}, len(s.builds))
	for i := range s.builds {
		solved[i], over[i] = make(chan struct{}), make(chan struct{})
	}
	var calls []*call
	for i, b := range s.builds {
		calls = append(calls, aside(func() error {
			ctx := clients[b.client]
			for _, j := range b.on {
				<-solved[j]
			}
			running, err := f.Begin(ctx, request(fmt.Sprint(i), s.platforms, ""))
			if err != nil {
				return err
			}
			req := frontend(s.platforms)
			req.FrontendOpt["build-arg:build"] = fmt.Sprint(i)
			resp, err := running.Solve(ctx, req)
			close(solved[i])
			for j, later := range s.builds {
				for _, k := range later.on {
					if k == i && err == nil {
						<-over[j]
					}
				}
			}
			if err == nil {
				_, err = running.Export(ctx, resp.GetResult())
			}
			close(over[i])
			running.End(err)
			return err
		}))
	}
	time.Sleep(10 * time.Minute)
	for i, c := range calls {
		if !c.over() {
			t.Fatalf("%+v: build %d waits for ever", s, i)
		}
		if c.err != nil {
			t.Errorf("%+v: build %d: %v", s, i, c.err)
		}
	}
	f.idle(t, daemons...)
}
