package managed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

// dieEnv makes the test binary an agent that waits to be killed.
const dieEnv = "ARCHFARM_TEST_MANAGED_IN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(dieEnv); dir != "" {
		if _, err := Start(context.Background(), Config{Program: filepath.Join(dir, "buildkitd"), Dir: dir}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		select {}
	}
	goleak.VerifyTestMain(m)
}

// patience is when a test gives up to wait.
const patience = 30 * time.Second

var hasty = timing{firstPause: 20 * time.Millisecond, lastPause: 100 * time.Millisecond, soundAfter: time.Hour, stopWithin: 200 * time.Millisecond}

// testLog is a log that a test can look into.
type testLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *testLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *testLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *testLog) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// folder is short enough for a socket.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "af")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// script is a buildkitd of the given version that does what body says.
func script(t *testing.T, dir, version, body string) string {
	t.Helper()
	file := filepath.Join(dir, "buildkitd")
	text := "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'buildkitd github.com/moby/buildkit " + version + " 0123'; exit; }\n" + body + "\n"
	if err := os.WriteFile(file, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return file
}

func wait(t *testing.T, d *Daemon, what string, want func(failure string) bool) string {
	t.Helper()
	late := time.After(patience)
	for {
		failure, changed := d.Failure()
		if want(failure) {
			return failure
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("%s: it does not come; failure %q", what, failure)
		}
	}
}

func TestStart_RefusesWhatItCannotUse(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		version string // empty: there is no buildkitd
		dir     string
		want    string
	}{
		"old":          {"v0.16.9", "", "v0.17.0 is the oldest"},
		"missing":      {"", "", "--buildkitd"},
		"a long path":  {"v0.17.0", strings.Repeat("x", 100), "shorter --data-dir"},
		"no buildkitd": {"", "/bin/true", "is no buildkitd"},
	} {
		dir := folder(t)
		cfg := Config{Program: filepath.Join(dir, "buildkitd"), Dir: filepath.Join(dir, test.dir)}
		if test.version != "" {
			script(t, dir, test.version, "exec sleep 1000")
		} else if test.dir != "" {
			cfg.Program = test.dir
		}
		d, err := Start(t.Context(), cfg)
		if err == nil {
			_ = d.Close()
		}
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
	}
}

func TestStart_TakesABuildWithoutAVersion(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	d, err := Start(t.Context(), Config{Program: script(t, dir, "v0.0.0+unknown", "exec sleep 1000"), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func TestDaemon_SaysWhyItDoesNotRunAndComesBack(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	program := script(t, dir, "v0.34.2", `printf 'buildkitd: the flux is low\nmain.main\n\tmain.go:1\n' >&2; exit 3`)
	d, err := start(t.Context(), Config{Program: program, Dir: dir}, hasty)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}()
	why := wait(t, d, "the end", func(failure string) bool { return failure != "" })
	if !strings.Contains(why, "exit status 3") || !strings.Contains(why, "the flux is low") {
		t.Errorf("failure %q", why)
	}
	script(t, dir, "v0.34.2", "exec sleep 1000")
	wait(t, d, "the new start", func(failure string) bool { return failure == "" })
}

func TestClose_KillsWhatDoesNotEnd(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	ready := filepath.Join(dir, "ready")
	d, err := start(t.Context(), Config{Program: script(t, dir, "v0.34.2", "trap '' TERM; echo $$ >"+ready+".new; mv "+ready+".new "+ready+"; while :; do sleep 1000; done"), Dir: dir}, hasty)
	if err != nil {
		t.Fatal(err)
	}
	pid := pidIn(t, ready)
	if err := d.Close(); err == nil || !strings.Contains(err.Error(), "was killed") {
		t.Errorf("error %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the process is still there: %v", err)
	}
}

// pidIn waits for a file with a process id.
func pidIn(t *testing.T, file string) (pid int) {
	t.Helper()
	eventually(t, "a process id in "+file, func() bool {
		raw, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		pid, err = strconv.Atoi(strings.TrimSpace(string(raw)))
		return err == nil
	})
	return pid
}

func eventually(t *testing.T, what string, check func() bool) {
	t.Helper()
	tick, late := time.NewTicker(20*time.Millisecond), time.After(patience)
	defer tick.Stop()
	for !check() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("%s: it does not come", what)
		}
	}
}

