package e2e_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// handoverLimit is how long a coordinator may go on when its last build has ended.
const handoverLimit = 20 * time.Second

// crowd is clients that build one thing after the other, for both platforms.
type crowd struct {
	rig
	clients sync.WaitGroup
	enough  chan struct{}

	mu    sync.Mutex
	tags  []string
	fails []string
}

// build has so many clients build until leave is called, each at least once.
func (r rig) crowd(t *testing.T, clients int) *crowd {
	t.Helper()
	c := &crowd{rig: r, enough: make(chan struct{})}
	for n := range clients {
		c.clients.Go(func() {
			for i := 0; ; i++ {
				c.one(t, fmt.Sprintf("client%d-%d", n, i))
				select {
				case <-c.enough:
					return
				default:
				}
			}
		})
	}
	t.Cleanup(func() { c.leave(t) })
	return c
}

func (c *crowd) one(t *testing.T, tag string) {
	dir := c.context(t, map[string]string{"Dockerfile": legs + "LABEL by=" + tag + "\n", "told": "told\n", "app": "app of " + t.Name()})
	result := c.Client.TryBuild(t, "--platform", both, "--push", "-t", c.ref(tag), dir)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tags = append(c.tags, tag)
	if result.Code != 0 {
		c.fails = append(c.fails, fmt.Sprintf("%s: exit code %d:\n%s", tag, result.Code, result.Output))
	}
}

// built is how many builds have ended so far.
func (c *crowd) built() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.tags)
}

// more waits until so many further builds have ended.
func (c *crowd) more(t *testing.T, builds int) {
	t.Helper()
	before := c.built()
	farmtest.Eventually(t, buildLimit, fmt.Sprintf("%d more builds have ended", builds), func() (string, bool) {
		return fmt.Sprint(c.built()-before, " have"), c.built()-before >= builds
	})
}

// leave ends the crowd, and checks that each of its builds is there, whole.
func (c *crowd) leave(t *testing.T) {
	t.Helper()
	select {
	case <-c.enough:
		return
	default:
	}
	close(c.enough)
	c.clients.Wait()
	for _, fail := range c.fails {
		t.Errorf("a build was lost: %s", fail)
	}
	if len(c.fails) > 0 {
		return
	}
	for _, tag := range c.tags {
		index := c.registry.Index(t, c.repo, tag)
		c.checkLeg(t, index, "linux/amd64", "x86_64\n")
		c.checkLeg(t, index, "linux/arm64", "told\n")
	}
}

// TestHandover_AnUpgradeUnderLoadLosesNoBuild upgrades a coordinator twice while clients build without a pause, one build
// is older than both upgrades and younger than none, one goes on over the second, and so does a job.
func TestHandover_AnUpgradeUnderLoadLosesNoBuild(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	for name, secured := range map[string]bool{"plaintext": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			options := farmtest.FarmOptions{Workers: fleet()}
			if secured {
				options.Host = "127.0.0.1"
			}
			r := newFarm(t, options)
			if secured {
				r.Client, _ = r.Farm.Secured(t)
			}
			others := r.crowd(t, 2)
			first, firstGate := r.atGate(t, "first", both)
			others.more(t, 2)

			oldest := r.Farm.Upgrade(t)
			others.more(t, 4)
			second, secondGate := r.atGate(t, "second", both)

			older := r.Farm.Upgrade(t)
			others.more(t, 4)
			for _, former := range []*farmtest.Process{oldest, older} {
				if !former.Running() {
					t.Errorf("a coordinator with a build has ended:\n%s", former.Tail())
				}
			}
			secondGate.Open()
			firstGate.Open()
			for tag, build := range map[string]*farmtest.Process{"first": first, "second": second} {
				if code := build.Wait(t, buildLimit); code != 0 {
					t.Fatalf("build %s: exit code %d:\n%s", tag, code, build.Output())
				}
				r.checkGate(t, tag)
			}
			for _, former := range []*farmtest.Process{oldest, older} {
				wantEqual(t, "the exit code of a coordinator that has handed over", former.Wait(t, handoverLimit), 0)
			}
			others.more(t, 2)
			others.leave(t)
			t.Logf("%d builds beside", others.built())
		})
	}
}

