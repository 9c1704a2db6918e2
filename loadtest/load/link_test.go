package load

import (
	"bytes"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

func TestPace_BytesTakeTheirTime(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	for name, c := range map[string]struct {
		free time.Time
		want time.Duration // after now
	}{
		"an idle line saves hardly anything up":  {now.Add(-time.Hour), 2*time.Second - oversleep},
		"who has slept too long makes up for it": {now.Add(-time.Millisecond), 2*time.Second - time.Millisecond},
		"a busy line is waited for":              {now.Add(time.Second), 3 * time.Second},
		"a line never used":                      {time.Time{}, 2*time.Second - oversleep},
	} {
		p := pace{free: c.free}
		if got := p.after(now, 200, 100).Sub(now); got != c.want {
			t.Errorf("%s: free after %s, want %s", name, got, c.want)
		}
	}
}

func TestLink_CarriesBothWaysAndEndsWithItsOwner(t *testing.T) {
	t.Parallel()
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() { // echoes one connection; ends with it, or with the listener
		conn, err := server.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
	}()
	var conn net.Conn
	farmtest.Within(t, func(t farmtest.T) {
		addr := NewLink(1<<30).To(t, "tcp://"+server.Addr().String())
		conn, err = net.Dial("tcp", strings.TrimPrefix(addr, "tcp://"))
		if err != nil {
			t.Fatalf("%v", err)
		}
		sent := bytes.Repeat([]byte("context "), 10_000)
		go func() { _, _ = conn.Write(sent) }() // ends with the connection
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("what came back is not what was sent: %v", err)
		}
	})
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("the connection outlives the link")
	}
}
