package e2e_test

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// office is a secured farm with one worker in an office behind a router.
func office(t *testing.T, specs ...farmtest.WorkerSpec) (rig, *farmtest.Network) {
	t.Helper()
	farmOnly(t)
	network := farmtest.NewNetwork(t)
	for i := range specs {
		specs[i].Behind = network
	}
	r := newFarm(t, farmtest.FarmOptions{Host: network.Host, Workers: specs})
	r.Farm.Client, _ = r.Farm.Secured(t)
	r.Client = r.Farm.Client
	return r, network
}

// TestTrust_AnOfficeBehindNAT is a worker that nothing can dial, and a stock client with a certificate.
func TestTrust_AnOfficeBehindNAT(t *testing.T) {
	t.Parallel()
	r, network := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1, Pool: "office"})
	r.buildsAMD64(t, "v1")
	if open := network.Listening(t); open != "" {
		t.Errorf("the worker listens on\n%s", open)
	}
	list, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	if w, ok := farmtest.Find(list, "mac-1"); !ok || w.Pool != "office" {
		t.Errorf("the worker is listed as %+v", list)
	}
	_, body, err := get(r.Farm.HTTP + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`archfarm_worker_memory_available_bytes{pool="office",worker="mac-1"} `, `archfarm_worker_oom_kills_total{pool="office",worker="mac-1"} `,
		`archfarm_slots{platform="linux/amd64",pool="office",state="free"} 1`, `archfarm_queue_depth{platform="linux/amd64",pool="office"} 0`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %q among the metrics", want)
		}
	}
}

// TestTrust_NobodyGetsInWithout tries the endpoint without a certificate, with one of another farm, and with one that
// has been revoked.
func TestTrust_NobodyGetsInWithout(t *testing.T) {
	t.Parallel()
	r, network := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	other := newFarm(t, farmtest.FarmOptions{Host: network.Host})
	buildctl := func(dir string) farmtest.Result { // buildx would try for 20 s, and not say why
		return farmtest.Buildctl(t, r.tools, r.Farm.Addr, "--tlscacert", dir+"/ca.pem", "--tlscert", dir+"/cert.pem", "--tlskey", dir+"/key.pem", "du")
	}

	if result := farmtest.Buildctl(t, r.tools, r.Farm.Addr, "du"); result.Code == 0 || !strings.Contains(result.Output, "this farm wants TLS") {
		t.Errorf("in plaintext: exit code %d:\n%s", result.Code, result.Output)
	}
	_, foreign := other.Farm.Secured(t)
	if result := buildctl(foreign); result.Code == 0 {
		t.Errorf("with another farm's certificate:\n%s", result.Output)
	}
	result := farmtest.Command(t, r.tools.Archfarm, "worker", "--name", "intruder", "--coordinator", strings.TrimPrefix(r.Farm.Addr, "tcp://"),
		"--buildkit", r.Farm.Workers[0].Buildkitd.Addr, "--data-dir", farmtest.Folder(t), "--token", other.Farm.Token(t, "--worker"))
	if result.Code == 0 || !strings.Contains(result.Output, "not of the farm that the token was made for") {
		t.Errorf("a worker with another farm's token: exit code %d:\n%s", result.Code, result.Output)
	}

	_, leaver := r.Farm.Secured(t, "--name", "leaver")
	if result := buildctl(leaver); result.Code != 0 {
		t.Fatalf("with a certificate: exit code %d:\n%s", result.Code, result.Output)
	}
	r.Farm.Manage(t, "client", "revoke", "leaver")
	if result := buildctl(leaver); result.Code == 0 {
		t.Errorf("with a revoked certificate:\n%s", result.Output)
	}
	r.buildsAMD64(t, "others-go-on")
}

// TestTrust_ARevokedWorkerIsGoneAtOnce, and comes back with a new token only.
func TestTrust_ARevokedWorkerIsGoneAtOnce(t *testing.T) {
	t.Parallel()
	r, _ := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	r.Farm.Manage(t, "worker", "revoke", "mac-1")
	r.Farm.WaitWorkersWithin(t, goneLimit, "it is gone", func(list []farmtest.WorkerStatus) bool { return len(list) == 0 })
	w := r.Farm.Workers[0]
	w.Agent.WaitOutput(t, startLimit, "a log line about the revoked certificate", lineAbout("revoked"))
	w.Agent.Stop(t)
	for i, arg := range w.Args {
		if arg == "--token" {
			w.Args[i+1] = r.Farm.Token(t, "--worker")
		}
	}
	r.Farm.RestartAgent(t, w)
	r.Farm.WaitWorkers(t, "it is back", func(list []farmtest.WorkerStatus) bool { return len(list) == 1 })
	r.buildsAMD64(t, "v1")
}

// TestTrust_WorkersSurviveRestarts restarts the agent, whose token is used up, and then the coordinator.
func TestTrust_WorkersSurviveRestarts(t *testing.T) {
	t.Parallel()
	r, _ := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	w := r.Farm.Workers[0]
	w.Agent.Stop(t)
	r.Farm.RestartAgent(t, w)
	r.Farm.WaitWorkers(t, "the agent is back", ready("mac-1"))
	r.Farm.RestartCoordinator(t)
	r.Farm.WaitWorkers(t, "the agent finds the new coordinator", ready("mac-1"))
	r.buildsAMD64(t, "v1")
}