// TestHandover_AJobGoesOn runs a leg of a job over an upgrade, and others after it, with either store.
func TestHandover_AJobGoesOn(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	for name, options := range map[string]func(t *testing.T) farmtest.FarmOptions{
		"SQLite": func(*testing.T) farmtest.FarmOptions { return farmtest.FarmOptions{} },
		"PostgreSQL": func(t *testing.T) farmtest.FarmOptions {
			return farmtest.FarmOptions{CoordinatorEnv: []string{"ARCHFARM_STORE=" + startPostgres(t).String()}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			newJobRig(t, options(t)).goesOnAfterAnUpgrade(t)
		})
	}
}

func (r jobRig) goesOnAfterAnUpgrade(t *testing.T) {
	t.Helper()
	gate := farmtest.NewGate(t)
	dir := r.step(t, gate.Run(), t.Name())
	running := r.submit(t, "--context", dir, "--platform", "linux/amd64", "--tag", r.ref("running"))
	select {
	case <-gate.Arrived():
	case <-time.After(jobLimit):
		t.Fatal("the job's step does not run")
	}
	watching := r.start(t, "watch", running)

	former := r.Farm.Upgrade(t)
	next := r.submit(t, "--context", r.legsContext(t), "--platform", both, "--tag", r.ref("next"))
	r.ended(t, next, archfarmv1.Job_STATE_SUCCEEDED)
	if !former.Running() {
		t.Errorf("the former coordinator has ended with a job's leg:\n%s", former.Tail())
	}
	gate.Open()
	job := r.ended(t, running, archfarmv1.Job_STATE_SUCCEEDED)
	for _, leg := range job.GetLegs() {
		wantEqual(t, "the attempts of "+leg.GetPlatform(), len(leg.GetAttempts()), 1)
	}
	if code := watching.Wait(t, jobLimit); code != 0 {
		t.Errorf("archfarm watch: exit code %d:\n%s", code, watching.Output())
	}
	wantEqual(t, "the former coordinator's exit code", former.Wait(t, handoverLimit), 0)
}

// TestHandover_AWorkerLostAfterItIsReplaced: the former coordinator opens connections to others still, which cannot be
// dialed to it any more.
func TestHandover_AWorkerLostAfterItIsReplaced(t *testing.T) {
	t.Parallel()
	r := spare(t)
	build, gate := r.atGate(t, "v1", both)
	lost, other := r.amd(t, build)
	former := r.Farm.Upgrade(t)
	wantEqual(t, "archfarm_predecessor_running", r.metric(t, "archfarm_predecessor_running"), 1)
	lost.Agent.Kill()
	r.wantContinued(t, build, gate, lost, other)
	wantEqual(t, "the former coordinator's exit code", former.Wait(t, handoverLimit), 0)
	farmtest.Eventually(t, goneLimit, "the successor knows that", func() (string, bool) {
		running := r.metric(t, "archfarm_predecessor_running")
		return fmt.Sprint(running), running == 0
	})
}

// TestHandover_WithoutItWhatIsNewIsRefused shows that the tests above test what they say: a coordinator that merely
// stops lets its builds end, and takes no others.
func TestHandover_WithoutItWhatIsNewIsRefused(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, fleet()...)
	build, gate := r.atGate(t, "v1", both)
	r.Farm.Coordinator.Signal(syscall.SIGTERM)
	r.Farm.Coordinator.WaitOutput(t, startLimit, "that it drains", farmtest.Contains("draining: no new builds are taken"))
	if late := r.Client.TryBuild(t, "--platform", both, "--push", "-t", r.ref("late"), r.legsContext(t)); late.Code == 0 {
		t.Error("a coordinator that drains has taken a build")
	}
	gate.Open()
	r.wantBuilt(t, build, "v1")
}

