package worker

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/gossip"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	ready       = archfarmv1.Worker_STATE_READY
	draining    = archfarmv1.Worker_STATE_DRAINING
	unavailable = archfarmv1.Worker_STATE_UNAVAILABLE
	cordoned    = archfarmv1.Worker_STATE_CORDONED
)

func TestRun_SaysWhatTheWorkerIsAndKeepsReporting(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{
		Name: "amd-1", Slots: 3, BuildKit: b.addr, Version: "v1.2.3",
		Platforms: []string{"linux/arm64/v8", "linux/arm64", "linux/arm/v7"}, Coordinators: []string{c.addr.String()},
	}, hasty)
	a := c.attach(t)
	h := a.hello
	if h.GetName() != "amd-1" || h.GetVersion() != "v1.2.3" || h.GetBuildkitVersion() != buildkitVersion {
		t.Errorf("hello %v", h)
	}
	if want := []string{"linux/arm64", "linux/arm/v7"}; !slices.Equal(h.GetPlatforms(), want) {
		t.Errorf("platforms %q, want %q", h.GetPlatforms(), want)
	}
	if !strings.Contains(h.GetMachine(), "/") || h.GetReport().GetSlots().GetTotal() != 3 || h.GetReport().GetState() != ready {
		t.Errorf("hello %v", h)
	}
	for range 3 { // nothing changes: these are heartbeats
		a.wantReport(ready, 0)
	}
}

func TestRun_CarriesBuildKitsAPIAndASlotLivesAsLongAsItsConnection(t *testing.T) {
	t.Parallel()
	for _, where := range []address.Address{onLoopback(), socketPath(t)} {
		b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, where)
		startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}, Slots: 2}, hasty)
		a := c.attach(t)
		wantInfo(t, a.open("free-of-charge", false))
		a.wantReport(ready, 0)
		conn := a.open("first", true)
		a.wantReport(ready, 1)
		second := a.open("second", true)
		a.wantReport(ready, 2)
		a.ask("third", true)
		a.wantRefused("third", archfarmv1.Refused_CAUSE_NO_SLOT)
		wantInfo(t, conn) // and closes it
		a.wantReport(ready, 1)
		reset(t, second)
		a.wantReport(ready, 0)
	}
}

// reset closes conn as the kernel does for a killed process with unread bytes.
func reset(t *testing.T, conn net.Conn) {
	t.Helper()
	if tcp, ok := conn.(*net.TCPConn); ok {
		if err := tcp.SetLinger(0); err != nil {
			t.Fatal(err)
		}
	}
	conn.Close()
}

func TestRun_ASlotIsFreeWhenBuildkitdDies(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, hasty)
	a := c.attach(t)
	conn := a.open("one", true)
	a.wantReport(ready, 1)
	// gRPC's Stop waits two minutes for a client that has not spoken yet.
	speak(t, conn)
	b.stop()
	first := a.nextReport(0)
	if first.GetState() != unavailable {
		t.Errorf("its slot is free before it is known that buildkitd is gone: %v", first)
	}
	if r := first; !strings.Contains(r.GetReason(), "buildkitd") {
		t.Errorf("reason %q", r.GetReason())
	}
	a.ask("two", true)
	a.wantRefused("two", archfarmv1.Refused_CAUSE_UNAVAILABLE)
	a.ask("three", false)
	if r := a.wantRefused("three", archfarmv1.Refused_CAUSE_UNAVAILABLE); !strings.Contains(r.GetMessage(), "buildkitd") {
		t.Errorf("message %q", r.GetMessage())
	}
	startBuildkitd(t, b.addr)
	a.wantReport(ready, 0)
	wantInfo(t, a.open("four", true))
}

func TestRun_AFrozenBuildkitdIsReported(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, hasty)
	a := c.attach(t)
	conn := a.open("one", true)
	a.wantReport(ready, 1)
	b.frozen.Store(true)
	if r := a.wantReport(unavailable, 1); !strings.Contains(r.GetReason(), "has not answered for 1s") {
		t.Errorf("reason %q", r.GetReason())
	}
	conn.Close() // as the coordinator does then
	a.wantReport(unavailable, 0)
	b.frozen.Store(false)
	a.wantReport(ready, 0)
}

// TestUsual_AFrozenBuildkitdIsReportedWithin10s: a check may begin right before it freezes.
func TestUsual_AFrozenBuildkitdIsReportedWithin10s(t *testing.T) {
	t.Parallel()
	if worst := usual.checkEvery + usual.checkWithin; worst >= 10*time.Second {
		t.Errorf("it may take %s", worst)
	}
}

