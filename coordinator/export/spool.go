package export

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// DefaultSpoolLimit is what all builds of a coordinator together may keep on
	// disk: large enough for a few large images at a time.
	DefaultSpoolLimit = 64 << 30
	// spare is what a spool leaves free on its disk, for whoever else uses that.
	spare = 256 << 20
	// blobCost is what a blob counts at least: its file takes that, however small.
	blobCost = 4 << 10
	// listChunk is by how much the space for a list grows.
	listChunk = 1 << 20
)

// Spool is the disk space where the shares of legs wait for those of the others.
type Spool struct {
	dir   string
	limit int64

	mu   sync.Mutex
	used int64
}

// NewSpool returns a spool in a folder of its own, which it empties: what is
// there is left from a process that was killed. Limit is in bytes; 0 stands for
// DefaultSpoolLimit. A spool never takes the last of its disk, whatever the limit.
func NewSpool(dir string, limit int64) (*Spool, error) {
	if limit <= 0 {
		limit = DefaultSpoolLimit
	}
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("emptying the spool of exports: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the spool of exports: %w", err)
	}
	return &Spool{dir: dir, limit: limit}, nil
}

// Used tells how many bytes are taken.
func (s *Spool) Used() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used
}

func (s *Spool) reserve(n int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > s.limit-s.used {
		return status.Errorf(codes.ResourceExhausted, "spooling %d bytes of an export: the builds of this coordinator have spooled %d bytes, at most %d are possible; try again when they have ended, or raise the limit", n, s.used, s.limit)
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(s.dir, &disk); err == nil {
		if free := int64(disk.Bavail) * int64(disk.Bsize); n > free-spare { //nolint:gosec,unconvert // disks are smaller than that; the types differ between systems
			return status.Errorf(codes.ResourceExhausted, "spooling %d bytes of an export: the coordinator's disk has %d bytes left, of which %d stay free", n, free, spare)
		}
	}
	s.used += n
	return nil
}

func (s *Spool) release(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used -= n
}

// shelf is one build's part of a spool: blobs by their digests, and lists.
type shelf struct {
	spool *Spool

	mu    sync.Mutex
	dir   string // made when it is needed
	taken int64
	blobs map[digest.Digest]int64 // sizes
}

func newShelf(s *Spool) *shelf { return &shelf{spool: s, blobs: map[digest.Digest]int64{}} }

// clear removes everything. Nothing uses the shelf any more.
func (s *shelf) clear() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dir == "" {
		return nil
	}
	s.spool.release(s.taken)
	s.taken = 0
	clear(s.blobs)
	return os.RemoveAll(s.dir)
}

// create makes a file with so much space reserved.
func (s *shelf) create(space int64) (*os.File, error) {
	if s.spool == nil {
		return nil, status.Error(codes.FailedPrecondition, "spooling an export: this coordinator has no spool")
	}
	if err := s.take(space); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dir == "" {
		dir, err := os.MkdirTemp(s.spool.dir, "build-")
		if err != nil {
			return nil, spooling(err)
		}
		s.dir = dir
	}
	f, err := os.CreateTemp(s.dir, "new-")
	return f, spooling(err)
}

func (s *shelf) take(n int64) error {
	if err := s.spool.reserve(n); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken += n
	return nil
}

func (s *shelf) giveBack(n int64) {
	s.spool.release(n)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken -= n
}

// spooling gives an error of the disk its code and its context.
func spooling(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC):
		return status.Errorf(codes.ResourceExhausted, "spooling an export: %v", err)
	}
	return fmt.Errorf("spooling an export: %w", err)
}

