package loadtest

import (
	"strings"
	"testing"

	"github.com/archfarm/archfarm/loadtest/load"
)

// linkRate is that of a narrow line: bytes a second, some 200 Mbit/s.
const linkRate = 25 << 20

// slowLink carries TCP connections to target over one narrow line, and returns where to dial.
func slowLink(b *testing.B, target string) string {
	b.Helper()
	return strings.TrimPrefix(load.NewLink(linkRate).To(b, "tcp://"+target), "tcp://")
}
