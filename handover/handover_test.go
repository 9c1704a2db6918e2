package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// role tells the test binary, when it is started as a successor, what to be.
const role = "HANDOVER_TEST_ROLE"

func TestMain(m *testing.M) {
	if what := os.Getenv(role); what != "" {
		if err := succeed(what); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// succeed is a successor: it answers one caller per socket, and when the predecessor has gone one more.
func succeed(what string) error {
	if what == "dies" {
		return errors.New("it was to die")
	}
	in, err := Inherit()
	if err != nil {
		return err
	}
	if os.Getenv(succession) != "" {
		return errors.New("its children would be successors, too")
	}
	tcp, _ := in.Take("door", "tcp", "")
	unix, _ := in.Take("other", "unix", "")
	if tcp == nil || unix == nil {
		return fmt.Errorf("it was given %v", in.sockets)
	}
	if err := in.Done(); err != nil {
		return err
	}
	if what == "hangs" {
		<-make(chan struct{})
	}
	if err := in.Predecessor.Ready(context.Background()); err != nil {
		return err
	}
	in.Own()
	for _, l := range []net.Listener{tcp, unix} {
		if err := answer(l, "successor"); err != nil {
			return err
		}
	}
	<-in.Predecessor.Gone()
	return errors.Join(answer(tcp, "alone"), tcp.Close(), unix.Close())
}

func answer(l net.Listener, word string) error {
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	_, err = io.WriteString(conn, word)
	return errors.Join(err, conn.Close())
}

type bed struct {
	tcp, unix net.Listener
	path      string
}

func newBed(t *testing.T) bed {
	t.Helper()
	b := bed{path: filepath.Join(t.TempDir(), "sock")}
	var config net.ListenConfig
	var errs [2]error
	b.tcp, errs[0] = config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	b.unix, errs[1] = config.Listen(t.Context(), "unix", b.path)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.tcp.Close(); _ = b.unix.Close() })
	return b
}