func TestPatient_LastsAsLongAsItShould(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := patient(t.Context(), 8*time.Second)
		defer stop()
		begun := time.Now()
		<-ctx.Done()
		if took := time.Since(begun); took != 8*time.Second || !errors.Is(context.Cause(ctx), errLate) {
			t.Errorf("ended after %s: %v", took, context.Cause(ctx))
		}
		early, stop := patient(t.Context(), time.Hour)
		stop()
		if errors.Is(context.Cause(early), errLate) {
			t.Error("a patience that was not needed has ended as if it had")
		}
	})
}

func TestRun_CoordinatorsShareTheSlots(t *testing.T) {
	t.Parallel()
	b, c1, c2 := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback()), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c1.addr.String(), c2.addr.String()}}, hasty)
	a1, a2 := c1.attach(t), c2.attach(t)
	conn := a1.open("one", true)
	a2.wantReport(ready, 1)
	a2.ask("two", true)
	a2.wantRefused("two", archfarmv1.Refused_CAUSE_NO_SLOT)
	conn.Close()
	a2.wantReport(ready, 0)
	a2.open("three", true)
	a1.wantReport(ready, 1)
}

func TestRun_WaitsForBuildkitd(t *testing.T) {
	t.Parallel()
	where, c := socketPath(t), startCoordinator(t, onLoopback())
	log := newLog()
	startAgent(t, Config{BuildKit: where, Coordinators: []string{c.addr.String()}, Logger: log.logger()}, hasty)
	log.wait(t, "waiting for buildkitd")
	if len(c.attached) != 0 {
		t.Fatal("attached without a buildkitd")
	}
	startBuildkitd(t, where)
	c.attach(t).wantReport(ready, 0)
}

func TestRun_StopsWhileItWaitsForBuildkitd(t *testing.T) {
	t.Parallel()
	for _, end := range []func(*running){func(r *running) { r.cancel() }, func(r *running) { r.stop() }} {
		log := newLog()
		r := startAgent(t, Config{BuildKit: socketPath(t), Coordinators: []string{"127.0.0.1:1"}, Logger: log.logger()}, hasty)
		log.wait(t, "waiting for buildkitd")
		end(r)
		r.wantEnd(t)
	}
}

func TestRun_DrainingTakesNothingNewAndWaitsForWhatRuns(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	r := startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}, Slots: 2}, hasty)
	a := c.attach(t)
	conn := a.open("one", true)
	r.cancel()
	a.wantReport(draining, 1)
	a.ask("two", true)
	a.wantRefused("two", archfarmv1.Refused_CAUSE_DRAINING)
	wantInfo(t, a.open("three", false)) // what runs may need another connection
	r.wantRunning(t)
	wantInfo(t, conn) // still carried; and closes it
	r.wantEnd(t)
}

func TestRun_AttemptsThatAreCutOffAreAnError(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	for name, test := range map[string]struct {
		timeout time.Duration
		end     func(*running, *attached)
	}{
		"drain timeout": {50 * time.Millisecond, func(r *running, _ *attached) { r.cancel() }},
		"stop while it drains": {time.Hour, func(r *running, a *attached) {
			r.cancel()
			a.wantReport(draining, 1)
			r.wantRunning(t)
			r.stop()
		}},
		"stop without a drain": {time.Hour, func(r *running, _ *attached) { r.stop() }},
	} {
		r := startAgent(t, Config{DrainTimeout: test.timeout, BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, hasty)
		a := c.attach(t)
		conn := a.open("one", true)
		test.end(r, a)
		wantEnd(t, conn)
		conn.Close()
		err := receive(t, r.ended, "the agent's end")
		if err == nil || !strings.Contains(err.Error(), "stopped while 1 attempt was running") {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestRun_AStopThatCutsNothingOffIsNoError(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	r := startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, hasty)
	c.attach(t).wantReport(ready, 0)
	r.stop()
	r.wantEnd(t)
}

func TestRun_ALostStreamComesBackAndItsConnectionsLiveOn(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	patient := hasty
	patient.orphanAfter = time.Hour
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String()}}, patient)
	a := c.attach(t)
	conn := a.open("one", true)
	a.hangUp()
	again := c.attach(t)
	if used := again.hello.GetReport().GetSlots().GetUsed(); used != 1 {
		t.Errorf("hello says %d slots used, want 1", used)
	}
	wantInfo(t, conn)
	again.wantReport(ready, 0)
}

