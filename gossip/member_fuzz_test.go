package gossip

import (
	"net"
	"strings"
	"testing"

	"github.com/hashicorp/memberlist"

	"github.com/archfarm/archfarm/address"
)

// FuzzCoordinatorAddress checks that whatever a member says of itself, what agents dial is an address.
func FuzzCoordinatorAddress(f *testing.F) {
	for _, meta := range []string{"", "{}", `{"r":"c","g":"10.0.0.1:8372"}`, `{"r":"c","g":":8372"}`, `{"r":"c","g":"[::]:1"}`, `{"r":"c","g":"a b:1"}`, `{"r":"c","g":"unix:///x"}`, `{"r":"w","g":"a:1"}`} {
		f.Add("coordinator/a", []byte(meta), []byte{10, 0, 0, 2})
	}
	f.Fuzz(func(t *testing.T, name string, meta, ip []byte) {
		if len(ip) != net.IPv4len && len(ip) != net.IPv6len { // memberlist has seen to that
			return
		}
		found, ok := coordinatorAddress(&memberlist.Node{Name: name, Meta: meta, Addr: ip})
		if !ok {
			return
		}
		if a, err := address.Parse(found); err != nil || a.Network != "tcp" || strings.ContainsFunc(found, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Errorf("%q of %q: %v, %v", found, meta, a, err)
		}
	})
}
