package main

import (
	crand "crypto/rand"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// dockerfile executes nothing, since one of the buildkitds is not of the platform that it builds for.
const dockerfile = "FROM scratch\nCOPY data /data\n"

// block is how much of a source's data changes.
const block = 4096

// source is a build context: a Dockerfile and the file that it copies.
type source struct {
	dir string
	rng *rand.ChaCha8
}

// newSource makes a context with data that cannot be compressed.
func newSource(t farmtest.T, size int64) source {
	var seed [32]byte
	_, _ = crand.Read(seed[:]) // never returns an error
	s := source{dir: farmtest.Folder(t), rng: rand.NewChaCha8(seed)}
	farmtest.WriteFile(t, s.dir, "Dockerfile", dockerfile)
	if err := s.write(os.O_CREATE|os.O_EXCL, size); err != nil {
		t.Fatalf("%v", err)
	}
	return s
}

// tree is a build context of many files.
type tree struct {
	source
	files int
	size  int64 // of each, in bytes
}

// inFolder is how many files of a tree share a folder.
const inFolder = 100

// newTree makes a context of so many files.
func newTree(t farmtest.T, files int, size int64) tree {
	t.Helper()
	s := newSource(t, 0)
	if err := os.Remove(filepath.Join(s.dir, "data")); err != nil {
		t.Fatalf("writing a build context: %v", err)
	}
	for folder := 0; folder*inFolder < files; folder++ {
		if err := os.MkdirAll(filepath.Join(s.dir, "data", strconv.Itoa(folder)), 0o755); err != nil {
			t.Fatalf("writing a build context: %v", err)
		}
	}
	tr := tree{source: s, files: files, size: size}
	tr.renew(t, files)
	return tr
}

// renew makes the first of the files new.
func (s tree) renew(t farmtest.T, files int) {
	t.Helper()
	for i := range files {
		if err := s.writeTo(s.name(i), os.O_CREATE, s.size); err != nil {
			t.Fatalf("%v", err)
		}
	}
	syscall.Sync() // as in change
}

// touch makes every file look new, which is enough for those that are sent it.
func (s tree) touch(t farmtest.T) {
	t.Helper()
	now := time.Now()
	for i := range s.files {
		if err := os.Chtimes(filepath.Join(s.dir, s.name(i)), now, now); err != nil {
			t.Fatalf("changing a build context: %v", err)
		}
	}
	syscall.Sync() // as in change
}

// name is that of a file, below the context.
func (tree) name(i int) string {
	return filepath.Join("data", strconv.Itoa(i/inFolder), fmt.Sprintf("file-%d", i))
}

// newPair makes a context with such data of each platform's own.
func newPair(t farmtest.T, platforms string, size int64) source {
	s := newSource(t, size)
	for _, p := range strings.Split(platforms, ",") {
		_, arch, _ := strings.Cut(p, "/")
		if err := os.Rename(filepath.Join(s.dir, "data"), filepath.Join(s.dir, arch)); err != nil {
			t.Fatalf("writing a build context: %v", err)
		}
		if err := s.write(os.O_CREATE|os.O_EXCL, size); err != nil {
			t.Fatalf("%v", err)
		}
	}
	if err := os.Remove(filepath.Join(s.dir, "data")); err != nil {
		t.Fatalf("writing a build context: %v", err)
	}
	farmtest.WriteFile(t, s.dir, "Dockerfile", "FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /data\n")
	return s
}

// change makes the data new: BuildKit knows files as a whole, so that a new beginning will do.
func (s source) change(t farmtest.T) {
	t.Helper()
	if err := s.write(0, block); err != nil {
		t.Fatalf("%v", err)
	}
	syscall.Sync() // the disk is to be idle when the next build begins
}

func (s source) write(flags int, size int64) error { return s.writeTo("data", flags, size) }

func (s source) writeTo(name string, flags int, size int64) error {
	f, err := os.OpenFile(filepath.Join(s.dir, name), os.O_WRONLY|flags, 0o644)
	if err != nil {
		return fmt.Errorf("writing a build context: %w", err)
	}
	if _, err := io.CopyN(f, s.rng, size); err != nil {
		f.Close()
		return fmt.Errorf("writing a build context: %w", err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("writing a build context: %w", err)
	}
	return nil
}
