package farmtest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
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
	Via       string   // the address, tcp://…, at which it is told to find that; empty: the coordinator's own
	TCP       bool     // its buildkitd listens on TCP, as in a virtual machine
	Args      []string // further arguments of its agent
	Behind    *Network // the network that its agent is in; nil: this machine's
	Pool      string   // of its certificate, where the farm is a secured one
}

// FarmOptions describe a farm.
type FarmOptions struct {
	Workers         []WorkerSpec
	CoordinatorArgs []string
	// Host is the address of this machine that the coordinator listens on, instead of loopback: then everybody needs a
	// certificate, its workers join with tokens, and Client is none (Secured makes one).
	Host string
	// CoordinatorEnv is added to the coordinator's environment, at each start.
	CoordinatorEnv []string
}

// Farm is a running coordinator with its workers.
type Farm struct {
	Endpoint
	Coordinator *Process
	Gossip      string // host:port
	HTTP        string // http://host:port
	Workers     []*FarmWorker
	Admin       string // unix://…, to administer it by
	DataDir     string // of the coordinator
	tools       Tools
	secured     bool
	args, env   []string // of the coordinator
}

// FarmWorker is a buildkitd with the agent beside it.
type FarmWorker struct {
	WorkerSpec
	Buildkitd *Buildkitd
	Agent     *Process
	DataDir   string // of the agent
}

// WorkerStatus is one element of what archfarm workers --output json prints.
type WorkerStatus struct {
	Name      string   `json:"name"`
	Platforms []string `json:"platforms"`
	Emulated  []string `json:"emulated"`
	Slots     struct {
		Total int `json:"total"`
		Used  int `json:"used"`
	} `json:"slots"`
	Pool    string    `json:"pool"`
	State   string    `json:"state"`
	Reason  string    `json:"reason"`
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
	listen, web, gossip, dir := freePort(t), freePort(t), freePort(t), Folder(t)
	f := &Farm{
		tools: tools, Gossip: gossip, HTTP: "http://" + web, Admin: "unix://" + filepath.Join(dir, "admin.sock"), DataDir: dir, env: options.CoordinatorEnv,
	}
	if options.Host != "" {
		listen, f.secured = strings.Replace(listen, "127.0.0.1", options.Host, 1), true
	}
	args := []string{"coordinator", "--listen", listen, "--http", web, "--gossip", gossip, "--data-dir", dir}
	f.args = append(args, options.CoordinatorArgs...)
	f.Addr = "tcp://" + listen
	f.StartCoordinator(t)
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
	f.Farm = f
	if !f.secured {
		f.Client = NewClient(t, tools, f.Addr)
	}
	return f
}

// StartCoordinator starts the coordinator of a farm whose coordinator does not run, with something more in its
// environment.
func (f *Farm) StartCoordinator(t T, env ...string) {
	t.Helper()
	f.Coordinator = StartProcess(t, Spec{Name: "coordinator", Path: f.tools.Archfarm, Args: f.args, Env: append(f.env[:len(f.env):len(f.env)], env...), Heir: true})
	f.parts = append(f.parts, f.Coordinator)
}

// RestartCoordinator stops the coordinator, and starts it anew with the same folder.
func (f *Farm) RestartCoordinator(t T) {
	t.Helper()
	f.Coordinator.Stop(t)
	f.StartCoordinator(t)
}

// StartActivated starts the coordinator as systemd does with a socket unit: the socket is there already.
func (f *Farm) StartActivated(t T, socket net.Listener) {
	t.Helper()
	file, err := socket.(*net.TCPListener).File()
	if err != nil {
		t.Fatalf("passing the socket on: %v", err)
	}
	defer file.Close()
	args := append([]string{"-c", `export LISTEN_PID=$$; exec "$0" "$@"`, f.tools.Archfarm}, f.args...) // the shell's process id stays
	f.Coordinator = StartProcess(t, Spec{
		Name: "coordinator", Path: "/bin/sh", Args: args, Env: append(f.env[:len(f.env):len(f.env)], "LISTEN_FDS=1"), Files: []*os.File{file}, Heir: true,
	})
	f.parts = append(f.parts, f.Coordinator)
}

var started = regexp.MustCompile(`msg="started a successor" pid=(\d+)`)

// Upgrade has the coordinator start a successor, which is f.Coordinator once it serves what is new. The former one,
// which is returned, ends when its builds have.
func (f *Farm) Upgrade(t T) (former *Process) {
	t.Helper()
	former = f.Coordinator
	before := len(former.Output())
	former.Signal(syscall.SIGUSR2)
	pid := former.WaitOutput(t, startLimit, "a successor", func(output string) string {
		if found := started.FindStringSubmatch(output[before:]); found != nil {
			return found[1]
		}
		return ""
	})
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatalf("the successor's process id: %v", err)
	}
	heir := former.adopt(t, n)
	heir.WaitOutput(t, startLimit, "the farm", func(output string) string { return Contains(`msg="handed over`)(output[before:]) })
	f.Coordinator = heir
	f.parts = append(f.parts, heir)
	return former
}

