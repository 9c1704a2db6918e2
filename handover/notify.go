package handover

import (
	"errors"
	"fmt"
	"net"
	"os"
)

// Notify tells systemd something of the service, as sd_notify(3): "READY=1", "MAINPID=42". Where nobody has asked for
// that it does nothing.
func Notify(state string) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil
	}
	if path[0] == '@' { // an abstract one
		path = "\x00" + path[1:]
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	_, err = conn.Write([]byte(state))
	if err = errors.Join(err, conn.Close()); err != nil {
		return fmt.Errorf("telling systemd: %w", err)
	}
	return nil
}
