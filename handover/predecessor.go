package handover

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// The two words, a line each.
const (
	ready = "ready\n"
	serve = "serve\n"
)

// Predecessor is the process that a successor replaces.
type Predecessor struct {
	conn net.Conn
	in   *bufio.Reader
	gone chan struct{}
}

func predecessor(fd int) (*Predecessor, error) {
	syscall.CloseOnExec(fd)
	f := os.NewFile(uintptr(fd), "predecessor") //nolint:gosec // a small number
	defer f.Close()                             // the connection has a copy
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("descriptor %d is no connection: %w", fd, err)
	}
	return &Predecessor{conn: conn, in: bufio.NewReaderSize(conn, 16), gone: make(chan struct{})}, nil
}

// Ready tells the predecessor that this process could serve, and returns once it is to. After an error it is not, and
// the predecessor goes on.
func (p *Predecessor) Ready(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { _ = p.conn.SetDeadline(time.Now()) })()
	if _, err := p.conn.Write([]byte(ready)); err != nil {
		return fmt.Errorf("telling the predecessor: %w", err)
	}
	word, err := p.in.ReadString('\n')
	if err != nil || word != serve {
		return fmt.Errorf("the predecessor has not handed over: it said %q: %w", word, errOr(err, errWord))
	}
	go func() { // ends with the predecessor
		defer close(p.gone)
		_, _ = p.in.ReadByte()
		_ = p.conn.Close()
	}()
	return nil
}

// Gone is closed when the predecessor has ended, which Ready has made wait.
func (p *Predecessor) Gone() <-chan struct{} { return p.gone }