// put keeps a blob of exactly that size and digest; one that is there already is
// read and dropped.
func (s *shelf) put(dgst digest.Digest, size int64, from io.Reader) error {
	if known, ok := s.size(dgst); ok && known == size { // another is not worth reading: a sparse entry may claim any
		_, err := io.CopyN(io.Discard, from, size)
		return err
	} else if ok {
		return status.Errorf(codes.DataLoss, "spooling an export: %s came with %d bytes, it has %d", dgst, size, known)
	}
	cost := max(size, blobCost)
	f, err := s.create(cost)
	if err != nil {
		return err
	}
	defer f.Close()
	verifier := dgst.Verifier()
	_, err = io.CopyN(io.MultiWriter(diskWriter{f}, verifier), from, size)
	if err == nil && !verifier.Verified() {
		err = status.Errorf(codes.DataLoss, "spooling an export: what came as %s is something else", dgst)
	}
	if err == nil {
		err = s.keep(f.Name(), dgst, size, cost)
	}
	if err != nil {
		s.giveBack(cost)
		_ = os.Remove(f.Name()) // it goes with the folder at the latest
	}
	return err
}

func (s *shelf) size(dgst digest.Digest) (n int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok = s.blobs[dgst]
	return n, ok
}

// keep files a blob, unless another leg was quicker with the same.
func (s *shelf) keep(name string, dgst digest.Digest, size, cost int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.blobs[dgst]; ok {
		s.spool.release(cost)
		s.taken -= cost
		return os.Remove(name)
	}
	if err := os.Rename(name, s.path(dgst)); err != nil {
		return spooling(err)
	}
	s.blobs[dgst] = size
	return nil
}

func (s *shelf) path(dgst digest.Digest) string {
	return filepath.Join(s.dir, dgst.Algorithm().String()+"-"+dgst.Encoded())
}

// diskWriter tells errors of the disk from those of where the data comes from.
type diskWriter struct{ f *os.File }

func (w diskWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	return n, spooling(err)
}

// Info implements content.InfoProvider.
func (s *shelf) Info(_ context.Context, dgst digest.Digest) (content.Info, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size, ok := s.blobs[dgst]
	if !ok {
		return content.Info{}, fmt.Errorf("%s was not exported by any leg: %w", dgst, cerrdefs.ErrNotFound)
	}
	return content.Info{Digest: dgst, Size: size}, nil
}

// ReaderAt implements content.Provider.
func (s *shelf) ReaderAt(ctx context.Context, desc ocispecs.Descriptor) (content.ReaderAt, error) {
	if _, err := s.Info(ctx, desc.Digest); err != nil {
		return nil, err
	}
	return local.OpenReader(s.path(desc.Digest))
}

// list is a sequence of records on a shelf, written once, then read.
type list struct {
	shelf *shelf
	file  *os.File
	w     *bufio.Writer
	space int64 // reserved, and not used yet
}

func (s *shelf) list() (*list, error) {
	f, err := s.create(listChunk)
	if err != nil {
		return nil, err
	}
	return &list{shelf: s, file: f, w: bufio.NewWriter(diskWriter{f}), space: listChunk}, nil
}

func (l *list) add(record []byte) error {
	need := int64(len(record)) + binary.MaxVarintLen32
	for l.space < need {
		if err := l.shelf.take(listChunk); err != nil {
			return err
		}
		l.space += listChunk
	}
	l.space -= need
	if _, err := l.w.Write(binary.AppendUvarint(nil, uint64(len(record)))); err != nil {
		return err
	}
	_, err := l.w.Write(record)
	return err
}

// read returns the records one by one, io.EOF after the last. What next returned
// is good until it is called again.
func (l *list) read() (next func() ([]byte, error), err error) {
	if err := l.w.Flush(); err != nil {
		return nil, err
	}
	if _, err := l.file.Seek(0, io.SeekStart); err != nil {
		return nil, spooling(err)
	}
	r := bufio.NewReader(l.file)
	var record []byte
	return func() ([]byte, error) {
		n, err := binary.ReadUvarint(r)
		if err != nil {
			return nil, err // io.EOF between records only: what was written is whole
		}
		if uint64(cap(record)) < n {
			record = make([]byte, n)
		}
		record = record[:n]
		_, err = io.ReadFull(r, record)
		return record, err
	}, nil
}

func (l *list) close() { _ = l.file.Close() } // it goes with the shelf
