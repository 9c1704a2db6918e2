package worker

import (
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// setUserTimeout makes the kernel end a TCP connection on which sent bytes stay
// unacknowledged for d (tcp(7), TCP_USER_TIMEOUT). With a heartbeat always under
// way this notices a machine that vanished, which without it takes a quarter of
// an hour. It is for the Attach stream only: a bulk transfer whose reader pauses
// would be ended too.
func setUserTimeout(conn net.Conn, d time.Duration) {
	if secured, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = secured.NetConn()
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return // closed already, which the next write says
	}
	_ = raw.Control(func(fd uintptr) {
		// Without it the end is noticed later, that is all.
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(d.Milliseconds()))
	})
}
