package tunnel

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"
)

// linger is how long one direction may go on after the other has ended. What a
// tunnel carries is HTTP/2, where a peer that has ended its sending is gone; the
// time is for its last bytes to arrive. Without it a frozen daemon would keep a
// slot for ever.
const linger = 30 * time.Second

// Splice joins a and b: what one sends, the other receives, until both
// directions have ended. The end of one direction is passed on (CloseWrite);
// the other then has 30 s to end too. Both are closed when Splice returns.
// Closing either from outside ends it at once.
//
// Between TCP and Unix connections the kernel moves the bytes (splice(2)).
//
// The error is what ended a direction before its time, nil after an orderly end.
func Splice(a, b net.Conn) error {
	_, _, err := SpliceCount(a, b)
	return err
}

// SpliceCount is Splice that also tells how many bytes went from a to b and
// from b to a.
func SpliceCount(a, b net.Conn) (ab, ba int64, err error) {
	return splice(a, b, linger)
}

func splice(a, b net.Conn, linger time.Duration) (ab, ba int64, err error) {
	var (
		once      sync.Once
		timer     *time.Timer
		abErr     error
		baErr     error
		direction sync.WaitGroup
	)
	closeBoth := func() { _ = a.Close(); _ = b.Close() } // an error of Close says nothing that a read or write did not
	ended := func(err error) {
		if err != nil {
			closeBoth()
		}
		once.Do(func() { timer = time.AfterFunc(linger, closeBoth) })
	}
	direction.Go(func() { ab, abErr = pass(b, a); ended(abErr) })
	direction.Go(func() { ba, baErr = pass(a, b); ended(baErr) })
	direction.Wait()
	timer.Stop()
	closeBoth()
	return ab, ba, first(abErr, baErr)
}

// pass copies src to dst until src ends, and passes the end on.
func pass(dst, src net.Conn) (int64, error) {
	n, err := io.Copy(dst, src)
	if err != nil {
		return n, err
	}
	w, ok := dst.(interface{ CloseWrite() error })
	if !ok {
		// No half-close (TLS over something odd): the end of one is the end of both.
		return n, dst.Close()
	}
	if err := w.CloseWrite(); err != nil && !gone(err) {
		return n, fmt.Errorf("passing on the end of a direction: %w", err)
	}
	return n, nil
}

// first prefers the error that caused the other: when one direction breaks,
// both connections are closed, and the other direction sees just that.
func first(a, b error) error {
	if a == nil || (errors.Is(a, net.ErrClosed) && b != nil) {
		return b
	}
	return a
}

// gone tells that the peer has left, so that there is nobody to tell the end.
func gone(err error) bool {
	return errors.Is(err, syscall.ENOTCONN) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}
