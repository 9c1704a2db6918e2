package gossip

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
)

func member(name, meta string) *memberlist.Node {
	return &memberlist.Node{Name: name, Addr: net.IPv4(192, 0, 2, 7), Meta: []byte(meta)}
}

func TestCoordinatorAddress(t *testing.T) {
	t.Parallel()
	for meta, want := range map[string]string{
		`{"r":"c","g":"10.0.0.1:8372"}`:              "10.0.0.1:8372",
		`{"r":"c","g":"[2001:db8::1]:8372"}`:         "[2001:db8::1]:8372",
		`{"r":"c","g":"farm:8372","x":"from later"}`: "farm:8372",
		`{"r":"c","g":":8372"}`:                      "192.0.2.7:8372",
		`{"r":"c","g":"[::]:8372"}`:                  "192.0.2.7:8372",
	} {
		if got, ok := coordinatorAddress(member("coordinator/a", meta)); !ok || got != want {
			t.Errorf("%s: %q, %v; want %q", meta, got, ok, want)
		}
	}
}

func TestCoordinatorAddress_IgnoresWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	good := `{"r":"c","g":"10.0.0.1:8372"}`
	for _, m := range []*memberlist.Node{
		member("worker/a", good),
		member("coordinator/", good),
		member("coordinator/a\nb", good),
		member("coordinator", good),
		member("coordinator/a", ""),
		member("coordinator/a", "null"),
		member("coordinator/a", "\xff\xfe"),
		member("coordinator/a", `{"r":"w","g":"10.0.0.1:8372"}`),
		member("coordinator/a", `{"r":"c"}`),
		member("coordinator/a", `{"r":"c","g":"10.0.0.1"}`),
		member("coordinator/a", `{"r":"c","g":"10.0.0.1:0"}`),
		member("coordinator/a", `{"r":"c","g":"10.0.0.1:99999"}`),
		member("coordinator/a", `{"r":"c","g":"a b:1"}`),
		member("coordinator/a", `{"r":"c","g":"unix:///run/x:1"}`),
		member("coordinator/a", `{"r":"c","g":"`+strings.Repeat("a", 300)+`:1"}`),
		member("coordinator/a", good+strings.Repeat(" ", 600)),
	} {
		if got, ok := coordinatorAddress(m); ok {
			t.Errorf("%q with %q gave %q", m.Name, m.Meta, got)
		}
	}
}

func TestMetadata_TheLongestAddressFits(t *testing.T) {
	t.Parallel()
	d, err := newDelegate(Coordinator, strings.Repeat("a", maxHost)+":65535")
	if err != nil || len(d.NodeMeta(memberlist.MetaMaxSize)) > memberlist.MetaMaxSize {
		t.Errorf("%d bytes, %v", len(d.meta), err)
	}
	if _, err := newDelegate(Coordinator, strings.Repeat("a", 600)); err == nil {
		t.Error("took metadata that memberlist would refuse")
	}
}

func TestLogWriter_KeepsTheLevel(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"2026/01/02 03:04:05 [WARN] memberlist: Refuting": `level=WARN msg=Refuting`,
		"2026/01/02 03:04:05 [ERR] memberlist: Conflict":  `level=WARN msg=Conflict`,
		"2026/01/02 03:04:05 [DEBUG] memberlist: x":       `level=DEBUG msg=x`,
		"2026/01/02 03:04:05 [INFO] memberlist: y":        `level=DEBUG msg=y`,
		"anything": `level=DEBUG msg=anything`,
	} {
		var out bytes.Buffer
		w := &logWriter{log: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
		if n, err := w.Write([]byte(line + "\n")); err != nil || n != len(line)+1 {
			t.Errorf("Write: %d, %v", n, err)
		}
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q became %q, want %q", line, out.String(), want)
		}
	}
}

func TestNode_AKilledMemberComesBackOnAnotherPort(t *testing.T) {
	t.Parallel()
	start := func(cfg Config) *Node {
		cfg.Bind = "127.0.0.1:0"
		n, err := Start(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	wait := func(n *Node, want string) {
		t.Helper()
		late := time.After(30 * time.Second)
		for !slices.Equal(n.Coordinators(), []string{want}) {
			select {
			case <-n.Changed():
			case <-late:
				t.Fatalf("coordinators %q, want %q", n.Coordinators(), want)
			}
		}
	}
	closeNode := func(n *Node) {
		if err := n.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}
	w := start(Config{Name: "w", Role: Worker})
	defer closeNode(w)
	killed := start(Config{Name: "c", Role: Coordinator, GRPC: "192.0.2.1:1", Join: []string{w.Addr()}})
	wait(w, "192.0.2.1:1")
	killed.stop() // as a kill: without leaving
	killed.joiner.Wait()
	if err := killed.list.Shutdown(); err != nil {
		t.Fatal(err)
	}
	again := start(Config{Name: "c", Role: Coordinator, GRPC: "192.0.2.2:2", Join: []string{w.Addr()}})
	defer closeNode(again)
	wait(w, "192.0.2.2:2")
}
