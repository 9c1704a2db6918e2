// Package postgrestest starts a private PostgreSQL server for tests, from Debian's
// package or a like one, and leaves nothing behind.
//
// It uses its own folder, a Unix socket in it and a free port of the loopback
// interface. As the server refuses to be root's, a test that root runs starts it as
// the user postgres, or nobody.
package postgrestest

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	superuser = "archfarm"
	// starting bounds how long a server may take until it can be used.
	starting = time.Minute
	// stopping bounds how long it may take to end by itself.
	stopping = 20 * time.Second
)

// ErrMissing is that PostgreSQL's programs are not there.
var ErrMissing = errors.New("no PostgreSQL: install Debian's package postgresql")

// Server is a running server. Its methods are for one goroutine at a time, but for
// Database and the URLs.
type Server struct {
	bin, dir string
	as       *syscall.Credential
	port     int
	password string

	process *exec.Cmd
	log     *log
}

// Start makes a folder, an empty cluster in it, and starts the server, which flushes
// what it commits to the disk as in production. Stop is due.
func Start(ctx context.Context) (_ *Server, err error) {
	bin, err := programs()
	if err != nil {
		return nil, err
	}
	s := &Server{bin: bin, password: rand.Text()}
	if s.as, err = credential(); err != nil {
		return nil, err
	}
	if s.dir, err = os.MkdirTemp("", "archfarm-pg-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting PostgreSQL: %w", errors.Join(err, s.Stop()))
		}
	}()
	secret := filepath.Join(s.dir, "password")
	if err := os.WriteFile(secret, []byte(s.password+"\n"), 0o600); err != nil {
		return nil, err
	}
	if s.as != nil {
		for _, path := range []string{s.dir, secret} {
			if err := os.Chown(path, int(s.as.Uid), int(s.as.Gid)); err != nil {
				return nil, err
			}
		}
	}
	initdb := s.command(ctx, "initdb", "--pgdata="+s.data(), "--username="+superuser, "--pwfile="+secret, "--auth-local=trust",
		"--auth-host=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync")
	if out, err := initdb.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("initdb: %w: %s", err, out)
	}
	return s, s.start(ctx)
}

// programs is the folder of the newest version's.
func programs() (string, error) {
	found, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(found) == 0 {
		if path, err := exec.LookPath("initdb"); err == nil {
			return filepath.Dir(path), nil
		}
		return "", ErrMissing
	}
	version := func(path string) int {
		n, _ := strconv.Atoi(strings.Split(path, "/")[4])
		return n
	}
	return filepath.Dir(slices.MaxFunc(found, func(a, b string) int { return version(a) - version(b) })), nil
}

// credential is whom the server runs as; nil for this process's user.
func credential() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		who, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.ParseUint(who.Uid, 10, 32)
		gid, err2 := strconv.ParseUint(who.Gid, 10, 32)
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(err1, err2)
	}
	return nil, errors.New("neither a user postgres nor a user nobody to run PostgreSQL as")
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, filepath.Join(s.bin, name), args...)
	c.SysProcAttr = attributes(s.as)
	c.Dir = s.dir
	c.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH"), "TZ=UTC"}
	return c
}

