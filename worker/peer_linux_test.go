package worker

import (
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/worker/native"
)

func TestLookAt_WhereTheDaemonIsDecidesWhoseWordCounts(t *testing.T) {
	t.Parallel()
	said, err := native.Parse([]string{"linux/arm64", "linux/amd64"})
	if err != nil {
		t.Fatal(err)
	}
	fake := startBuildkitd(t, socketPath(t))
	near, err := newDaemon(t.Context(), fake.addr, hasty, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer near.close()
	if _, local, err := near.peer(t.Context()); !local || err != nil {
		t.Error("a daemon of this very process counts as far")
	}
	m, err := lookAt(t.Context(), near, nil)
	if err != nil || len(m.offered) == 0 || len(emulatedOnly(m.native, m.offered)) != 0 {
		t.Errorf("of this machine: %+v, %v", m, err)
	}

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	fake.served.Go(func() { _ = fake.server.Serve(l) })
	far, err := newDaemon(t.Context(), address.Address{Network: "tcp", Addr: l.Addr().String()}, hasty, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer far.close()
	if _, local, err := far.peer(t.Context()); local || err != nil {
		t.Error("a daemon behind TCP counts as near")
	}
	// The fake lists no platforms: nothing is proven, and so nothing is assumed.
	if m, err := lookAt(t.Context(), far, nil); err == nil || !strings.Contains(err.Error(), "--platform") {
		t.Errorf("unproven: %+v, %v", m, err)
	}
	m, err = lookAt(t.Context(), far, said)
	if err != nil || !slices.Equal(native.Format(m.offered), []string{"linux/arm64", "linux/amd64"}) {
		t.Errorf("said: %+v, %v", m, err)
	}
	if got := emulatedOnly(withRelatives(said), m.native); len(got) != 0 {
		t.Errorf("relatives of what is said are called emulated: %q", native.Format(got))
	}
}

func TestIsBuildkitd(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]bool{"buildkitd": true, "rootlesskit": true, "ssh": false, "systemd": false, "limactl": false, "socat": false, "": false} {
		if isBuildkitd(name) != want {
			t.Errorf("%q: %v", name, !want)
		}
	}
}
