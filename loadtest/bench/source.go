package main

import (
	crand "crypto/rand"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"

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

func (s source) write(flags int, size int64) error {
	f, err := os.OpenFile(filepath.Join(s.dir, "data"), os.O_WRONLY|flags, 0o644)
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
