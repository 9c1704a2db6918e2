package address_test

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"errors"

	"github.com/archfarm/archfarm/address"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]address.Address{
		"127.0.0.1:8372":          {Network: "tcp", Addr: "127.0.0.1:8372"},
		"tcp://127.0.0.1:8372":    {Network: "tcp", Addr: "127.0.0.1:8372"},
		":8372":                   {Network: "tcp", Addr: ":8372"},
		"farm_a.example.com:08":   {Network: "tcp", Addr: "farm_a.example.com:8"},
		"[::1]:0":                 {Network: "tcp", Addr: "[::1]:0"},
		"tcp://[fe80::1%eth0]:80": {Network: "tcp", Addr: "[fe80::1%eth0]:80"},
		"unix:///run/b.sock":      {Network: "unix", Addr: "/run/b.sock"},
		"unix:///run/b c%20.sock": {Network: "unix", Addr: "/run/b c%20.sock"},
	} {
		got, err := address.Parse(in)
		if err != nil || got != want {
			t.Errorf("Parse(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
}

func TestParse_RefusesWithAReason(t *testing.T) {
	t.Parallel()
	for in, reason := range map[string]string{
		"":                                      "host:port",
		"localhost":                             "host:port",
		"::1:8372":                              "host:port",
		"localhost:http":                        "port",
		"localhost:65536":                       "port",
		"localhost:-1":                          "port",
		"tcp://user@host:1":                     "character",
		"tcp://host:1/path":                     "port",
		"http://host:1":                         "scheme",
		"unix://relative.sock":                  "absolute",
		"unix:/run/a.sock":                      "port",
		"unix:///":                              "directory",
		"unix:///a\x00b":                        "control",
		"unix:///" + strings.Repeat("a", 200):   "bytes",
		strings.Repeat("a", 300) + ".test:8372": "long",
		"ho st:1":                               "character",
	} {
		_, err := address.Parse(in)
		if !errors.Is(err, address.ErrInvalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("Parse(%q): error %v; want one that says %q", in, err, reason)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"127.0.0.1:1", "tcp://[::1]:2", "unix:///a", "://", "tcp://", "unix://", "a:b:c", "[::1%x]:9"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := address.Parse(s)
		if err != nil {
			if !a.IsZero() {
				t.Fatalf("Parse(%q) gave %v beside an error", s, a)
			}
			return
		}
		again, err := address.Parse(a.String())
		if err != nil || again != a {
			t.Fatalf("Parse(%q) = %v, whose String reads back as %v, %v", s, a, again, err)
		}
	})
}

func TestListen_TCPIsDialedAtItsRealPort(t *testing.T) {
	t.Parallel()
	l := listen(t, address.Address{Network: "tcp", Addr: "127.0.0.1:0"})
	real, err := address.Parse(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	dial(t, real)
}

func TestListen_SocketIsForOwnerAndGroup(t *testing.T) {
	t.Parallel()
	a := socket(t)
	listen(t, a)
	info, err := os.Stat(a.Addr)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Mode(); got != fs.ModeSocket|0o660 {
		t.Errorf("mode %v, want %v", got, fs.ModeSocket|0o660)
	}
	dial(t, a)
}

func TestListen_RemovesTheSocketOfADeadProcess(t *testing.T) {
	t.Parallel()
	a := socket(t)
	l, err := a.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after a kill -9
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	listen(t, a)
	dial(t, a)
}

func TestListen_LeavesTheSocketOfALiveProcess(t *testing.T) {
	t.Parallel()
	a := socket(t)
	listen(t, a)
	if l, err := a.Listen(t.Context()); !errors.Is(err, syscall.EADDRINUSE) {
		t.Fatalf("listening twice: %v, %v; want EADDRINUSE", l, err)
	}
	dial(t, a)
}

func TestListen_LeavesWhatIsNoSocket(t *testing.T) {
	t.Parallel()
	a := socket(t)
	if err := os.WriteFile(a.Addr, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Listen(t.Context()); err == nil {
		t.Fatal("listened in the place of a file")
	}
	if b, err := os.ReadFile(a.Addr); err != nil || string(b) != "precious" {
		t.Errorf("the file is now %q, %v", b, err)
	}
}

// socket is a fresh path, short enough for sockaddr_un under any TMPDIR.
func socket(t *testing.T) address.Address {
	t.Helper()
	dir, err := os.MkdirTemp("", "af")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return address.Address{Network: "unix", Addr: filepath.Join(dir, "s")}
}

func listen(t *testing.T, a address.Address) net.Listener {
	t.Helper()
	l, err := a.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t *testing.T, a address.Address) {
	t.Helper()
	c, err := a.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

func TestLocal(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		"unix:///run/a.sock": true, "127.0.0.1:1": true, "127.8.0.1:1": true, "[::1]:1": true, "localhost:1": true,
		"0.0.0.0:1": false, ":1": false, "10.0.0.1:1": false, "farm.example:1": false, "localhost.example:1": false, "[::]:1": false,
	} {
		a, err := address.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := a.Local(); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}
