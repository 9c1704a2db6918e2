package fleet_test

import (
	"bytes"

	"errors"
	"net"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/gossip"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	listKeys  = archfarmv1.ChangeGossipKeysRequest_ACTION_LIST
	install   = archfarmv1.ChangeGossipKeysRequest_ACTION_INSTALL
	useKey    = archfarmv1.ChangeGossipKeysRequest_ACTION_USE
	removeKey = archfarmv1.ChangeGossipKeysRequest_ACTION_REMOVE
)

func key(letter byte) []byte { return bytes.Repeat([]byte{letter}, 32) }
func id(letter byte) string  { return gossip.KeyID(key(letter)) }

func ring(letters string) gossip.Keyring {
	var out gossip.Keyring
	for _, l := range []byte(letters) {
		out = append(out, key(l))
	}
	return out
}

// keeper is what a coordinator keeps its keyring in.
type keeper struct {
	ring gossip.Keyring
	full bool
}

func (k *keeper) keep(next gossip.Keyring) error {
	if k.full {
		return errors.New("no space left on device")
	}
	k.ring = next
	return nil
}

func (f *farm) keys(letters string) *keeper {
	k := &keeper{ring: ring(letters)}
	f.KeepKeys(k.ring, k.keep)
	return k
}

// rotates has an agent answer keyrings: with nothing, or with why not.
func (a *agent) rotates(answer func(gossip.Keyring) string) {
	go func() {
		for {
			select {
			case d := <-a.orders:
				_ = a.stream.Send(&archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Done{
					Done: &archfarmv1.Done{DirectiveId: d.GetId(), Error: answer(d.GetGossipKeyring().GetKeys())},
				}})
			case <-a.t.Context().Done():
				return
			}
		}
	}()
}

func willing(gossip.Keyring) string { return "" }

func rotate(t *testing.T, f *farm, action archfarmv1.ChangeGossipKeysRequest_Action, letter byte) (*archfarmv1.ChangeGossipKeysResponse, error) {
	t.Helper()
	ctx := identity.NewContext(t.Context(), identity.Identity{Kind: identity.Admin, Name: "alice", Tenant: "default"})
	req := &archfarmv1.ChangeGossipKeysRequest{Action: action}
	switch {
	case letter == 0:
	case action == install:
		req.Key = key(letter)
	default:
		req.KeyId = id(letter)
	}
	return f.ChangeGossipKeys(ctx, req)
}

func wantKeys(t *testing.T, got *archfarmv1.ChangeGossipKeysResponse, err error, want ...*archfarmv1.GossipKey) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	equal := slices.EqualFunc(got.GetKeys(), want, func(a, b *archfarmv1.GossipKey) bool {
		return a.GetId() == b.GetId() && a.GetPrimary() == b.GetPrimary() && a.GetConfirmed() == b.GetConfirmed() && slices.Equal(a.GetMissing(), b.GetMissing())
	})
	if !equal {
		t.Fatalf("keys %v, want %v", got.GetKeys(), want)
	}
}

func has(letter byte, primary bool, confirmed uint32, missing ...string) *archfarmv1.GossipKey {
	return &archfarmv1.GossipKey{Id: id(letter), Primary: primary, Confirmed: confirmed, Missing: missing}
}

func TestFleet_GossipKeysRotateOnAllWorkers(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		k := f.keys("a")
		for _, name := range []string{"amd-1", "arm-1"} {
			a, _ := f.attach(t, name)
			a.rotates(willing)
		}
		got, err := rotate(t, f, listKeys, 0)
		wantKeys(t, got, err, has('a', true, 2))
		got, err = rotate(t, f, install, 'b')
		wantKeys(t, got, err, has('a', true, 2), has('b', false, 2))
		got, err = rotate(t, f, useKey, 'b')
		wantKeys(t, got, err, has('b', true, 2), has('a', false, 2))
		got, err = rotate(t, f, removeKey, 'a')
		wantKeys(t, got, err, has('b', true, 2))
		if !k.ring.Equal(ring("b")) {
			t.Errorf("%d keys are kept", len(k.ring))
		}
		got, err = rotate(t, f, install, 0)
		if err != nil || len(got.GetKeys()) != 2 || len(k.ring[1]) != 32 {
			t.Errorf("with a key made: %v, %v", got, err)
		}
	})
}

func TestFleet_WorkersThatAttachLaterGetTheKeyring(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.keys("ab")
		_, answer, err := f.knock(t, &archfarmv1.AttachRequest{Message: &archfarmv1.AttachRequest_Hello{Hello: hello("amd-1")}})
		if err != nil || !gossip.Keyring(answer.GetWelcome().GetGossipKeyring().GetKeys()).Equal(ring("ab")) {
			t.Errorf("welcomed with %v, %v", answer, err)
		}
	})
}

