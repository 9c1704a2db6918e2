package main

import (
	"fmt"
	"io"
	"runtime"
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
func (p *program) Name() string      { return "fleet" }
func (p *program) Failed() bool      { return p.failed }
func (p *program) Cleanup(fn func()) { p.cleanups = append(p.cleanups, fn) }
func (p *program) Logf(format string, args ...any) {
	fmt.Fprintf(p.log, "fleet: "+format+"\n", args...)
}

func (p *program) Errorf(format string, args ...any) {
	p.failed = true
	p.Logf(format, args...)
}

func (p *program) Fatalf(format string, args ...any) {
	p.Errorf(format, args...)
	runtime.Goexit()
}

// Skipf is fatal: who runs a load test wants its numbers.
func (p *program) Skipf(format string, args ...any) { p.Fatalf(format, args...) }

// unwind calls the clean-ups, last first. They may add more.
func unwind(cleanups *[]func()) {
	for len(*cleanups) > 0 {
		last := (*cleanups)[len(*cleanups)-1]
		*cleanups = (*cleanups)[:len(*cleanups)-1]
		last()
	}
}
