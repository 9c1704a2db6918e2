package farmtest

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Endpoint is a BuildKit API to build at: a farm, or one plain buildkitd to compare it with.
type Endpoint struct {
	Addr   string // tcp://… or unix://…
	Client *Client
	Farm   *Farm // nil for a plain buildkitd
	parts  []*Process
}

// Logs is the end of every daemon's log, for a failing test.
func (e *Endpoint) Logs() string {
	var all strings.Builder
	for _, part := range e.parts {
		fmt.Fprintf(&all, "--- log of %s, its end:\n%s\n", part.Name, part.Tail())
	}
	return all.String()
}

// WorkerSpec describes one machine of a farm.
type WorkerSpec struct {
	Name      string
	Platforms []string // the operator's word; empty for what the machine is
	Slots     int
	Dials     bool     // told of the coordinator, instead of finding it by gossip
	TCP       bool     // its buildkitd listens on TCP, as in a virtual machine
	Args      []string // further arguments of its agent
}

// FarmOptions describe a farm.
type FarmOptions struct {
	Workers         []WorkerSpec
	CoordinatorArgs []string
}

// Farm is a running coordinator with its workers.
type Farm struct {
	Endpoint
	Coordinator *Process
	Gossip      string // host:port
	HTTP        string // http://host:port
	Workers     []*FarmWorker
	tools       Tools
}

// FarmWorker is a buildkitd with the agent beside it.
type FarmWorker struct {
	WorkerSpec
	Buildkitd *Buildkitd
	Agent     *Process
}

// WorkerStatus is one element of what archfarm workers --output json prints.
type WorkerStatus struct {
	Name      string   `json:"name"`
	Platforms []string `json:"platforms"`
	Slots     struct {
		Total int `json:"total"`
		Used  int `json:"used"`
	} `json:"slots"`
	State   string    `json:"state"`
	Version string    `json:"version"`
	Since   time.Time `json:"since"`
}

// Ready is the state of a worker that takes attempts.
const Ready = "ready"

// StartDirect starts one plain buildkitd as an endpoint.
func StartDirect(t T, tools Tools) *Endpoint {
	t.Helper()
	daemon := StartBuildkitd(t, tools, "the plain endpoint")
	return &Endpoint{Addr: daemon.Addr, Client: NewClient(t, tools, daemon.Addr), parts: []*Process{daemon.Process}}
}

// StartFarm starts a coordinator and its workers, and returns when every worker is ready.
func StartFarm(t T, tools Tools, options FarmOptions) *Farm {
	t.Helper()
	listen, web, gossip := freePort(t), freePort(t), freePort(t)
	f := &Farm{tools: tools, Gossip: gossip, HTTP: "http://" + web}
	args := []string{"coordinator", "--listen", listen, "--http", web, "--gossip", gossip, "--data-dir", Folder(t)}
	f.Coordinator = StartProcess(t, Spec{Name: "coordinator", Path: tools.Archfarm, Args: append(args, options.CoordinatorArgs...)})
	f.Addr, f.parts = "tcp://"+listen, []*Process{f.Coordinator}
	for _, spec := range options.Workers {
		f.AddWorker(t, spec)
	}
	f.WaitWorkers(t, "every worker is ready", func(list []WorkerStatus) bool {
		ready := 0
		for _, w := range list {
			if w.State == Ready {
				ready++
			}
		}
		return ready == len(options.Workers)
	})
	f.Client = NewClient(t, tools, f.Addr)
	f.Farm = f
	return f
}

// StartUp runs archfarm up, a whole farm in one process with a buildkitd of its own, and returns when its worker is
// ready. The process is the farm's Coordinator.
func StartUp(t T, tools Tools, name string) *Farm {
	t.Helper()
	listen, web, gossip, dir := freePort(t), freePort(t), freePort(t), Folder(t)
	f := &Farm{tools: tools, Gossip: gossip, HTTP: "http://" + web}
	args := []string{
		"up", "--name", name, "--listen", listen, "--http", web, "--gossip", gossip, "--data-dir", dir,
		"--buildkitd", tools.Buildkitd, "--buildkitd-arg", "--config", "--buildkitd-arg", WriteFile(t, dir, "buildkitd.toml", ""),
		"--buildkitd-arg", "--oci-worker-net=host", "--buildkitd-arg", "--otel-socket-path", "--buildkitd-arg", filepath.Join(dir, "otel"),
	}
	f.Coordinator = StartProcess(t, Spec{Name: "archfarm up", Path: tools.Archfarm, Args: args})
	f.Addr, f.parts = "tcp://"+listen, []*Process{f.Coordinator}
	f.WaitWorkers(t, "the one worker is ready", func(list []WorkerStatus) bool {
		w, known := Find(list, name)
		return known && w.State == Ready
	})
	f.Client = NewClient(t, tools, f.Addr)
	f.Farm = f
	return f
}