func TestDaemon_EndsWhenTheAgentIsKilled(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	file := filepath.Join(dir, "pid")
	script(t, dir, "v0.34.2", "echo $$ >"+file+"; exec sleep 1000")
	agent := exec.Command(os.Args[0])
	agent.Env = append(os.Environ(), dieEnv+"="+dir)
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	pid := pidIn(t, file)
	_ = agent.Process.Kill()
	_ = agent.Wait()
	eventually(t, "the end of buildkitd", func() bool { return gone(pid) })
}

// gone tells whether a process has ended; nobody may have taken note of it yet.
func gone(pid int) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(raw), ") Z ")
}

// buildkitd is the real one.
func buildkitd(t *testing.T) string {
	t.Helper()
	program, err := filepath.Abs("../../bin/tools/buildkitd")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		cannotRun(t, "buildkitd is missing, run make tools")
	}
	if os.Geteuid() != 0 {
		cannotRun(t, "buildkitd needs root")
	}
	return program
}

func cannotRun(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("CI") == "true" || os.Getenv("ARCHFARM_E2E") == "require" {
		t.Fatalf("tests with a real buildkitd are required here but cannot run: %s", why)
	}
	t.Skipf("SKIPPED: %s", why)
}

func TestDaemon_ARealOneIsBackAfterAKill(t *testing.T) {
	t.Parallel()
	program, dir, log := buildkitd(t), folder(t), &testLog{}
	d, err := start(t.Context(), Config{Program: program, Args: []string{"--oci-worker-net=host"}, Dir: filepath.Join(dir, "w"), Logger: log.logger()}, timing{
		firstPause: hasty.firstPause, lastPause: hasty.lastPause, soundAfter: time.Hour, stopWithin: patience,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("the end: %v", err)
		}
		if t.Failed() {
			t.Log(log)
		}
	})
	if info, err := os.Stat(d.path("")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the folder: %v %v", info.Mode(), err)
	}
	c, err := client.New(t.Context(), d.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wantPolicies(t, c)

	lock := d.path("buildkit/buildkitd.lock")
	if err := d.clear(); err == nil || !strings.Contains(err.Error(), "another buildkitd") {
		t.Errorf("clearing up beside a running one: %v", err)
	}
	if err := syscall.Kill(processWith(t, d.path(configFile)), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another start", func() bool { return strings.Contains(log.String(), "signal: killed") })
	if _, err := os.Stat(lock); err != nil {
		t.Error(err)
	}
	eventually(t, "an answer", func() bool {
		_, err := c.Info(t.Context())
		return err == nil
	})
	if text := log.String(); !strings.Contains(text, "from=buildkitd") || !strings.Contains(text, "running server on") || strings.Contains(text, "logrus") {
		t.Error("buildkitd's log is not in the agent's")
	}
}

// processWith finds the process that has an argument.
func processWith(t *testing.T, arg string) (pid int) {
	t.Helper()
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		if raw, err := os.ReadFile(line); err == nil && strings.Contains(string(raw), "\x00"+arg+"\x00") {
			pid, _ = strconv.Atoi(filepath.Base(filepath.Dir(line)))
			return pid
		}
	}
	t.Fatalf("no process has the argument %s", arg)
	return 0
}

