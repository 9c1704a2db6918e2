// Package address is the one notation of network addresses in archfarm: what a
// flag takes, what a log shows, and how the two ends of it are dialed and
// listened on.
//
// Three spellings are read:
//
//	host:port          TCP
//	tcp://host:port    the same, as BuildKit and buildx write it
//	unix:///path       a Unix domain socket; the path is absolute
package address

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

const (
	tcp  = "tcp"
	unix = "unix"

	// maxHost is the longest DNS name (RFC 1035, section 2.3.4), with room for
	// the zone of an IPv6 address.
	maxHost = 255
	// maxUnixPath is what fits into sockaddr_un on Linux (108 bytes with the
	// terminating zero). The kernel says only "invalid argument" beyond it.
	maxUnixPath = 107
)

// ErrInvalid is in the chain of every error that Parse returns.
var ErrInvalid = errors.New("invalid address")

// Address is a place to dial or to listen on. The zero value is no address.
// Addresses are comparable: two that are equal mean the same place.
type Address struct {
	// Network is "tcp" or "unix".
	Network string
	// Addr is host:port for tcp (the host may be empty, IPv6 in brackets), the
	// absolute path of the socket for unix.
	Addr string
}

// Parse reads one of the three spellings of the package comment. The error
// quotes s and says what is wrong with it.
func Parse(s string) (Address, error) {
	scheme, rest, found := strings.Cut(s, "://")
	switch {
	case !found:
		return parseTCP(s, s)
	case scheme == tcp:
		return parseTCP(s, rest)
	case scheme == unix:
		return parseUnix(s, rest)
	default:
		return Address{}, invalid(s, "unknown scheme; write host:port, tcp://host:port or unix:///path")
	}
}

// String is the URL form, which Parse reads back to an equal Address. The zero
// value gives the empty string.
func (a Address) String() string {
	if a.IsZero() {
		return ""
	}
	return a.Network + "://" + a.Addr
}

// IsZero tells whether a is no address at all.
func (a Address) IsZero() bool { return a == Address{} }

// Local tells whether what is sent to a stays on this machine: a Unix socket, or
// a loopback address by number or as localhost.
func (a Address) Local() bool {
	if a.Network == unix {
		return true
	}
	host, _, err := net.SplitHostPort(a.Addr)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

// Dial connects to a. The error names a.
func (a Address) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, a.Network, a.Addr)
	if err != nil {
		// net.OpError already says "dial unix /path: …".
		return nil, fmt.Errorf("connecting: %w", err)
	}
	return conn, nil
}

func parseTCP(s, hostPort string) (Address, error) {
	host, port, err := net.SplitHostPort(hostPort)
	if err != nil {
		return Address{}, invalid(s, "write host:port, such as 127.0.0.1:8372 or [::1]:8372")
	}
	if len(host) > maxHost {
		return Address{}, invalid(s[:maxHost]+"…", "the host name is too long")
	}
	if i := strings.IndexFunc(host, notInHost); i >= 0 {
		return Address{}, invalid(s, "the host has a character that no name or IP address has")
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return Address{}, invalid(s, "the port is not a number from 0 to 65535")
	}
	// The number is written back, so that "08372" and "8372" are one address.
	return Address{Network: tcp, Addr: net.JoinHostPort(host, strconv.FormatUint(n, 10))}, nil
}

// notInHost keeps to names, IPv4, IPv6 and its zone; underscores occur in the
// names that compose and Kubernetes make.
func notInHost(r rune) bool {
	switch {
	case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		return false
	default:
		return !strings.ContainsRune(".-_:%", r)
	}
}

func parseUnix(s, path string) (Address, error) {
	switch {
	case !strings.HasPrefix(path, "/"):
		return Address{}, invalid(s, "the path of a socket is absolute: unix:///path")
	case len(path) > maxUnixPath:
		return Address{}, invalid(s[:maxUnixPath]+"…", "the path of a socket has at most "+strconv.Itoa(maxUnixPath)+" bytes")
	case strings.HasSuffix(path, "/"):
		return Address{}, invalid(s, "the path names a directory, not a socket")
	case strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return Address{}, invalid(s, "the path has a control character")
	}
	return Address{Network: unix, Addr: path}, nil
}

func invalid(s, why string) error {
	return fmt.Errorf("%w %q: %s", ErrInvalid, s, why)
}