// Token makes a join token: args are those of archfarm token create.
func (f *Farm) Token(t T, args ...string) string {
	t.Helper()
	result := f.manage(t, append([]string{"token", "create", "--output", "json"}, args...)...)
	var made struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal([]byte(result.Output), &made); err != nil || made.Token == "" {
		t.Fatalf("archfarm token create %s: exit code %d: %v:\n%s", args, result.Code, err, result.Output)
	}
	return made.Token
}

// Secured joins the farm as a client, and returns a buildx that uses the certificate. Args are those of archfarm token
// create --client.
func (f *Farm) Secured(t T, args ...string) (client *Client, dir string) {
	t.Helper()
	dir = filepath.Join(Folder(t), "certificate")
	addr := strings.TrimPrefix(f.Addr, "tcp://")
	result := Command(t, f.tools.Archfarm, "client-cert", "--farm", addr, "--dir", dir, "--token", f.Token(t, append([]string{"--client"}, args...)...))
	if result.Code != 0 {
		t.Fatalf("archfarm client-cert: exit code %d:\n%s", result.Code, result.Output)
	}
	// The line that it prints is what people copy.
	_, line, found := strings.Cut(result.Output, "docker buildx create ")
	if !found {
		t.Fatalf("archfarm client-cert prints no docker buildx create:\n%s", result.Output)
	}
	line, _, _ = strings.Cut(line, "\n")
	options := slices.DeleteFunc(strings.Fields(line), func(s string) bool { return s == "--use" })
	if i := slices.Index(options, "--driver-opt"); i >= 0 {
		return NewClientOf(t, f.tools, "--driver-opt", options[i+1], f.Addr), dir
	}
	t.Fatalf("archfarm client-cert prints no --driver-opt: %s", line)
	return nil, ""
}

// Manage runs an archfarm command through the coordinator's own socket, and fails the test unless that succeeds.
func (f *Farm) Manage(t T, args ...string) Result {
	t.Helper()
	result := f.manage(t, args...)
	if result.Code != 0 {
		t.Fatalf("archfarm %s: exit code %d:\n%s", strings.Join(args, " "), result.Code, result.Output)
	}
	return result
}

func (f *Farm) manage(t T, args ...string) Result {
	t.Helper()
	f.awaitCoordinator(t)
	return Command(t, f.tools.Archfarm, append(args, "--farm", f.Admin)...)
}

// awaitCoordinator waits until the coordinator, which may have been started a moment ago, listens on its own socket.
func (f *Farm) awaitCoordinator(t T) {
	t.Helper()
	Eventually(t, startLimit, "the coordinator listens", func() (string, bool) {
		if !f.Coordinator.Running() {
			t.Fatalf("the coordinator has ended:\n%s", f.Coordinator.Tail())
		}
		conn, err := net.DialTimeout("unix", strings.TrimPrefix(f.Admin, "unix://"), startLimit)
		if err != nil {
			return err.Error(), false
		}
		return "", conn.Close() == nil
	})
}

// Command runs a program to its end.
func Command(t T, path string, args ...string) Result {
	t.Helper()
	return finish(t, StartProcess(t, Spec{Name: filepath.Base(path) + " " + args[0], Path: path, Args: args, Keep: true}))
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
	w := &FarmWorker{WorkerSpec: spec, Buildkitd: start(t, f.tools, spec.Name), DataDir: Folder(t)}
	if f.secured {
		token := []string{"--worker"}
		if spec.Pool != "" {
			token = append(token, "--pool", spec.Pool)
		}
		w.Args = append(w.Args[:len(w.Args):len(w.Args)], "--token", f.Token(t, token...))
		w.Dials = true
	}
	f.Workers = append(f.Workers, w)
	f.parts = append(f.parts, w.Buildkitd.Process)
	f.RestartAgent(t, w)
	return w
}

// RestartAgent starts the agent of a worker whose agent does not run.
func (f *Farm) RestartAgent(t T, w *FarmWorker) {
	t.Helper()
	spec := w.WorkerSpec
	if w.DataDir == "" {
		w.DataDir = Folder(t)
	}
	args := []string{"worker", "--name", spec.Name, "--buildkit", w.Buildkitd.Addr, "--slots", strconv.Itoa(spec.Slots), "--data-dir", w.DataDir}
	if spec.Dials {
		args = append(args, "--coordinator", strings.TrimPrefix(cmp.Or(spec.Via, f.Addr), "tcp://"))
	} else {
		args = append(args, "--join", f.Gossip, "--gossip", "127.0.0.1:0")
	}
	for _, platform := range spec.Platforms {
		args = append(args, "--platform", platform)
	}
	path, args := spec.Behind.command(f.tools.Archfarm, append(args, spec.Args...))
	w.Agent = StartProcess(t, Spec{Name: "agent of " + spec.Name, Path: path, Args: args})
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
	addr := f.Addr
	if f.secured {
		addr = f.Admin
	}
	cmd := exec.Command(f.tools.Archfarm, "workers", "--farm", addr, "--output", "json")
	cmd.Env = cleanEnv(endsAtOnce())
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