func ready(name string) func([]farmtest.WorkerStatus) bool {
	return func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, name)
		return known && w.State == farmtest.Ready
	}
}

// TestAway_AShortAbsenceIsNoFailure cuts the line for less than the three heartbeats that a worker may miss.
func TestAway_AShortAbsenceIsNoFailure(t *testing.T) {
	t.Parallel()
	r, network := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	build, gate := r.atGate(t, "v1", "linux/amd64")
	network.Cut(t)
	since := time.Now()
	farmtest.Eventually(t, startLimit, "four seconds are over", func() (string, bool) { return "", time.Since(since) > 4*time.Second })
	network.Mend(t)
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	r.registry.Index(t, r.repo, "v1") // is there
}

// TestAway_AfterALongPartitionTheWorkerIsBack, without anybody's help, and the build that waited for it goes on.
func TestAway_AfterALongPartitionTheWorkerIsBack(t *testing.T) {
	t.Parallel()
	r, network := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	build, gate := r.atGate(t, "v1", "linux/amd64")
	network.Cut(t)
	build.WaitOutput(t, frozenLimit, "that the worker was lost", lineAbout("worker mac-1 was lost"))
	r.Farm.WaitWorkers(t, "the worker is away", func(list []farmtest.WorkerStatus) bool { return len(list) == 0 })
	network.Mend(t)
	mended := time.Now()
	r.Farm.WaitWorkersWithin(t, reconnectLimit, "the worker is back", ready("mac-1"))
	t.Logf("back %s after the line was mended", time.Since(mended).Round(100*time.Millisecond))
	gate.WaitArrival(t, build, startLimit)
	gate.Open()
	if code := build.Wait(t, buildLimit); code != 0 {
		t.Fatalf("exit code %d:\n%s", code, build.Output())
	}
	r.registry.Index(t, r.repo, "v1") // is there
}

// reconnectLimit is how soon a worker whose way is open again must be back: its own patience with a connection that
// does not answer (20 s), and one pause between two attempts.
const reconnectLimit = 40 * time.Second

// TestAway_AnotherAddress is a laptop that changes its network.
func TestAway_AnotherAddress(t *testing.T) {
	t.Parallel()
	r, network := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	network.Readdress(t)
	changed := time.Now()
	r.Farm.WaitWorkersWithin(t, reconnectLimit, "the worker is there from its new address", func(list []farmtest.WorkerStatus) bool {
		w, known := farmtest.Find(list, "mac-1")
		return known && w.Since.After(changed)
	})
	t.Logf("back %s after its address had changed", time.Since(changed).Round(100*time.Millisecond))
	r.buildsAMD64(t, "after")
}

// TestAway_AsleepForAWhile is a machine whose lid was closed: its agent's clock stands still.
func TestAway_AsleepForAWhile(t *testing.T) {
	t.Parallel()
	r, _ := office(t, farmtest.WorkerSpec{Name: "mac-1", Slots: 1})
	agent := r.Farm.Workers[0].Agent
	agent.SignalGroup(syscall.SIGSTOP)
	t.Cleanup(func() { agent.SignalGroup(syscall.SIGCONT) })
	r.Farm.WaitWorkersWithin(t, frozenLimit, "it is away", func(list []farmtest.WorkerStatus) bool { return len(list) == 0 })
	agent.SignalGroup(syscall.SIGCONT)
	r.Farm.WaitWorkersWithin(t, frozenLimit, "it is back", ready("mac-1"))
	r.buildsAMD64(t, "after")
}

// TestTrust_OneCoordinatorUnderSeveralAddresses has the agent dial it under two addresses that it cannot tell are the
// same: one stream has to stay, and the other not to disturb it.
func TestTrust_OneCoordinatorUnderSeveralAddresses(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	here, there := farmtest.NewNetwork(t), farmtest.NewNetwork(t)
	other := there.Free(t)
	r := newFarm(t, farmtest.FarmOptions{
		Host: here.Host, CoordinatorArgs: []string{"--listen", other},
		Workers: []farmtest.WorkerSpec{{Name: "mac-1", Slots: 1, Args: []string{"--coordinator", other, "--log-level", "debug"}}},
	})
	r.Client, _ = r.Farm.Secured(t)
	r.Farm.Workers[0].Agent.WaitOutput(t, startLimit, "a log line about the second address", lineAbout("attached under another address already"))
	since := func() time.Time {
		list, err := r.Farm.List()
		w, ok := farmtest.Find(list, "mac-1")
		if err != nil || !ok {
			t.Fatalf("the worker is not there: %+v, %v", list, err)
		}
		return w.Since
	}
	settled := since()
	r.buildsAMD64(t, "v1")
	if now := since(); !now.Equal(settled) {
		t.Errorf("it attached again at %s, after %s", now, settled)
	}
}
