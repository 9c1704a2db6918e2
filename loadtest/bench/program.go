package main

import (
	"fmt"
	"io"
	"runtime"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// program is the farmtest.T of a run outside of go test.
type program struct {
	log      io.Writer
	cleanups []func()
	failed   bool
}

// run calls do, which ends early when something is fatal, and then every clean-up. It reports whether all went well.
func (p *program) run(do func()) bool {
	ended := make(chan struct{})
	go func() { // Fatalf ends this goroutine
		defer close(ended)
		defer unwind(&p.cleanups)
		do()
	}()
	<-ended
	return !p.failed
}

func (p *program) Helper()           {}
func (p *program) Name() string      { return "bench" }
func (p *program) Failed() bool      { return p.failed }
func (p *program) Cleanup(fn func()) { p.cleanups = append(p.cleanups, fn) }
func (p *program) Logf(format string, args ...any) {
	fmt.Fprintf(p.log, "bench: "+format+"\n", args...)
}

func (p *program) Errorf(format string, args ...any) {
	p.failed = true
	p.Logf(format, args...)
}

func (p *program) Fatalf(format string, args ...any) {
	p.Errorf(format, args...)
	runtime.Goexit()
}

// Skipf is fatal: who runs a benchmark wants its numbers.
func (p *program) Skipf(format string, args ...any) { p.Fatalf(format, args...) }

// scope is a T whose clean-ups run before those of the T around it.
type scope struct {
	farmtest.T
	cleanups []func()
}

func (s *scope) Cleanup(fn func()) { s.cleanups = append(s.cleanups, fn) }

// within calls do, and then undoes what do has started.
func within(t farmtest.T, do func(farmtest.T)) {
	t.Helper()
	s := &scope{T: t}
	defer unwind(&s.cleanups)
	do(s)
}

// unwind calls the clean-ups, last first. They may add more.
func unwind(cleanups *[]func()) {
	for len(*cleanups) > 0 {
		last := (*cleanups)[len(*cleanups)-1]
		*cleanups = (*cleanups)[:len(*cleanups)-1]
		last()
	}
}
