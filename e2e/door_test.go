package e2e_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

const (
	// halfOpen is how many connections of each kind stay unfinished.
	halfOpen = 340
	// introductionLimit is how soon the coordinator must have closed a connection that has not become an HTTP/2 one.
	introductionLimit = 15 * time.Second
	// silenceLimit is how soon it must have closed one whose peer does not answer pings.
	silenceLimit = 70 * time.Second
)

// What a client sends first in HTTP/2 (RFC 9113, 3.4): the preface, an empty SETTINGS frame; and the acknowledgement of
// the server's.
const (
	http2Preface  = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	http2Settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	http2Ack      = "\x00\x00\x00\x04\x01\x00\x00\x00\x00"
)

// TestDoor_HalfOpenConnectionsHarmNobodyAndEnd holds a thousand connections open that say nothing, or not enough, while
// builds run.
func TestDoor_HalfOpenConnectionsHarmNobodyAndEnd(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, farmtest.WorkerSpec{Name: "amd-1", Slots: 2})
	build, gate := r.atGate(t, "before", "linux/amd64")
	before := resident(t, r.Farm.Coordinator)
	var all sync.WaitGroup
	for what, kind := range map[string]struct {
		says  string
		limit time.Duration
	}{
		"says nothing":                {"", introductionLimit},
		"sends the HTTP/2 preface":    {http2Preface, introductionLimit},
		"shakes hands, then is quiet": {http2Preface + http2Settings + http2Ack, silenceLimit},
	} {
		conns := r.connect(t, halfOpen, kind.says)
		all.Go(func() { wantEnd(t, conns, what, kind.limit) })
	}
	r.buildsAMD64(t, "meanwhile")
	grown := resident(t, r.Farm.Coordinator) - before
	t.Logf("%d half-open connections take %d KiB each", 3*halfOpen, grown>>10/(3*halfOpen))
	if grown > 200<<20 {
		t.Errorf("the coordinator has grown by %d MiB", grown>>20)
	}
	gate.Open()
	if code := build.Wait(t, startLimit); code != 0 {
		t.Errorf("the build that ran before: exit code %d:\n%s", code, build.Output())
	}
	all.Wait()
	r.buildsAMD64(t, "after")
}

// connect opens connections that say something and nothing more.
func (r rig) connect(t *testing.T, n int, says string) []net.Conn {
	t.Helper()
	var conns []net.Conn
	for range n {
		conn, err := net.Dial("tcp", strings.TrimPrefix(r.Addr, "tcp://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if _, err := io.WriteString(conn, says); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	return conns
}

// wantEnd checks that the other side ends every connection within the limit.
func wantEnd(t *testing.T, conns []net.Conn, what string, limit time.Duration) {
	deadline := time.Now().Add(limit)
	open := 0
	for _, conn := range conns {
		_ = conn.SetReadDeadline(deadline) // fails only on a closed one
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			open++
		}
	}
	if open > 0 {
		t.Errorf("of %d clients of which each %s, %d are connected after %v", len(conns), what, open, limit)
	}
}

// resident is the memory of a process that is resident now, in bytes.
func resident(t *testing.T, p *farmtest.Process) int {
	t.Helper()
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(p.Pid()) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(raw), "VmRSS:")
	fields := strings.Fields(rest)
	if len(fields) == 0 {
		t.Fatalf("the kernel does not tell the memory of %s", p.Name)
	}
	kib, err := strconv.Atoi(fields[0])
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// frozenClientLimit is how long a client that is connected but does not answer may keep its slots: HTTP/2 pings find out.
const frozenClientLimit = 60 * time.Second

// uploading starts a build whose context is too large to arrive soon, and returns when its upload has begun.
func (r rig) uploading(t *testing.T, client *farmtest.Client) *farmtest.Process {
	t.Helper()
	dir := r.context(t, map[string]string{"Dockerfile": "FROM scratch\nCOPY . /\n"})
	if err := os.Truncate(farmtest.WriteFile(t, dir, "large", ""), 8<<30); err != nil { // sparse, but sent whole
		t.Fatal(err)
	}
	build := client.StartBuild(t, "--platform", "linux/amd64,linux/arm64", dir)
	build.WaitOutput(t, startLimit, "an upload", farmtest.Contains("transferring context: "))
	list, err := r.Farm.List()
	if err != nil {
		t.Fatal(err)
	}
	if farmtest.UsedSlots(list) == 0 {
		t.Fatalf("an upload without a slot: %+v", list)
	}
	return build
}

func TestDoor_AClientGoneMidUploadFreesItsSlots(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, fleet()...)
	build := r.uploading(t, r.Client)
	build.Kill()
	r.Farm.WaitWorkersWithin(t, goneLimit, "no slot is in use", idle)
	r.buildsAMD64(t, "after")
}

// TestDoor_AClientFrozenMidUploadFreesItsSlots stops a client; one whose network drops everything looks the same from here.
func TestDoor_AClientFrozenMidUploadFreesItsSlots(t *testing.T) {
	t.Parallel()
	r := newFarmRig(t, fleet()...)
	build := r.uploading(t, r.Client)
	build.SignalGroup(syscall.SIGSTOP)
	r.Farm.WaitWorkersWithin(t, frozenClientLimit, "no slot is in use", idle)
	r.buildsAMD64(t, "after")
	build.SignalGroup(syscall.SIGCONT)
	if code := build.Wait(t, startLimit); code == 0 {
		t.Errorf("the build that was given up succeeded:\n%s", build.Tail())
	}
}
