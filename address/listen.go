package address

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"
	"time"
)

// socketMode lets the owner and the group of a Unix socket connect, nobody
// else: whoever connects may build, which is as good as root on most machines.
const socketMode = 0o660

// staleProbe bounds the question whether somebody listens on a socket. A local
// connect is decided at once unless the listener's backlog is full.
const staleProbe = 2 * time.Second

// Listen listens on a. For a Unix socket it first removes a socket file that a
// dead process left behind, and fails if somebody still listens there or if the
// path is anything but a socket; the new socket has mode 0660. ctx bounds the
// setting up, not the life of the listener.
func (a Address) Listen(ctx context.Context) (net.Listener, error) {
	var lc net.ListenConfig
	if a.Network == unix {
		if err := a.removeStale(ctx); err != nil {
			return nil, err
		}
		lc.Control = restrictBeforeBind
	}
	l, err := lc.Listen(ctx, a.Network, a.Addr)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	if a.Network != unix {
		return l, nil
	}
	// bind(2) masked the mode with the umask, which usually takes the group's
	// right to write, that is to connect.
	if err := os.Chmod(a.Addr, socketMode); err != nil {
		return nil, errors.Join(fmt.Errorf("setting the mode of the socket: %w", err), l.Close())
	}
	return l, nil
}

// restrictBeforeBind gives the socket its mode before bind(2) makes the file
// from it, so that there is no moment in which anybody may connect. Linux does
// so; elsewhere the call is refused, and the mode comes right after bind.
func restrictBeforeBind(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { _ = syscall.Fchmod(int(fd), socketMode) })
}

func (a Address) removeStale(ctx context.Context) error {
	info, err := os.Lstat(a.Addr)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("looking for a left-over socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("listening on %s: the path exists and is no socket; remove it or choose another", a)
	}

	ctx, cancel := context.WithTimeout(ctx, staleProbe)
	defer cancel()
	conn, err := a.Dial(ctx)
	switch {
	case err == nil:
		_ = conn.Close() // nothing was written
		return fmt.Errorf("listening on %s: %w: another process serves this socket; stop it or choose another path", a, syscall.EADDRINUSE)
	case errors.Is(err, syscall.ECONNREFUSED):
	case errors.Is(err, fs.ErrNotExist):
		return nil
	default:
		return fmt.Errorf("asking whether %s is in use: %w", a, err)
	}
	if err := os.Remove(a.Addr); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing a left-over socket: %w", err)
	}
	return nil
}
