package farmtest

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"time"
)

// Gate holds a RUN step until the test lets it go on: the step fetches URL, which the gate answers only when it is
// opened. So a test knows that a step runs, and when it was killed, without guessing times.
type Gate struct {
	URL string

	server  *httptest.Server
	arrived chan struct{} // one value for each step that came
	left    chan struct{} // one value for each step that went away before the gate opened
	opened  chan struct{}
	open    sync.Once
	count   atomic.Int64
}

// gateRoom is how many steps one gate can count.
const gateRoom = 64

// NewGate opens a gate's door to RUN steps on this machine.
func NewGate(t T) *Gate {
	t.Helper()
	g := &Gate{arrived: make(chan struct{}, gateRoom), left: make(chan struct{}, gateRoom), opened: make(chan struct{})}
	g.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		g.count.Add(1)
		g.arrived <- struct{}{}
		select {
		case <-g.opened:
			_, _ = w.Write([]byte("open\n"))
		case <-r.Context().Done():
			g.left <- struct{}{}
		}
	}))
	g.URL = g.server.URL
	t.Cleanup(func() {
		g.Open()
		g.server.CloseClientConnections()
		g.server.Close()
	})
	return g
}

// Run is the Dockerfile instruction that waits at the gate and then writes /gate.
func (g *Gate) Run() string {
	return Run("/bin/busybox wget -q -O /gate " + g.URL)
}

// Open lets everyone through, those who come later too.
func (g *Gate) Open() { g.open.Do(func() { close(g.opened) }) }

// Arrivals is how many steps have come so far.
func (g *Gate) Arrivals() int { return int(g.count.Load()) }

// Arrived gives one value for each step that comes.
func (g *Gate) Arrived() <-chan struct{} { return g.arrived }

// WaitArrival waits until a step is at the gate. When the build ends first, the test fails with its output.
func (g *Gate) WaitArrival(t T, build *Process, limit time.Duration) {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-g.arrived:
	case <-build.Done():
		t.Fatalf("%s ended (exit code %d) before its RUN step ran:\n%s", build.Name, build.code(), build.Tail())
	case <-timer.C:
		t.Fatalf("the RUN step of %s did not start within %v:\n%s", build.Name, limit, build.Tail())
	}
}

// WaitKilled waits until a step that was at the gate is gone without having been let through.
func (g *Gate) WaitKilled(t T, limit time.Duration) {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-g.left:
	case <-timer.C:
		t.Fatalf("the RUN step still runs %v after its build ended", limit)
	}
}

// Run is the Dockerfile instruction that runs a script with the busybox that a Context brings along.
func Run(script string, flags ...string) string {
	args, err := json.Marshal([]string{"/bin/busybox", "sh", "-e", "-c", script})
	if err != nil {
		panic(err) // strings always marshal
	}
	line := "RUN "
	for _, flag := range flags {
		line += flag + " "
	}
	return line + string(args)
}
