// Package handover passes listening sockets from process to process, so that nobody who connects meanwhile is refused:
// from systemd to a process that it starts (sd_listen_fds(3)), and from a running process to its successor, which is
// the same command once more, of what may be a newer binary.
//
// Between those two goes a conversation of two words. The successor says that it could serve; the predecessor, which
// accepts nobody any more by then, that it is to. Whoever of them dies before the second word leaves the other one
// as it was. After it the connection only tells the successor when the predecessor has ended.
package handover

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
)

const (
	// firstSocket is the first of the inherited descriptors: after stdin, stdout and stderr.
	firstSocket = 3
	// maxSockets bounds what an environment may claim.
	maxSockets = 128
	// succession is the variable that a predecessor sets: the sockets' names, separated by colons, as in LISTEN_FDNAMES.
	// The last descriptor is the connection between the two.
	succession = "ARCHFARM_SUCCESSION"
	// unnamed is what systemd calls a socket that has no name, and sockets of one unit have that unit's.
	unnamed = "unknown"
)

// Inheritance is what this process was given.
type Inheritance struct {
	// Predecessor is the process that this one is to replace; nil if there is none.
	Predecessor *Predecessor

	sockets []*inherited
}

type inherited struct {
	name     string
	listener net.Listener
	taken    bool
}

// Inherit takes what the environment says that this process was given, and removes it from there: it is for no child.
// Who was given nothing gets an empty Inheritance. Call it once, before descriptors are opened.
func Inherit() (*Inheritance, error) {
	will, err := read(os.Getenv, os.Getpid())
	for _, name := range []string{succession, "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		_ = os.Unsetenv(name) // cannot fail for such names
	}
	if err != nil {
		return nil, fmt.Errorf("taking the sockets that this process was given: %w", err)
	}
	in := &Inheritance{}
	for i, name := range will.names {
		l, err := listener(firstSocket+i, name)
		if err != nil {
			return nil, fmt.Errorf("taking socket %q, which this process was given: %w", name, err)
		}
		in.sockets = append(in.sockets, &inherited{name: name, listener: l})
	}
	if will.successor {
		if in.Predecessor, err = predecessor(firstSocket + len(will.names)); err != nil {
			return nil, fmt.Errorf("taking the predecessor's connection: %w", err)
		}
	}
	return in, nil
}

// will is what an environment promises.
type will struct {
	names     []string
	successor bool
}

func read(getenv func(string) string, pid int) (will, error) {
	if names := getenv(succession); names != "" {
		w := will{names: strings.Split(names, ":"), successor: true}
		if len(w.names) > maxSockets {
			return will{}, fmt.Errorf("%s names %d sockets, at most %d are possible", succession, len(w.names), maxSockets)
		}
		return w, nil
	}
	if getenv("LISTEN_PID") != strconv.Itoa(pid) { // for somebody else, or nobody
		return will{}, nil
	}
	n, err := strconv.Atoi(getenv("LISTEN_FDS"))
	if err != nil || n < 0 || n > maxSockets {
		return will{}, fmt.Errorf("LISTEN_FDS is %q: it must be a number up to %d", getenv("LISTEN_FDS"), maxSockets)
	}
	names := strings.Split(getenv("LISTEN_FDNAMES"), ":")
	if getenv("LISTEN_FDNAMES") == "" {
		names = nil
	}
	if len(names) > n {
		return will{}, fmt.Errorf("LISTEN_FDNAMES has %d names for %d sockets", len(names), n)
	}
	for len(names) < n {
		names = append(names, unnamed)
	}
	return will{names: names}, nil
}

// listener makes a descriptor that was inherited one of Go's.
func listener(fd int, name string) (net.Listener, error) {
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), name) //nolint:gosec // a small number
	defer f.Close()                    // the listener has a copy
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d is no listening socket: %w", fd, err)
	}
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // it is not ours alone
	}
	return l, nil
}

// Take returns the socket of that name, or else one that is bound to that address ("tcp" and host:port, "unix" and a
// path), and whether there is one that has not been taken. It is the caller's to close.
func (in *Inheritance) Take(name, network, address string) (net.Listener, bool) {
	if in == nil {
		return nil, false
	}
	for _, fits := range []func(*inherited) bool{
		func(s *inherited) bool { return s.name == name },
		func(s *inherited) bool { return bound(s.listener.Addr(), network, address) },
	} {
		for _, s := range in.sockets {
			if !s.taken && fits(s) {
				s.taken = true
				return s.listener, true
			}
		}
	}
	return nil, false
}

// bound tells whether a socket has the address. Those of all interfaces are the same for IPv4 and IPv6.
func bound(have net.Addr, network, address string) bool {
	if have.Network() != network {
		return false
	}
	if have.String() == address {
		return true
	}
	a, errA := netip.ParseAddrPort(have.String())
	b, errB := netip.ParseAddrPort(address)
	return errA == nil && errB == nil && a.Port() == b.Port() && a.Addr().IsUnspecified() && b.Addr().IsUnspecified()
}

// Own makes the sockets that the predecessor has left this process's own: the files of Unix sockets go when they are closed.
func (in *Inheritance) Own() {
	for _, s := range in.sockets {
		if u, ok := s.listener.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(true)
		}
	}
}

// Done closes what nobody has taken, and says so in an error: who connects there would wait in vain.
func (in *Inheritance) Done() error {
	if in == nil {
		return nil
	}
	var errs []error
	for _, s := range in.sockets {
		if !s.taken {
			s.taken = true
			errs = append(errs, fmt.Errorf("socket %q at %s, which this process was given, is not among the addresses that it is to listen on", s.name, s.listener.Addr()),
				s.listener.Close())
		}
	}
	return errors.Join(errs...)
}
