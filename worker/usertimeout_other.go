//go:build !linux

package worker

import (
	"net"
	"time"
)

// setUserTimeout does nothing here; TCP's keepalive notices a machine that
// vanished.
func setUserTimeout(net.Conn, time.Duration) {}