func TestRun_ConnectionsOfAVanishedCoordinatorAreClosed(t *testing.T) {
	t.Parallel()
	b, c, other := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback()), startCoordinator(t, onLoopback())
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{c.addr.String(), other.addr.String()}}, hasty)
	a, witness := c.attach(t), other.attach(t)
	conn := a.open("one", true)
	witness.wantReport(ready, 1)
	c.stop()
	witness.wantReport(ready, 0)
	wantEnd(t, conn)
}

func TestRun_OneCoordinatorUnderTwoNamesIsAttachedOnce(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	_, port, err := net.SplitHostPort(c.addr.Addr)
	if err != nil {
		t.Fatal(err)
	}
	log := newLog()
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{"127.0.0.1:" + port, "[::ffff:127.0.0.1]:" + port}, Logger: log.logger()}, hasty)
	a := c.attach(t)
	log.wait(t, "not attaching")
	a.wantReport(ready, 0)
	if len(c.attached) != 0 {
		t.Error("attached twice")
	}
	a.hangUp()
	c.attach(t).wantReport(ready, 0)
}

func TestRun_ACoordinatorThatDoesNotAnswerIsGivenUpAndTriedAgain(t *testing.T) {
	t.Parallel()
	b := startBuildkitd(t, socketPath(t))
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	log := newLog()
	startAgent(t, Config{BuildKit: b.addr, Coordinators: []string{mute.Addr().String()}, Logger: log.logger()}, hasty)
	for range 2 {
		conn, err := mute.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		wantEnd(t, conn)
	}
	log.wait(t, errNoWelcome.Error())
}

func TestRun_FollowsGossip(t *testing.T) {
	t.Parallel()
	b, c := startBuildkitd(t, socketPath(t)), startCoordinator(t, onLoopback())
	node, err := gossip.Start(t.Context(), gossip.Config{
		Name: "c", Role: gossip.Coordinator, Bind: "127.0.0.1:0", GRPC: c.addr.Addr,
	})
	if err != nil {
		t.Fatal(err)
	}
	log := newLog()
	r := startAgent(t, Config{
		BuildKit: b.addr, Logger: log.logger(),
		Gossip: Gossip{Bind: "127.0.0.1:0", Join: []string{node.Addr()}},
	}, hasty)
	a := c.attach(t)
	wantInfo(t, a.open("one", true))
	if err := node.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	// It left the gossip, but its stream works: it stays attached until that ends.
	for range 2 {
		a.wantReport(ready, 0)
	}
	a.hangUp()
	log.wait(t, "the coordinator left the farm")
	r.cancel()
	r.wantEnd(t)
	if len(c.attached) != 0 {
		t.Error("attached to a coordinator that left")
	}
}

func TestRun_SaysWhatIsWrongWithItsConfiguration(t *testing.T) {
	t.Parallel()
	good := Config{Name: "w", Slots: 1, BuildKit: socketPath(t), Coordinators: []string{"127.0.0.1:1"}}
	for reason, spoil := range map[string]func(*Config){
		"name":                   func(c *Config) { c.Name = "a/b" },
		"slots":                  func(c *Config) { c.Slots = 0 },
		"buildkitd is missing":   func(c *Config) { c.BuildKit = address.Address{} },
		"never be found":         func(c *Config) { c.Coordinators = nil },
		"coordinator: invalid":   func(c *Config) { c.Coordinators = []string{"nowhere"} },
		"coordinators are named": func(c *Config) { c.Coordinators = make([]string, 65) },
		"platform":               func(c *Config) { c.Platforms = []string{"arm64"} },
		"seeds":                  func(c *Config) { c.Gossip.Join = []string{"127.0.0.1:1"} },
		"pool":                   func(c *Config) { c.Pool = "a/b" },
		"label":                  func(c *Config) { c.Labels = map[string]string{"-": ""} },
		"the disk counts":        func(c *Config) { c.DiskHigh, c.DiskLow = 0.9, 0.95 },
		"data folder":            func(c *Config) { c.Managed = &Managed{} },
		"finding buildkitd":      func(c *Config) { c.Managed, c.DataDir = &Managed{Program: "/not/there"}, "/not/there" },
	} {
		cfg := good
		spoil(&cfg)
		if err := Run(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%s: error %v", reason, err)
		}
	}
}

func TestRun_AGossipThatCannotStartIsAnError(t *testing.T) {
	t.Parallel()
	b := startBuildkitd(t, socketPath(t))
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	err = Run(t.Context(), Config{Name: "w", Slots: 1, BuildKit: b.addr, Gossip: Gossip{Bind: taken.Addr().String()}})
	if err == nil || errors.Is(err, t.Context().Err()) || !strings.Contains(err.Error(), "gossip") {
		t.Errorf("error %v", err)
	}
}
