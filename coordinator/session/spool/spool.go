// Package spool keeps what clients have sent of their files while others may want
// the same: the workers that build one context.
//
// A file has one fetcher, who writes what the client sends it, and readers, the
// fetcher among them, who read at their own pace: nobody waits for another reader.
// When a fetcher gives up, a reader becomes the fetcher, and writes the file from its
// beginning; what is there already is compared, and the rest is added.
//
// What decides is in ledger.go, pure; the disk is at the edge, in disk.go.
package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
)

// DefaultLimit is what all contexts of a coordinator together may keep on disk.
const DefaultLimit = 10 << 30

// ErrChanged is what a fetcher gets whose bytes are not those of the file: it has
// another length, or what another fetcher has got before was different.
var ErrChanged = errors.New("the file has changed")

// Key identifies a file of a scope, in the state that it has: whatever tells of a
// change must be part of it.
type Key [16]byte

// Reader is told about a file that it wants, by whatever goroutine: it must not block.
type Reader interface {
	// Ready says that there is more to read, or that the file is whole or broken.
	Ready()
	// Fetch says that the reader is the file's fetcher from now on.
	Fetch()
}

// Spool is the disk space for contexts.
type Spool struct {
	dir string

	mu     sync.Mutex
	ledger *ledger
}

// New returns a spool in a folder of its own, which it empties. Limit is in bytes.
// A spool never takes the last of its disk, whatever the limit.
func New(dir string, limit int64) (*Spool, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("emptying the spool of contexts: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the spool of contexts: %w", err)
	}
	return &Spool{dir: dir, ledger: newLedger(limit)}, nil
}

// Used tells how many bytes are taken, or promised to files under way.
func (s *Spool) Used() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ledger.used
}

// Scope is the part of a spool within which files are shared. It must be closed.
func (s *Spool) Scope() *Scope {
	return &Scope{spool: s, files: map[Key]*file{}, segments: map[*segment]struct{}{}}
}

// Scope holds files that are the same when their keys are.
type Scope struct {
	spool *Spool

	// guarded by spool.mu
	closed   bool
	files    map[Key]*file // filling or whole
	segments map[*segment]struct{}
	current  *segment // where the next small file goes; may be nil
}

// Want returns the reader's share of a file, which must be closed, and whether the
// reader is to fetch it. It returns nil where there is no space, or nothing to
// share: the file is to be had from the client only.
func (sc *Scope) Want(key Key, size int64, reader Reader) (h *Share, fetch bool) {
	s := sc.spool
	s.mu.Lock()
	h, dropped := s.ledger.want(sc, key, size, reader, func() int64 { return room(s.dir) }, func() *disk { return &disk{dir: s.dir} })
	fetch = h != nil && h.file.fetcher == h
	s.mu.Unlock()
	closeAll(dropped)
	return h, fetch
}

// Close forgets the files. Shares are good until they are closed.
func (sc *Scope) Close() {
	sc.spool.mu.Lock()
	dropped := sc.spool.ledger.closeScope(sc)
	sc.spool.mu.Unlock()
	closeAll(dropped)
}

func closeAll(dropped []*segment) {
	for _, seg := range dropped {
		seg.disk.close()
	}
}

// Share is one reader's hold on a file. Its methods for the fetcher are called by
// one goroutine at a time, and so is ReadAt by one; Close is the last call.
type Share struct {
	spool  *Spool
	file   *file
	reader Reader
	pos    int64 // what it has fetched
}

// State tells how many bytes can be read, and whether that is all (done), or all
// that there will be of a file that is not whole (failed).
func (h *Share) State() (written int64, done, failed bool) {
	h.spool.mu.Lock()
	defer h.spool.mu.Unlock()
	return h.file.written, h.file.state == whole, h.file.state == broken
}

// ReadAt reads bytes that are there. It fails where the disk does.
func (h *Share) ReadAt(p []byte, off int64) error {
	f, err := h.file.segment.disk.open()
	if err != nil {
		return err
	}
	if _, err := f.ReadAt(p, h.file.offset+off); err != nil {
		return fmt.Errorf("reading a spooled context: %w", noEOF(err))
	}
	return nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Write adds what the fetcher has got next. After an error, which may be ErrChanged
// or one of the disk, the file is broken, and what the fetcher had written before is
// still there.
func (h *Share) Write(p []byte) error {
	written, err := h.mayWrite(int64(len(p)))
	if err == nil {
		err = h.store(p, written)
	}
	h.spool.mu.Lock()
	if err != nil {
		h.spool.ledger.breakOff(h.file)
	} else {
		h.pos += int64(len(p))
		h.spool.ledger.wrote(h.file, h.pos)
	}
	h.unlockAndTell(h.pos <= written || h.pos == h.file.size) // the file's end, which follows, is news enough
	return err
}

// mayWrite tells what is there already.
func (h *Share) mayWrite(n int64) (written int64, err error) {
	h.spool.mu.Lock()
	defer h.spool.mu.Unlock()
	if h.pos+n > h.file.size {
		return 0, ErrChanged
	}
	return h.file.written, nil
}

// store compares with what is there, and puts the rest after it.
func (h *Share) store(p []byte, written int64) error {
	pos := h.pos
	if known := min(int64(len(p)), written-pos); known > 0 {
		same, err := h.Equal(p[:known], pos)
		if err != nil {
			return err
		}
		if !same {
			return ErrChanged
		}
		p, pos = p[known:], written
	}
	if len(p) == 0 {
		return nil
	}
	f, err := h.file.segment.disk.open()
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(p, h.file.offset+pos); err != nil {
		return fmt.Errorf("spooling a context: %w", err)
	}
	return nil
}

// Equal compares with what is there, from off.
func (h *Share) Equal(p []byte, off int64) (bool, error) {
	have := make([]byte, len(p))
	if err := h.ReadAt(have, off); err != nil {
		return false, err
	}
	return bytes.Equal(have, p), nil
}

// Finish says that the fetcher has got all. Where that is not what the file should
// have, it is broken, and the error is ErrChanged.
func (h *Share) Finish() (err error) {
	h.spool.mu.Lock()
	if h.pos == h.file.size {
		h.spool.ledger.finish(h.file)
	} else {
		h.spool.ledger.breakOff(h.file)
		err = ErrChanged
	}
	h.unlockAndTell(false)
	return err
}

// unlockAndTell tells the readers that there is news, unless there is none.
func (h *Share) unlockAndTell(none bool) {
	var readers []*Share
	if !none || h.file.state != filling {
		readers = slices.Clone(h.file.readers)
	}
	h.spool.mu.Unlock()
	for _, r := range readers {
		r.reader.Ready()
	}
}

// Abandon leaves the file to the others. What is there can still be read.
func (h *Share) Abandon() {
	h.spool.mu.Lock()
	fetcher := h.spool.ledger.retire(h)
	h.spool.mu.Unlock()
	if fetcher != nil {
		fetcher.reader.Fetch()
	}
}

// Close ends the share. A file of which the reader is the fetcher, and that is
// not whole, is left to the others.
func (h *Share) Close() {
	h.spool.mu.Lock()
	fetcher := h.spool.ledger.retire(h)
	dropped := h.spool.ledger.unpin(h.file.segment)
	h.spool.mu.Unlock()
	if dropped != nil {
		dropped.disk.close()
	}
	if fetcher != nil {
		fetcher.reader.Fetch()
	}
}
