package handover

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var errWord = errors.New("that is not what was to be said")

func errOr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// Socket is one to pass on.
type Socket struct {
	// Name is what the successor calls it: without a colon.
	Name string
	// Listener is a *net.TCPListener or a *net.UnixListener.
	Listener net.Listener
}

// Successor is a process that was started to replace this one.
type Successor struct {
	process *exec.Cmd
	conn    net.Conn
	ended   chan struct{} // when the process has; err says how
	err     error
}

// Start starts the command with the sockets. It writes to this process's stdout and stderr. What follows is AwaitReady,
// then Serve or Kill.
func Start(path string, args []string, sockets []Socket) (*Successor, error) {
	conn, theirs, err := pair()
	if err != nil {
		return nil, fmt.Errorf("making a connection to the successor: %w", err)
	}
	defer theirs.Close()
	var names []string
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close() // the process has copies
		}
	}()
	for _, s := range sockets {
		f, err := file(s.Listener)
		if err != nil {
			_ = conn.Close()
			return nil, fmt.Errorf("passing on socket %s: %w", s.Name, err)
		}
		names, files = append(names, s.Name), append(files, f)
	}
	process := exec.Command(path, args...) //nolint:gosec // what was started before
	process.Stdout, process.Stderr = os.Stdout, os.Stderr
	process.Env = append(os.Environ(), succession+"="+strings.Join(names, ":"))
	process.ExtraFiles = append(slices.Clone(files), theirs)
	if err := process.Start(); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("starting the successor: %w", err)
	}
	s := &Successor{process: process, conn: conn, ended: make(chan struct{})}
	go func() { // ends with the process, or this one
		s.err = process.Wait()
		close(s.ended)
	}()
	return s, nil
}

// pair is a connection to a process that is yet to start.
func pair() (own net.Conn, theirs *os.File, err error) {
	syscall.ForkLock.RLock() // no process that starts meanwhile gets them
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, err
	}
	mine, theirs := os.NewFile(uintptr(fds[0]), "successor"), os.NewFile(uintptr(fds[1]), "predecessor") //nolint:gosec // descriptors
	defer mine.Close()                                                                                   // own is a copy
	if own, err = net.FileConn(mine); err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return own, theirs, nil
}

// file is another descriptor of a socket, which stays when one of them is closed. Not by way of the listener's File:
// that makes the socket a blocking one, for both, and closing a listener then waits for somebody to connect.
func file(l net.Listener) (*os.File, error) {
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false) // from now on it is the successor's as well
	}
	sock, ok := l.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("%T has no descriptor", l)
	}
	raw, err := sock.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var failed error
	if err := raw.Control(func(own uintptr) { fd, failed = unix.FcntlInt(own, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || failed != nil {
		return nil, errors.Join(err, failed)
	}
	return os.NewFile(uintptr(fd), l.Addr().String()), nil //nolint:gosec // a descriptor
}

// Pid is the successor's.
func (s *Successor) Pid() int { return s.process.Process.Pid }

// AwaitReady returns once the successor could serve. After an error it never will.
func (s *Successor) AwaitReady(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = s.conn.SetDeadline(time.Now()) })()
	word := make([]byte, 0, len(ready))
	for len(word) < len(ready) {
		n, err := s.conn.Read(word[len(word):cap(word)])
		word = word[:len(word)+n]
		if err != nil {
			return s.failure(ctx, err)
		}
	}
	if string(word) != ready {
		return fmt.Errorf("the successor said %q", word)
	}
	return nil
}

// failure tells why a successor has not become ready.
func (s *Successor) failure(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("the successor is not ready: %w", context.Cause(ctx))
	}
	select {
	case <-s.ended: // its end of the connection has been closed: so it has, or is about to
	case <-ctx.Done():
		return fmt.Errorf("the successor has hung up (%w), and does not end", err)
	}
	return fmt.Errorf("the successor has ended (%w), and says why above: %w", errOr(s.err, errors.New("without an error")), err)
}

// Serve has the successor serve. This process must accept nobody any more. The connection stays open until this process
// ends.
func (s *Successor) Serve() error {
	if _, err := s.conn.Write([]byte(serve)); err != nil {
		return fmt.Errorf("telling the successor to serve: %w", err)
	}
	return nil
}

// Kill ends a successor that is not to serve, and returns when it has.
func (s *Successor) Kill() {
	_ = s.process.Process.Kill() // it may have ended
	<-s.ended
	_ = s.conn.Close()
}