func TestFleet_AKeyThatAWorkerHasNotConfirmedIsNotUsed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		k := f.keys("a")
		good, _ := f.attach(t, "amd-1")
		good.rotates(willing)
		broken := true
		bad, _ := f.attach(t, "arm-1")
		bad.rotates(func(gossip.Keyring) string {
			if broken {
				return "disk full"
			}
			return ""
		})
		got, err := rotate(t, f, install, 'b')
		wantKeys(t, got, err, has('a', true, 1, "arm-1"), has('b', false, 1, "arm-1"))
		_, err = rotate(t, f, useKey, 'b')
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "arm-1 (disk full)") || strings.Contains(err.Error(), "amd-1") {
			t.Errorf("used: %v", err)
		}
		if !k.ring.Equal(ring("ab")) {
			t.Error("the keyring was changed")
		}
		broken = false // it is asked again
		got, err = rotate(t, f, useKey, 'b')
		wantKeys(t, got, err, has('b', true, 2), has('a', false, 2))
	})
}

// A worker knows of another coordinator that does not have the key yet.
func TestFleet_AWorkerThatRefusesUndoesTheChangeOnAll(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		k := f.keys("ab")
		var seen []string
		willingly, _ := f.attach(t, "amd-1")
		willingly.rotates(func(r gossip.Keyring) string {
			seen = append(seen, string([]byte{r[0][0]}))
			return ""
		})
		refusing, _ := f.attach(t, "arm-1")
		refusing.rotates(func(r gossip.Keyring) string {
			if r[0][0] == 'b' {
				return "the coordinator at 192.0.2.1:8372 would not understand"
			}
			return ""
		})
		_, err := rotate(t, f, useKey, 'b')
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "arm-1 (the coordinator at 192.0.2.1:8372") {
			t.Errorf("used: %v", err)
		}
		if !k.ring.Equal(ring("ab")) || strings.Join(seen, "") != "aba" {
			t.Errorf("kept %d keys; the other worker's primary keys were %q", len(k.ring), seen)
		}
	})
}

func TestFleet_GossipKeysAreRefused(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		if _, err := rotate(t, f, listKeys, 0); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "not encrypted") {
			t.Errorf("without a keyring: %v", err)
		}
		k := f.keys("ab")
		for name, c := range map[string]struct {
			action archfarmv1.ChangeGossipKeysRequest_Action
			letter byte
			code   codes.Code
			words  string
		}{
			"to use an unknown key":      {useKey, 'c', codes.NotFound, "install it first"},
			"to remove an unknown key":   {removeKey, 'c', codes.NotFound, id('c')},
			"to remove the key in use":   {removeKey, 'a', codes.FailedPrecondition, "use another one first"},
			"to do what does not exist":  {99, 0, codes.InvalidArgument, "install, use or remove"},
			"to use a key without an id": {useKey, 0, codes.NotFound, "no key"},
		} {
			if _, err := rotate(t, f, c.action, c.letter); status.Code(err) != c.code || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%s: %v; want %v with %q", name, err, c.code, c.words)
			}
		}
		admin := identity.NewContext(t.Context(), identity.Identity{Kind: identity.Local, Socket: true})
		_, err := f.ChangeGossipKeys(admin, &archfarmv1.ChangeGossipKeysRequest{Action: install, Key: []byte("short")})
		if status.Code(err) != codes.InvalidArgument || strings.Contains(err.Error(), "short") {
			t.Errorf("a short key: %v", err)
		}
		for _, who := range []identity.Identity{{Kind: identity.Local}, {Kind: identity.Client, Name: "ci"}, {Kind: identity.Worker, Name: "amd-1"}} {
			_, err := f.ChangeGossipKeys(identity.NewContext(t.Context(), who), &archfarmv1.ChangeGossipKeysRequest{Action: listKeys})
			if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "admin.sock") {
				t.Errorf("by %s: %v", who, err)
			}
		}
		k.full = true
		if _, err := rotate(t, f, install, 'c'); status.Code(err) != codes.Internal || !k.ring.Equal(ring("ab")) {
			t.Errorf("on a full disk: %v", err)
		}
		if _, err := rotate(t, f, useKey, 'b'); status.Code(err) != codes.Internal || !k.ring.Equal(ring("ab")) {
			t.Errorf("on a full disk: %v", err)
		}
	})
}

func TestFleet_KeysAreToldOnlyWhereNobodyListens(t *testing.T) {
	t.Parallel()
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }
	for name, c := range map[string]struct {
		who  identity.Identity
		from net.Addr
		want bool
	}{
		"a worker's certificate":                  {identity.Identity{Kind: identity.Worker}, tcp("192.0.2.1"), true},
		"a Unix socket":                           {identity.Identity{Socket: true}, &net.UnixAddr{Net: "unix"}, true},
		"loopback":                                {identity.Identity{}, tcp("127.0.0.1"), true},
		"loopback of IPv6":                        {identity.Identity{}, tcp("::1"), true},
		"loopback of IPv4 in IPv6":                {identity.Identity{}, tcp("::ffff:127.0.0.1"), true},
		"plaintext that the operator has allowed": {identity.Identity{}, tcp("192.0.2.1"), false},
		"nobody": {identity.Identity{Kind: identity.Anonymous}, tcp("192.0.2.1"), false},
	} {
		ctx := peer.NewContext(identity.NewContext(t.Context(), c.who), &peer.Peer{Addr: c.from})
		if got := fleet.Confidential(ctx); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	if fleet.Confidential(t.Context()) {
		t.Error("told to who knows where")
	}
}
