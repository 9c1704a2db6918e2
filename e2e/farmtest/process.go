package farmtest

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stopLimit is how long a process may take to stop on SIGTERM before it is killed.
const stopLimit = 15 * time.Second

// logTail is how many bytes of a log are shown when a test fails.
const logTail = 6 << 10

// Process is a program that runs beside the test, in a process group of its own.
type Process struct {
	Name string

	cmd  *exec.Cmd // nil: another process has started it
	fd   int       // pidfd of one that another process has started
	pid  int
	out  *output
	done chan struct{}
	err  error // of Wait; read after done
}

// Spec says what to start.
type Spec struct {
	Name  string // in logs
	Path  string
	Args  []string
	Env   []string // added to the environment
	Dir   string
	In    io.Reader
	Files []*os.File // further open files, from 3 on
	Keep  bool       // the caller stops it: no clean-up when the test ends other than killing what still runs
	Heir  bool       // its output may go on when it has ended: a process that it has started writes there, too
}

// StartProcess starts a program and makes sure it has ended when the test has.
func StartProcess(t T, spec Spec) *Process {
	t.Helper()
	cmd := exec.Command(spec.Path, spec.Args...)
	cmd.Env, cmd.Dir, cmd.Stdin, cmd.ExtraFiles = cleanEnv(spec.Env...), spec.Dir, spec.In, spec.Files
	if spec.Keep {
		cmd.Env = append(cmd.Env, endsAtOnce())
	}
	p := &Process{Name: spec.Name, cmd: cmd, out: newOutput(), done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.out, p.out
	if spec.Heir {
		w := p.out.pipe(t)
		defer w.Close()
		cmd.Stdout, cmd.Stderr = w, w
	}
	// Should the test binary be killed (go test does on its timeout), nothing must stay behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second // a grandchild may hold the output open
	if err := spawn(cmd); err != nil {
		t.Fatalf("starting %s: %v", spec.Name, err)
	}
	p.pid = cmd.Process.Pid
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	if spec.Keep {
		t.Cleanup(p.Kill)
	} else {
		p.endWith(t)
	}
	return p
}

// endWith stops the process at the end of the test, whose failure shows its log.
func (p *Process) endWith(t T) {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s, its end:\n%s", p.Name, p.Tail())
		}
		p.Stop(t)
		p.complain(t)
	})
}

// adopt makes a process that p has started one of the test's.
func (p *Process) adopt(t T, pid int) *Process {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatalf("looking after process %d, which %s has started: %v", pid, p.Name, err)
	}
	heir := &Process{Name: p.Name, fd: fd, pid: pid, out: p.out, done: make(chan struct{})}
	go func() { // ends with the process, which endWith sees to
		defer close(heir.done)
		for {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	}()
	t.Cleanup(func() { _ = unix.Close(fd) })
	heir.endWith(t)
	return heir
}

// complain fails the test for what no program may say, whatever the test is about. The race detector speaks where the
// tested binary was built with -race.
func (p *Process) complain(t T) {
	text := "\n" + p.Output()
	for _, sign := range []string{"\nWARNING: DATA RACE", "\npanic: ", "\nfatal error: "} {
		if i := strings.Index(text, sign); i >= 0 {
			t.Errorf("%s said:%s", p.Name, text[i:min(len(text), i+logTail)])
		}
	}
}

// spawn starts every process from one thread that never ends: the kernel sends Pdeathsig when the *thread* that
// started a process ends, and Go ends threads as it likes.
func spawn(cmd *exec.Cmd) error {
	spawner.Do(func() {
		go func() {
			runtime.LockOSThread()
			for start := range starts {
				start()
			}
		}()
	})
	result := make(chan error, 1)
	starts <- func() { result <- cmd.Start() }
	return <-result
}

var (
	spawner sync.Once
	starts  = make(chan func())
)

