package export

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"pgregory.net/rapid"
)

func newSpool(t *testing.T, limit int64) *Spool {
	t.Helper()
	s, err := NewSpool(filepath.Join(t.TempDir(), "spool"), limit)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestNewSpool_RemovesWhatAKilledProcessLeft(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "build-1", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := NewSpool(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 || s.limit != DefaultSpoolLimit {
		t.Errorf("left: %v, %v; limit %d", left, err, s.limit)
	}
}

func TestShelf_TheSameBlobTakesItsSpaceOnce(t *testing.T) {
	t.Parallel()
	spool := newSpool(t, 0)
	s := newShelf(spool)
	blob := strings.Repeat("x", 100_000)
	dgst := digest.FromString(blob)
	var running sync.WaitGroup
	for range 8 {
		running.Go(func() {
			if err := s.put(dgst, int64(len(blob)), strings.NewReader(blob+"what follows")); err != nil {
				t.Error(err)
			}
		})
	}
	running.Wait()
	if spool.Used() != int64(len(blob)) {
		t.Errorf("%d bytes are used", spool.Used())
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("files: %v, %v", entries, err)
	}
	if err := s.put(dgst, 1<<60, strings.NewReader(blob)); status.Code(err) != codes.DataLoss { // as a sparse entry claims
		t.Errorf("the same with another size: %v", err)
	}
	if info, err := s.Info(t.Context(), dgst); err != nil || info.Size != int64(len(blob)) {
		t.Errorf("%+v, %v", info, err)
	}
	wantNone(t, s.clear(), s.clear())
	if _, err := os.Stat(s.dir); spool.Used() != 0 || !os.IsNotExist(err) {
		t.Errorf("%d bytes are used; the folder: %v", spool.Used(), err)
	}
	if _, err := s.Info(t.Context(), dgst); !cerrdefs.IsNotFound(err) {
		t.Errorf("after all: %v", err)
	}
}

func TestSpool_BoundsWhatAllBuildsTake(t *testing.T) {
	t.Parallel()
	spool := newSpool(t, 10_000)
	first, second := newShelf(spool), newShelf(spool)
	blob := strings.Repeat("x", 8000)
	wantNone(t, first.put(digest.FromString(blob), 8000, strings.NewReader(blob)))
	err := second.put(digest.FromString("y"), 1, strings.NewReader("y"))
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "at most 10000") {
		t.Errorf("got %v", err)
	}
	wantNone(t, first.clear())
	wantNone(t, second.put(digest.FromString("y"), 1, strings.NewReader("y")), second.clear())
}

func TestSpool_LeavesTheDiskSomeSpace(t *testing.T) {
	t.Parallel()
	s := newShelf(newSpool(t, 1<<62))
	if err := s.take(1 << 60); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "disk") {
		t.Errorf("got %v", err)
	}
	if err := spooling(&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("of a full disk: %v", err)
	}
	if err := newShelf(nil).put(digest.FromString("y"), 1, strings.NewReader("y")); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("without a spool: %v", err)
	}
}

func TestList_PropertyReadsWhatWasWrittenAsOftenAsOneLikes(t *testing.T) {
	t.Parallel()
	spool := newSpool(t, 0)
	rapid.Check(t, func(t *rapid.T) {
		s := newShelf(spool)
		l, err := s.list()
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		records := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 5000), 0, 20).Draw(t, "records")
		for _, r := range records {
			if err := l.add(r); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			next, err := l.read()
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range records {
				if got, err := next(); err != nil || !slices.Equal(got, want) {
					t.Fatalf("record %d: %v, %v", i, got, err)
				}
			}
			if _, err := next(); !errors.Is(err, io.EOF) {
				t.Fatalf("after the last: %v", err)
			}
		}
		if err := s.clear(); err != nil || spool.Used() != 0 {
			t.Fatalf("%d bytes are used, %v", spool.Used(), err)
		}
	})
}

func TestList_GrowsWithinTheLimit(t *testing.T) {
	t.Parallel()
	s := newShelf(newSpool(t, 3*listChunk))
	l, err := s.list()
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	record := make([]byte, 1000)
	for range 2000 {
		wantNone(t, l.add(record))
	}
	for err == nil {
		err = l.add(record)
	}
	if status.Code(err) != codes.ResourceExhausted || s.taken != 3*listChunk {
		t.Errorf("got %v with %d bytes taken", err, s.taken)
	}
	wantNone(t, s.clear())
}