// start starts the server, at a free port unless it has had one.
func (s *Server) start(ctx context.Context) (err error) {
	port := s.port
	for try := 0; ; try++ {
		if s.port == 0 {
			if port, err = freePort(); err != nil {
				return err
			}
		}
		if err = s.run(ctx, port); err == nil {
			s.port = port
			return nil
		}
		if try == 2 { // somebody else may have taken the port
			return err
		}
	}
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

func (s *Server) run(ctx context.Context, port int) error {
	s.log = &log{ready: make(chan struct{}), ended: make(chan struct{})}
	// Not the context's: Stop ends it.
	s.process = s.command(context.WithoutCancel(ctx), "postgres", "-D", s.data(), "-k", s.dir, "-p", strconv.Itoa(port),
		"-c", "listen_addresses=127.0.0.1", "-c", "fsync=on", "-c", "max_connections=200", "-c", "log_min_messages=info")
	stderr, err := s.process.StderrPipe()
	if err != nil {
		return err
	}
	started := make(chan error)
	go func() { // until the server has ended
		// The server ends with the thread that started it, which is kept for that.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := s.process.Start()
		started <- err
		if err == nil {
			s.log.read(stderr)
		}
	}()
	if err := <-started; err != nil {
		s.process = nil
		return err
	}
	late := time.NewTimer(starting)
	defer late.Stop()
	select {
	case <-s.log.ready:
		return nil
	case <-s.log.ended:
		err = errors.New("it ended")
	case <-late.C:
		err = errors.New("it is not ready in time")
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	return fmt.Errorf("%w: %w; it said:\n%s", err, s.halt(), s.log.text())
}

// Restart stops the server, breaking all connections, and starts it again at the
// same addresses.
func (s *Server) Restart(ctx context.Context) error {
	return errors.Join(s.Halt(), s.Resume(ctx))
}

// Halt stops the server, breaking all connections.
func (s *Server) Halt() error { return s.halt() }

// Resume starts it again after Halt, at the same addresses.
func (s *Server) Resume(ctx context.Context) error { return s.start(ctx) }

// halt ends the process.
func (s *Server) halt() error {
	if s.process == nil {
		return nil
	}
	defer func() { s.process = nil }()
	_ = s.process.Process.Signal(syscall.SIGINT) // "fast": without waiting for clients
	late := time.AfterFunc(stopping, func() { _ = s.process.Process.Signal(syscall.SIGQUIT) })
	defer late.Stop()
	<-s.log.ended
	var exit *exec.ExitError
	if err := s.process.Wait(); err != nil && !errors.As(err, &exit) {
		return err
	}
	return nil
}

// Stop ends the server and removes its folder.
func (s *Server) Stop() error { return errors.Join(s.halt(), os.RemoveAll(s.dir)) }

// Log is what the server has said since it was started last.
func (s *Server) Log() string { return s.log.text() }

// Dir is the server's folder: its pages, its journal.
func (s *Server) Dir() string { return s.dir }

// URL is the address of a database by the Unix socket.
func (s *Server) URL(database string) string {
	return (&url.URL{
		Scheme: "postgres", User: url.User(superuser), Path: "/" + database,
		RawQuery: url.Values{"host": {s.dir}, "port": {strconv.Itoa(s.port)}}.Encode(),
	}).String()
}

// TCPURL is the address of a database by TCP, with a password.
func (s *Server) TCPURL(database string) string {
	return (&url.URL{
		Scheme: "postgres", User: url.UserPassword(superuser, s.password), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}).String()
}

// Database creates an empty database, whose language sorts unlike bytes do where the
// server can, and returns its name.
func (s *Server) Database(ctx context.Context) (string, error) {
	name := "t" + strings.ToLower(rand.Text())
	err := s.do(ctx, "CREATE DATABASE "+name+" TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en'")
	if err != nil { // before version 15
		err = s.do(ctx, "CREATE DATABASE "+name)
	}
	return name, err
}

// Drop removes a database, whoever uses it.
func (s *Server) Drop(ctx context.Context, name string) error {
	return s.do(ctx, "DROP DATABASE IF EXISTS "+name+" WITH (FORCE)")
}

// Dump is what makes a database, as one script of SQL.
func (s *Server) Dump(ctx context.Context, name string) ([]byte, error) {
	out, err := s.command(ctx, "pg_dump", "--inserts", "--column-inserts", "--no-owner", s.URL(name)).Output()
	if err != nil {
		return nil, fmt.Errorf("pg_dump: %w", err)
	}
	var lines []string
	for line := range strings.Lines(string(out)) {
		if !strings.HasPrefix(line, `\`) && !strings.HasPrefix(line, "-- Dumped ") { // psql's, and versions
			lines = append(lines, line)
		}
	}
	return []byte(strings.Join(lines, "")), nil
}

// Load runs a script of SQL.
func (s *Server) Load(ctx context.Context, name string, script []byte) error {
	return s.in(ctx, name, string(script))
}

func (s *Server) do(ctx context.Context, statement string) error {
	return s.in(ctx, "postgres", statement)
}

func (s *Server) in(ctx context.Context, database, script string) error {
	conn, err := pgx.Connect(ctx, s.URL(database))
	if err != nil {
		return err
	}
	_, err = conn.PgConn().Exec(ctx, script).ReadAll()
	return errors.Join(err, conn.Close(ctx))
}

// log keeps what the server says.
type log struct {
	mu           sync.Mutex
	lines        []string
	ready, ended chan struct{}
}

func (l *log) read(from io.Reader) {
	defer close(l.ended)
	ready := false
	for lines := bufio.NewScanner(from); lines.Scan(); {
		l.mu.Lock()
		l.lines = append(l.lines, lines.Text())
		l.mu.Unlock()
		if !ready && strings.Contains(lines.Text(), "database system is ready to accept connections") {
			ready = true
			close(l.ready)
		}
	}
	_, _ = io.Copy(io.Discard, from) // after a line that is too long
}

func (l *log) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

// The server that the tests of a binary share.
var (
	sharing sync.Mutex
	shared  *Server
)

// Shared is a server for all tests of a binary, whose TestMain uses M. Where
// PostgreSQL is missing, the test is skipped, but not in CI.
func Shared(t testing.TB) *Server {
	t.Helper()
	sharing.Lock()
	defer sharing.Unlock()
	if shared == nil {
		s, err := Start(t.Context())
		Require(t, err)
		shared = s
	}
	return shared
}

// Require ends a test that cannot have a server: skipped where PostgreSQL is
// missing, but not in CI.
func Require(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, ErrMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Database is the name of a new database of the shared server, which goes when the
// test ends.
func Database(t testing.TB) (*Server, string) {
	t.Helper()
	s := Shared(t)
	name, err := s.Database(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Drop(context.WithoutCancel(t.Context()), name); err != nil {
			t.Error(err)
		}
	})
	return s, name
}

// M runs the tests of a binary, as *testing.M does, and stops the shared server.
type M struct{ Tests interface{ Run() int } }

// Run returns the exit code.
func (m M) Run() int {
	code := m.Tests.Run()
	sharing.Lock()
	defer sharing.Unlock()
	if shared != nil {
		if err := shared.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stopping PostgreSQL:", err)
			code = max(code, 1)
		}
		shared = nil
	}
	return code
}