// endsAtOnce is the environment of a command that was built with -race: at its end that sleeps for a second, to hear of
// more races, which makes a test of many commands a slow one.
func endsAtOnce() string { return "GORACE=" + os.Getenv("GORACE") + " atexit_sleep_ms=0" }

// Pid is the process's id.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Running reports whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the process alone; one that has ended is left in peace.
func (p *Process) Signal(sig syscall.Signal) {
	switch {
	case !p.Running():
	case p.cmd == nil:
		_ = unix.PidfdSendSignal(p.fd, sig, nil, 0)
	default:
		_ = p.cmd.Process.Signal(sig)
	}
}

// SignalGroup sends a signal to the process and its children, as a terminal does on Ctrl-C.
func (p *Process) SignalGroup(sig syscall.Signal) {
	if p.Running() {
		_ = syscall.Kill(-p.Pid(), sig)
	}
}

// Kill ends the process and its group with SIGKILL, and waits.
func (p *Process) Kill() {
	switch {
	case p.cmd == nil:
		p.Signal(syscall.SIGKILL)
	case p.Running():
		_ = syscall.Kill(-p.Pid(), syscall.SIGKILL)
	}
	<-p.done
}

// Wait waits for the process to end and returns its exit code, or fails the test when it has not within the limit.
// A process that a signal ended has the code 128 + signal, as in a shell.
func (p *Process) Wait(t T, limit time.Duration) int {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-p.done:
		return p.code()
	case <-timer.C:
		t.Fatalf("%s still runs after %v; the end of its output:\n%s", p.Name, limit, p.Tail())
		return -1
	}
}

func (p *Process) code() int {
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) {
		if p.err != nil && !errors.Is(p.err, exec.ErrWaitDelay) {
			return -1
		}
		return 0
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return exit.ExitCode()
}

// Stop ends the process with SIGTERM, and fails the test if that takes too long.
func (p *Process) Stop(t T) {
	if !p.Running() {
		return
	}
	p.Signal(syscall.SIGTERM)
	timer := time.NewTimer(stopLimit)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
		t.Errorf("%s did not stop within %v of SIGTERM and was killed; the end of its output:\n%s", p.Name, stopLimit, p.Tail())
		p.Kill()
	}
}

// Output is everything the process has written so far.
func (p *Process) Output() string { return p.out.String() }

// Tail is the end of the output.
func (p *Process) Tail() string {
	text := p.Output()
	if len(text) > logTail {
		text = "…" + text[len(text)-logTail:]
	}
	return text
}

// WaitOutput waits until match finds something in the output and returns that, or fails the test when the
// process ends or the limit passes before.
func (p *Process) WaitOutput(t T, limit time.Duration, what string, match func(output string) string) string {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	for {
		changed := p.out.watch()
		ended := !p.Running()
		if found := match(p.Output()); found != "" {
			return found
		}
		if ended {
			t.Fatalf("%s ended (exit code %d) before %s; its output:\n%s", p.Name, p.code(), what, p.Tail())
			return ""
		}
		select {
		case <-changed:
		case <-p.done:
		case <-timer.C:
			t.Fatalf("%s: no %s within %v; its output:\n%s", p.Name, what, limit, p.Tail())
			return ""
		}
	}
}

// Contains makes a match for WaitOutput.
func Contains(want string) func(string) string {
	return func(output string) string {
		if strings.Contains(output, want) {
			return want
		}
		return ""
	}
}

// output collects what a process writes, and tells when there is more.
type output struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{} // closed and replaced with every write
}

func newOutput() *output { return &output{changed: make(chan struct{})} }

// pipe returns what a process can write to, and hand down.
func (o *output) pipe(t T) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatalf("making a pipe: %v", err)
	}
	go func() { // ends with the last process that has the other end
		_, _ = io.Copy(o, r)
		_ = r.Close()
	}()
	return w
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	close(o.changed)
	o.changed = make(chan struct{})
	return o.buf.Write(b)
}

func (o *output) watch() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.changed
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
