package e2e_test

import (
	"context"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// sharedLease is the lease of jobs in these tests.
	sharedLease = 4 * time.Second
	// takeover is by when another coordinator goes on, at the latest.
	takeover = sharedLease + 5*time.Second
)

// wire is the way of a coordinator to its database.
type wire struct {
	listener net.Listener
	to       string
	cut      atomic.Bool
	pipes    sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

func newWire(t *testing.T, to string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{listener: l, to: to}
	w.pipes.Go(w.serve) // ends with the listener
	t.Cleanup(func() {
		_ = l.Close()
		w.mu.Lock()
		for _, c := range w.conns {
			_ = c.Close()
		}
		w.mu.Unlock()
		w.pipes.Wait()
	})
	return w
}

func (w *wire) serve() {
	for {
		near, err := w.listener.Accept()
		if err != nil {
			return
		}
		far, err := net.Dial("tcp", w.to)
		if err != nil {
			_ = near.Close()
			continue
		}
		w.mu.Lock()
		w.conns = append(w.conns, near, far)
		w.mu.Unlock()
		w.pipes.Go(func() { w.copy(far, near) }) // end with the connections
		w.pipes.Go(func() { w.copy(near, far) })
	}
}

// copy passes bytes on; after a cut it swallows them, as a broken line does, with both ends left to believe in it.
func (w *wire) copy(to, from net.Conn) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 && !w.cut.Load() {
			if _, err := to.Write(buffer[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	if !w.cut.Load() {
		_, _ = to.Close(), from.Close()
	}
}

// sharing is two coordinators that share a PostgreSQL, each with the same two workers.
type sharing struct {
	jobRig // the first's
	second *farmtest.Farm
	wire   *wire // the first's
	other  *client.Client
}

// startPostgres returns the URL of a server's database.
func startPostgres(t *testing.T) *url.URL {
	t.Helper()
	server, err := postgrestest.Start(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	})
	database, err := url.Parse(server.TCPURL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	return database
}

func newSharing(t *testing.T) sharing {
	t.Helper()
	farmOnly(t)
	tools := farmtest.FindFarmTools(t)
	database := startPostgres(t)
	line := newWire(t, database.Host)
	key := farmtest.WriteFile(t, farmtest.Folder(t), "secrets.key", strings.Repeat("0123456789abcdef", 4)+"\n")
	if err := syscall.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	shared := []string{"--secrets-key-file", key, "--job-lease", sharedLease.String()}
	through := *database
	through.Host = line.listener.Addr().String()
	registry := farmtest.StartRegistry(t, tools, farmtest.RegistryOptions{})
	first := farmtest.StartFarm(t, tools, farmtest.FarmOptions{
		CoordinatorArgs: append([]string{"--name", "first"}, shared...), CoordinatorEnv: []string{"ARCHFARM_STORE=" + through.String()},
	})
	second := farmtest.StartFarm(t, tools, farmtest.FarmOptions{
		CoordinatorArgs: append([]string{"--name", "second", "--join", first.Gossip}, shared...), CoordinatorEnv: []string{"ARCHFARM_STORE=" + database.String()},
	})
	for _, w := range fleet() {
		first.AddWorker(t, w)
	}
	s := sharing{jobRig: jobsAt(t, rigAt(t, tools, &first.Endpoint, registry)), second: second, wire: line}
	s.other = jobsAt(t, rigAt(t, tools, &second.Endpoint, registry)).client
	for _, f := range []*farmtest.Farm{first, second} {
		f.WaitWorkers(t, "amd-1 is there", ready("amd-1"))
		f.WaitWorkers(t, "arm-1 is there", ready("arm-1"))
	}
	return s
}

// held submits a job to the first coordinator whose amd64 leg waits at a gate, and returns once the first has its lease.
func (s sharing) held(t *testing.T, gate *farmtest.Gate) string {
	t.Helper()
	dir := s.context(t, map[string]string{"Dockerfile": "FROM scratch AS base-arm64\nCOPY hello /hello\nFROM scratch AS base-amd64\nCOPY busybox /bin/busybox\n" + gate.Run() + "\nFROM base-$TARGETARCH\n", "hello": "hello\n"})
	s.second.Coordinator.Signal(syscall.SIGSTOP) // so that the first gets it
	id := s.submit(t, "--context", dir, "--platform", both, "--tag", s.ref("v1.0.0"))
	gate.WaitArrival(t, s.Farm.Coordinator, jobLimit)
	farmtest.Eventually(t, jobLimit, "the arm64 leg is done", func() (string, bool) {
		job, err := s.client.Get(t.Context(), id)
		return job.String(), err == nil && legOf(job, "linux/arm64").GetState() == archfarmv1.JobLeg_STATE_SUCCEEDED
	})
	s.second.Coordinator.Signal(syscall.SIGCONT)
	return id
}

// goesOn waits until the second coordinator has the job, and returns after how long it had.
func (s sharing) goesOn(t *testing.T, id string, began time.Time) time.Duration {
	t.Helper()
	farmtest.Eventually(t, jobLimit, "the second coordinator has the job", func() (string, bool) {
		job, err := s.other.Get(t.Context(), id)
		if err != nil {
			return err.Error(), false
		}
		attempts := legOf(job, "linux/amd64").GetAttempts()
		return job.String(), len(attempts) > 1 && attempts[len(attempts)-1].GetCoordinator() == "second"
	})
	return time.Since(began)
}

// finished waits for the job at the second coordinator, and checks that it was published once.
func (s sharing) finished(t *testing.T, id string, watched <-chan error) {
	t.Helper()
	there := s.jobRig
	there.client, there.Endpoint = s.other, &s.second.Endpoint
	job := there.ended(t, id, archfarmv1.Job_STATE_SUCCEEDED)
	if err := <-watched; err != nil {
		t.Error(err)
	}
	if n := len(legOf(job, "linux/arm64").GetAttempts()); n != 1 {
		t.Errorf("the leg that had succeeded has %d attempts, want 1", n)
	}
	wantEqual(t, "the tag", s.registry.Index(t, s.repo, "v1.0.0").Digest.String(), job.GetDigest())
	published := 0
	for b, err := range s.other.Tags(t.Context(), &archfarmv1.ListTagsRequest{Repository: s.registry.Host + "/" + s.repo}) {
		if err != nil {
			t.Fatal(err)
		}
		if b.GetState() == archfarmv1.TagBinding_STATE_PUBLISHED {
			published++
		}
	}
	if published != 1 {
		t.Errorf("the ledger has %d published bindings, want 1", published)
	}
}

func (s sharing) watchOther(t *testing.T, id string) <-chan error {
	return jobRig{rig: s.rig, client: s.other}.watch(t, id)
}

func TestShared_AKilledCoordinatorsJobsGoOnAtAnother(t *testing.T) {
	t.Parallel()
	s := newSharing(t)
	gate := farmtest.NewGate(t)
	id := s.held(t, gate)
	watched := s.watchOther(t, id) // any coordinator answers
	began := time.Now()
	s.Farm.Coordinator.Kill()
	if took := s.goesOn(t, id, began); took > takeover {
		t.Errorf("the second coordinator went on after %s, want at most %s", took, takeover)
	} else {
		t.Logf("the second coordinator went on after %s", took)
	}
	gate.Open()
	s.finished(t, id, watched)
}

func TestShared_ACoordinatorWithoutItsDatabaseLetsGoOfItsJobs(t *testing.T) {
	t.Parallel()
	s := newSharing(t)
	gate := farmtest.NewGate(t)
	id := s.held(t, gate)
	watched := s.watchOther(t, id)
	began := time.Now()
	s.wire.cut.Store(true)
	gate.WaitKilled(t, takeover) // its own leg ends before the lease does
	t.Logf("the first coordinator's leg ended after %s, the second went on after %s", time.Since(began), s.goesOn(t, id, began))
	gate.Open()
	s.finished(t, id, watched)
}

func TestShared_ABackupIsADatabaseToStartFrom(t *testing.T) {
	t.Parallel()
	farmOnly(t)
	r := newJobRig(t, farmtest.FarmOptions{})
	dir := r.context(t, map[string]string{"Dockerfile": plain, "hello": "hello\n"})
	job := r.ended(t, r.submit(t, "--context", dir, "--platform", both, "--tag", r.ref("v1.0.0")), archfarmv1.Job_STATE_SUCCEEDED)
	copied := filepath.Join(farmtest.Folder(t), "archfarm.db")
	if backup := farmtest.Command(t, r.tools.Archfarm, "backup", "--data-dir", r.Farm.DataDir, copied); backup.Code != 0 {
		t.Fatalf("archfarm backup: exit code %d:\n%s", backup.Code, backup.Output)
	}
	restored := newFarm(t, farmtest.FarmOptions{})
	restored.Farm.Coordinator.Stop(t)
	replace(t, filepath.Join(restored.Farm.DataDir, "archfarm.db"), copied)
	replace(t, filepath.Join(restored.Farm.DataDir, "secrets.key"), filepath.Join(r.Farm.DataDir, "secrets.key"))
	restored.Farm.StartCoordinator(t)
	farmtest.Eventually(t, jobLimit, "the restored coordinator knows the job", func() (string, bool) {
		got, err := jobsAt(t, restored).client.Get(context.WithoutCancel(t.Context()), job.GetId())
		return got.String(), err == nil && got.GetDigest() == job.GetDigest()
	})
}

// replace puts a copy of a file in another's place, and takes away what belongs to the old one.
func replace(t *testing.T, path, with string) {
	t.Helper()
	data, err := os.ReadFile(with)
	if err != nil {
		t.Fatal(err)
	}
	for _, old := range []string{path + "-wal", path + "-shm"} {
		_ = os.Remove(old) // not there after a clean stop
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
