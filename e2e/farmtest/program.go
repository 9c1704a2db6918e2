package farmtest

import (
	"fmt"
	"io"
	"runtime"
)

// Program is the T of a run outside of go test.
type Program struct {
	Title string // what every line of Log begins with
	Log   io.Writer

	cleanups []func()
	failed   bool
}

// Run calls do, which ends early when something is fatal, and then every clean-up. It reports whether all went well.
func (p *Program) Run(do func()) bool {
	ended := make(chan struct{})
	go func() { // Fatalf ends this goroutine
		defer close(ended)
		defer unwind(&p.cleanups)
		do()
	}()
	<-ended
	return !p.failed
}

// Helper does nothing: lines of the log do not tell where they come from.
func (p *Program) Helper() {}

// Name is the title.
func (p *Program) Name() string { return p.Title }

// Failed tells whether an error was noted.
func (p *Program) Failed() bool { return p.failed }

// Cleanup has fn called when the run is over.
func (p *Program) Cleanup(fn func()) { p.cleanups = append(p.cleanups, fn) }

// Logf writes a line to the log.
func (p *Program) Logf(format string, args ...any) {
	fmt.Fprintf(p.Log, p.Title+": "+format+"\n", args...)
}

// Errorf notes an error, and the run goes on.
func (p *Program) Errorf(format string, args ...any) {
	p.failed = true
	p.Logf(format, args...)
}

// Fatalf notes an error and ends the run.
func (p *Program) Fatalf(format string, args ...any) {
	p.Errorf(format, args...)
	runtime.Goexit()
}

// Skipf is fatal: who runs a measurement wants its numbers.
func (p *Program) Skipf(format string, args ...any) { p.Fatalf(format, args...) }

// scope is a T whose clean-ups run before those of the T around it.
type scope struct {
	T
	cleanups []func()
}

func (s *scope) Cleanup(fn func()) { s.cleanups = append(s.cleanups, fn) }

// Within calls do, and then undoes what do has started.
func Within(t T, do func(T)) {
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
