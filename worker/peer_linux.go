package worker

import (
	"context"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// peer tells whether buildkitd runs under this kernel, and as which process. It
// does if the process that listens on its socket is a buildkitd, or is this one.
// Anything else may forward the socket to another machine, as ssh does, and so
// may a process that this one does not see. An error says that nobody listens.
func (d *daemon) peer(ctx context.Context) (pid int, local bool, err error) {
	if d.addr.Network != "unix" {
		return 0, false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, d.timing.checkWithin)
	defer cancel()
	conn, err := d.addr.Dial(ctx)
	if err != nil {
		return 0, false, err
	}
	defer conn.Close()
	if pid = listener(conn); pid <= 0 {
		return 0, false, nil
	}
	if pid == os.Getpid() {
		return pid, true, nil
	}
	name, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
	return pid, err == nil && isBuildkitd(strings.TrimSuffix(string(name), "\n")), nil // a process that is not seen is none of this machine
}

// isBuildkitd knows a daemon by its process's name, the wrapper that runs it
// without root included.
func isBuildkitd(name string) bool {
	return strings.HasPrefix(name, "buildkitd") || name == "rootlesskit"
}

// listener is the process that listens where conn leads; 0 if it is not known.
func listener(conn net.Conn) int {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) { // if it fails, pid stays 0
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}