// TestHandover_ASuccessorThatFailsChangesNothing has the new binary be one that does not start, and one that is no
// coordinator.
func TestHandover_ASuccessorThatFailsChangesNothing(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	installed := filepath.Join(farmtest.Folder(t), "archfarm")
	install := func(binary []byte) {
		if err := os.WriteFile(installed+".new", binary, 0o700); err != nil { //nolint:gosec // it is a program
			t.Fatal(err)
		}
		if err := os.Rename(installed+".new", installed); err != nil {
			t.Fatal(err)
		}
	}
	binary, err := os.ReadFile(tools.Archfarm)
	if err != nil {
		t.Fatal(err)
	}
	install(binary)
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	tools.Archfarm = installed
	farm := farmtest.StartFarm(t, tools, farmtest.FarmOptions{Workers: fleet()})
	r := rigAt(t, tools, &farm.Endpoint, registry)
	build, gate := r.atGate(t, "v1", both)
	for what, program := range map[string]string{"not a program": "no program\n", "one that fails": "#!/bin/sh\necho this version is broken >&2; exit 3\n"} {
		install([]byte(program))
		before := len(farm.Coordinator.Output())
		farm.Coordinator.Signal(syscall.SIGUSR2)
		farm.Coordinator.WaitOutput(t, startLimit, what, func(output string) string {
			return farmtest.Contains("handing over to a successor: this process goes on")(output[before:])
		})
		r.Client.Build(t, "--platform", both, r.legsContext(t))
	}
	install(binary)
	former := farm.Upgrade(t)
	gate.Open()
	r.wantBuilt(t, build, "v1")
	wantEqual(t, "the former coordinator's exit code", former.Wait(t, handoverLimit), 0)
}

// manager is where systemd hears of its services.
type manager struct{ conn *net.UnixConn }

func newManager(t *testing.T) (m manager, env string) {
	t.Helper()
	path := filepath.Join(farmtest.Folder(t), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return manager{conn}, "NOTIFY_SOCKET=" + path
}

// hears waits until a service has said so.
func (m manager) hears(t *testing.T, want string) {
	t.Helper()
	if err := m.conn.SetReadDeadline(time.Now().Add(startLimit)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<10)
	for {
		n, err := m.conn.Read(buf)
		if err != nil {
			t.Fatalf("systemd does not hear %q: %v", want, err)
		}
		if string(buf[:n]) == want {
			return
		}
	}
}

// TestHandover_SystemdHoldsTheSocket has a build begin while no coordinator runs, and another process be the service.
func TestHandover_SystemdHoldsTheSocket(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	systemd, env := newManager(t)
	r := newFarm(t, farmtest.FarmOptions{Workers: fleet(), CoordinatorEnv: []string{env}})
	systemd.hears(t, "READY=1")
	addr := strings.TrimPrefix(r.Farm.Addr, "tcp://")
	r.Farm.Coordinator.Stop(t)
	socket, err := new(net.ListenConfig).Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	early := r.Client.StartBuild(t, "--platform", both, "--push", "-t", r.ref("v1"), r.legsContext(t))
	r.Farm.StartActivated(t, socket)
	if code := early.Wait(t, buildLimit); code != 0 {
		t.Fatalf("a build that began before the coordinator: exit code %d:\n%s", code, early.Output())
	}
	index := r.registry.Index(t, r.repo, "v1")
	r.checkLeg(t, index, "linux/amd64", "x86_64\n")
	r.checkLeg(t, index, "linux/arm64", "told\n")
	systemd.hears(t, "READY=1")
	r.Farm.Upgrade(t)
	systemd.hears(t, fmt.Sprintf("MAINPID=%d", r.Farm.Coordinator.Pid()))
}