// AddWorker starts one more machine; it does not wait until that is ready.
func (f *Farm) AddWorker(t T, spec WorkerSpec) *FarmWorker {
	t.Helper()
	start := StartBuildkitd
	if spec.TCP {
		start = StartBuildkitdTCP
	}
	w := &FarmWorker{WorkerSpec: spec, Buildkitd: start(t, f.tools, spec.Name)}
	f.Workers = append(f.Workers, w)
	f.parts = append(f.parts, w.Buildkitd.Process)
	f.RestartAgent(t, w)
	return w
}

// RestartAgent starts the agent of a worker whose agent does not run.
func (f *Farm) RestartAgent(t T, w *FarmWorker) {
	t.Helper()
	spec := w.WorkerSpec
	args := []string{"worker", "--name", spec.Name, "--buildkit", w.Buildkitd.Addr, "--slots", strconv.Itoa(spec.Slots)}
	if spec.Dials {
		args = append(args, "--coordinator", strings.TrimPrefix(f.Addr, "tcp://"))
	} else {
		args = append(args, "--join", f.Gossip, "--gossip", "127.0.0.1:0")
	}
	for _, platform := range spec.Platforms {
		args = append(args, "--platform", platform)
	}
	w.Agent = StartProcess(t, Spec{Name: "agent of " + spec.Name, Path: f.tools.Archfarm, Args: append(args, spec.Args...)})
	f.parts = append(f.parts, w.Agent)
}

// Archfarm runs one archfarm command with --farm pointing here.
func (f *Farm) Archfarm(t T, command string, args ...string) Result {
	t.Helper()
	return finish(t, StartProcess(t, Spec{
		Name: "archfarm " + command, Path: f.tools.Archfarm, Args: append([]string{command, "--farm", f.Addr}, args...), Keep: true,
	}))
}

// List returns what archfarm workers --output json says.
func (f *Farm) List() ([]WorkerStatus, error) {
	cmd := exec.Command(f.tools.Archfarm, "workers", "--farm", f.Addr, "--output", "json")
	cmd.Env = cleanEnv()
	raw, err := cmd.Output()
	if err != nil {
		var stderr []byte
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			stderr = exit.Stderr
		}
		return nil, fmt.Errorf("archfarm workers: %w: %s", err, stderr)
	}
	var list []WorkerStatus
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("archfarm workers --output json: %w: %s", err, raw)
	}
	return list, nil
}

// WaitWorkers waits until the fleet is as wanted.
func (f *Farm) WaitWorkers(t T, what string, wanted func([]WorkerStatus) bool) {
	t.Helper()
	f.WaitWorkersWithin(t, startLimit, what, wanted)
}

// WaitWorkersWithin is WaitWorkers with a limit of its own.
func (f *Farm) WaitWorkersWithin(t T, limit time.Duration, what string, wanted func([]WorkerStatus) bool) {
	t.Helper()
	Eventually(t, limit, what, func() (string, bool) {
		if !f.Coordinator.Running() {
			t.Fatalf("%s: the coordinator has ended:\n%s", what, f.Coordinator.Tail())
		}
		list, err := f.List()
		if err != nil {
			return err.Error() + "\n" + f.Logs(), false
		}
		return fmt.Sprintf("%+v", list), wanted(list)
	})
}

// UsedSlots adds up the slots in use.
func UsedSlots(list []WorkerStatus) int {
	used := 0
	for _, w := range list {
		used += w.Slots.Used
	}
	return used
}

// Find returns a worker of the list by name.
func Find(list []WorkerStatus, name string) (WorkerStatus, bool) {
	i := slices.IndexFunc(list, func(w WorkerStatus) bool { return w.Name == name })
	if i < 0 {
		return WorkerStatus{}, false
	}
	return list[i], true
}

var (
	portsMu sync.Mutex
	ports   = map[string]bool{} // handed out by freePort
)

// freePort returns a local address that nothing listens on and that was not handed out before.
func freePort(t T) string {
	t.Helper()
	portsMu.Lock()
	defer portsMu.Unlock()
	for range 100 {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatalf("looking for a free port: %v", err)
		}
		addr := listener.Addr().String()
		listener.Close()
		if !ports[addr] {
			ports[addr] = true
			return addr
		}
	}
	t.Fatalf("looking for a free port: the kernel offers the same ones again and again")
	return ""
}