func (b bed) start(t *testing.T, what string) *Successor {
	t.Helper()
	t.Setenv(role, what)
	s, err := Start(os.Args[0], nil, []Socket{{"door", b.tcp}, {"other", b.unix}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	return s
}

func (b bed) ask(t *testing.T, l net.Listener) string {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), l.Addr().Network(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	word, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(word)
}

func TestSuccessor_TakesTheSocketsOver(t *testing.T) {
	b := newBed(t)
	s := b.start(t, "serves")
	if err := s.AwaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Who connects while nobody accepts waits.
	if err := errors.Join(b.tcp.Close(), b.unix.Close()); err != nil {
		t.Fatal(err)
	}
	early, err := new(net.Dialer).DialContext(t.Context(), "tcp", b.tcp.Addr().String())
	if err != nil {
		t.Fatalf("while nobody accepts: %v", err)
	}
	defer early.Close()
	if err := s.Serve(); err != nil {
		t.Fatal(err)
	}
	if word, err := io.ReadAll(early); err != nil || string(word) != "successor" {
		t.Errorf("who came early got %q, %v", word, err)
	}
	if got := b.ask(t, b.unix); got != "successor" {
		t.Errorf("by the Unix socket: %q", got)
	}
	_ = s.conn.Close() // as this process's end does
	if got := b.ask(t, b.tcp); got != "alone" {
		t.Errorf("when the predecessor has gone: %q", got)
	}
	<-s.ended
	if s.err != nil {
		t.Errorf("the successor ended with %v", s.err)
	}
	if _, err := os.Stat(b.path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the last owner of a Unix socket leaves its file: %v", err)
	}
}

func TestSuccessor_ThatFailsLeavesTheSockets(t *testing.T) {
	for what, want := range map[string]string{"dies": "exit status 1", "hangs": "patience"} {
		t.Run(what, func(t *testing.T) {
			b := newBed(t)
			s := b.start(t, what)
			ctx, cancel := context.WithCancelCause(t.Context())
			if what == "hangs" {
				cancel(errors.New("patience"))
			}
			defer cancel(nil)
			if err := s.AwaitReady(ctx); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("it should say %q: %v", want, err)
			}
			s.Kill()
			served := make(chan error, 2)
			for _, l := range []net.Listener{b.tcp, b.unix} {
				go func() { served <- answer(l, "still here") }()
				if got := b.ask(t, l); got != "still here" {
					t.Errorf("%s: %q", l.Addr().Network(), got)
				}
				if err := <-served; err != nil {
					t.Error(err)
				}
			}
			// Nobody connects any more: closing must not wait for it.
			go func() { served <- answer(b.tcp, "never") }()
			closed := make(chan error, 1)
			go func() { closed <- b.tcp.Close() }()
			select {
			case err := <-closed:
				if err != nil {
					t.Error(err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the socket is a blocking one: closing it waits for a connection")
			}
			if err := <-served; err == nil {
				t.Error("somebody was served")
			}
		})
	}
}

func TestPredecessor_ThatDiesLeavesItsSuccessorNothing(t *testing.T) {
	b := newBed(t)
	s := b.start(t, "serves")
	if err := s.AwaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = s.conn.Close() // before the word
	<-s.ended
	if s.err == nil {
		t.Error("the successor serves")
	}
	if _, err := os.Stat(b.path); err != nil {
		t.Errorf("the predecessor's socket: %v", err)
	}
}

func TestRead(t *testing.T) {
	t.Parallel()
	const pid = 42
	for name, test := range map[string]struct {
		env  map[string]string
		want []string
		heir bool
		err  string
	}{
		"nothing":                {},
		"systemd, no names":      {env: map[string]string{"LISTEN_PID": "42", "LISTEN_FDS": "2"}, want: []string{"unknown", "unknown"}},
		"systemd":                {env: map[string]string{"LISTEN_PID": "42", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:grpc"}, want: []string{"http", "grpc"}},
		"for another process":    {env: map[string]string{"LISTEN_PID": "43", "LISTEN_FDS": "2"}},
		"no number":              {env: map[string]string{"LISTEN_PID": "42", "LISTEN_FDS": "two"}, err: "LISTEN_FDS"},
		"negative":               {env: map[string]string{"LISTEN_PID": "42", "LISTEN_FDS": "-1"}, err: "LISTEN_FDS"},
		"too many":               {env: map[string]string{"LISTEN_PID": "42", "LISTEN_FDS": "129"}, err: "up to 128"},
		"more names than fds":    {env: map[string]string{"LISTEN_PID": "42", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b"}, err: "2 names for 1"},
		"a predecessor":          {env: map[string]string{succession: "a:b"}, want: []string{"a", "b"}, heir: true},
		"a predecessor's excess": {env: map[string]string{succession: strings.Repeat("a:", 128)}, err: "129 sockets"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := read(func(key string) string { return test.env[key] }, pid)
			if (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Fatalf("error %v, want %q", err, test.err)
			}
			if !slices.Equal(got.names, test.want) || got.successor != test.heir {
				t.Errorf("%+v", got)
			}
		})
	}
}

func FuzzRead(f *testing.F) {
	f.Add("", "7", "2", "a:b")
	f.Add("a:b", "", "", "")
	f.Fuzz(func(t *testing.T, heir, pid, fds, names string) {
		env := map[string]string{succession: heir, "LISTEN_PID": pid, "LISTEN_FDS": fds, "LISTEN_FDNAMES": names}
		kept := maps.Clone(env)
		got, err := read(func(key string) string { return env[key] }, 7)
		if err == nil && len(got.names) > maxSockets {
			t.Errorf("%d sockets", len(got.names))
		}
		if err == nil && !got.successor && len(got.names) > 0 && strconv.Itoa(len(got.names)) != strings.TrimLeft(strings.TrimPrefix(fds, "+"), "0") {
			t.Errorf("%d sockets of %q", len(got.names), fds)
		}
		if !maps.Equal(env, kept) {
			t.Error("the environment changed")
		}
	})
}

func TestTake(t *testing.T) {
	t.Parallel()
	listen := func(address string) *inherited {
		l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return &inherited{name: unnamed, listener: l}
	}
	loopback, anywhere, named := listen("127.0.0.1:0"), listen("0.0.0.0:0"), listen("127.0.0.1:0")
	named.name = "http"
	in := &Inheritance{sockets: []*inherited{loopback, anywhere, named}}
	_, port, _ := net.SplitHostPort(anywhere.listener.Addr().String())
	for _, test := range []struct {
		name, address string
		want          *inherited
	}{
		{"x", "127.0.0.1:1", nil},
		{"http", "127.0.0.1:0", named},
		{"http", "127.0.0.1:0", nil}, // once only
		{"x", "0.0.0.0:" + port, anywhere},
		{"x", loopback.listener.Addr().String(), loopback},
	} {
		got, ok := in.Take(test.name, "tcp", test.address)
		if ok != (test.want != nil) || ok && got != test.want.listener {
			t.Errorf("Take(%q, %q) = %v, %v", test.name, test.address, got, ok)
		}
	}
	if err := in.Done(); err != nil {
		t.Error(err)
	}
	stray := &Inheritance{sockets: []*inherited{listen("127.0.0.1:0")}}
	if err := stray.Done(); err == nil || !strings.Contains(err.Error(), stray.sockets[0].listener.Addr().String()) {
		t.Errorf("a socket that nobody took: %v", err)
	}
	if _, ok := (*Inheritance)(nil).Take("x", "tcp", "127.0.0.1:1"); ok {
		t.Error("nothing was given, but taken")
	}
}

func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify("READY=1"); err != nil {
		t.Errorf("without a manager: %v", err)
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	t.Setenv("NOTIFY_SOCKET", path)
	if err := Notify("MAINPID=7"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, err := conn.Read(buf)
	if err != nil || string(buf[:n]) != "MAINPID=7" {
		t.Errorf("%q, %v", buf[:n], err)
	}
}