// wantPolicies waits for buildkitd and checks that it has read its configuration.
func wantPolicies(t *testing.T, c *client.Client) {
	t.Helper()
	var workers []*client.WorkerInfo
	eventually(t, "buildkitd's answer", func() (ok bool) {
		var err error
		workers, err = c.ListWorkers(t.Context())
		return err == nil
	})
	if len(workers) != 1 || len(workers[0].GCPolicy) != 4 {
		t.Fatalf("workers %+v", workers)
	}
	for i, p := range workers[0].GCPolicy {
		switch {
		case p.MaxUsedSpace <= 0, p.All != (i == 3), (len(p.Filter) > 0) != (i == 0),
			i > 0 && (p.ReservedSpace <= 0 || p.MinFreeSpace <= 0 || p.ReservedSpace >= p.MaxUsedSpace),
			i < 2 && p.KeepDuration < 24*time.Hour:
			t.Errorf("policy %d: %+v", i, p)
		}
	}
}

func TestSpaceOn_FitsTheDisk(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		disk := rapid.Uint64Range(1<<20, 1<<50).Draw(r, "disk")
		s := spaceOn(disk)
		if s.reserved == 0 || s.reserved >= s.used || s.used+s.free > disk || s.scratch == 0 || s.scratch > disk/9 {
			r.Fatalf("%+v on a disk of %d", s, disk)
		}
	})
}

func TestParseVersion(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Version{
		"buildkitd github.com/moby/buildkit v0.34.2 abc": {0, 34, 2},
		"buildkitd github.com/moby/buildkit 0.17.0-rc1":  {0, 17, 0},
		"v1.2.3+unknown":  {1, 2, 3},
		"v0.0.0+unknown":  {},
		"buildkitd devel": {},
		"v99999999.1.1":   {},
	} {
		if v, known := ParseVersion(text); v != want || known != (want != Version{}) {
			t.Errorf("%q: %s, %v", text, v, known)
		}
	}
	for _, v := range []Version{{0, 16, 9}, {0, 9, 20}} {
		if !v.Before(Minimum) || Minimum.Before(v) || v.Before(v) {
			t.Errorf("%s is not before %s", v, Minimum)
		}
	}
}

func TestParseLine(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]struct {
		level   slog.Level
		message string
		plain   bool
	}{
		`{"level":"warning","msg":"using host network","time":"2026-01-01T00:00:00Z"}`: {slog.LevelWarn, "using host network", false},
		`{"error":"gone","level":"fatal","msg":"x","time":"2026-01-01T00:00:00Z"}`:     {slog.LevelError, "x", false},
		`time="2026-01-01T00:00:00Z" level=debug msg="a \"b\"" other=1`:                {slog.LevelDebug, `a "b"`, false},
		`time=2026 level=error msg=short`:                                              {slog.LevelError, "short", false},
		`buildkitd: could not lock`:                                                    {slog.LevelInfo, "buildkitd: could not lock", true},
		`{"level":`:                                                                    {slog.LevelInfo, `{"level":`, true},
	} {
		level, message, fields := parseLine(line)
		if level != want.level || message != want.message || (fields == nil) != want.plain {
			t.Errorf("%s: %s %q %v", line, level, message, fields)
		}
	}
}

func FuzzOutput(f *testing.F) {
	f.Add([]byte("{\"level\":\"info\",\"msg\":\"x\"}\n"), 3)
	f.Add([]byte("time=1 level=info msg=\"\\xff\"\nlast"), 1)
	f.Add(bytes.Repeat([]byte("x"), 2*maxLine), 1000)
	f.Fuzz(func(t *testing.T, text []byte, size int) {
		o := newOutput(slog.New(slog.DiscardHandler))
		for rest := text; len(rest) > 0; {
			n := min(max(1, size), len(rest))
			if got, err := o.Write(rest[:n]); got != n || err != nil {
				t.Fatal(got, err)
			}
			rest = rest[n:]
			if len(o.line) > maxLine {
				t.Fatalf("%d bytes kept", len(o.line))
			}
		}
		if s := o.explain(nil).Error(); len(s) > 2*maxLast+100 {
			t.Fatalf("an error of %d bytes", len(s))
		}
	})
}
