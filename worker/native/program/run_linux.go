package program

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

const (
	memfdName = "archfarm-probe"
	// memfdPath is what the kernel calls the program when it executes it.
	memfdPath = "/memfd:" + memfdName + " (deleted)"

	// runWithin is ample: an emulator needs some milliseconds.
	runWithin = 10 * time.Second
	// maxOutput is more than /proc/cpuinfo of a thousand CPUs has.
	maxOutput = 4 << 20
)

// ErrCannotRun is in the chain of Run's error where the machine's settings keep
// this process from executing any program of its own, which proves nothing.
var ErrCannotRun = errors.New("this process may not execute a program of its own")

// Run executes the program of an architecture on this machine and returns its
// testimony and nil if it is native. For a program that cannot be executed, or
// by an emulator only, ErrNotNative is in the error's chain.
func Run(ctx context.Context, arch string) (Testimony, error) {
	image := Bytes(arch)
	if image == nil {
		return Testimony{}, fmt.Errorf("proving %s: %w: there is no program for it", arch, ErrCannotRun)
	}
	file, err := inMemory(image)
	if err != nil {
		return Testimony{}, fmt.Errorf("proving %s: %w: %w", arch, ErrCannotRun, err)
	}
	defer file.Close()
	output, err := execute(ctx, file)
	switch {
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
		return Testimony{}, fmt.Errorf("proving %s: %w: %w", arch, ErrCannotRun, err)
	case err != nil:
		return Testimony{}, fmt.Errorf("proving %s: %w: %w", arch, ErrNotNative, err)
	}
	t, err := Parse(output)
	if err != nil {
		return Testimony{}, fmt.Errorf("proving %s: %w: %w", arch, ErrNotNative, err)
	}
	if err := t.Native(memfdPath); err != nil {
		return t, fmt.Errorf("proving %s: %w", arch, err)
	}
	return t, nil
}

// inMemory makes a file that needs no folder from which programs may be run. It
// is open for reading only: what is open for writing is not executed.
func inMemory(image []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(memfdName, unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // older than Linux 6.3
		fd, err = unix.MemfdCreate(memfdName, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	written := os.NewFile(uintptr(fd), memfdName)
	defer written.Close()
	if _, err := written.Write(image); err != nil {
		return nil, err
	}
	return os.Open(procPath(written))
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func execute(ctx context.Context, file *os.File) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, runWithin)
	defer cancel()
	for {
		output := limited{left: maxOutput}
		cmd := exec.CommandContext(ctx, procPath(file))
		cmd.Stdout, cmd.Env = &output, []string{}
		cmd.WaitDelay = time.Second
		err := cmd.Run()
		// A process that was forked elsewhere in this one a moment ago still has the
		// descriptor for writing, until it executes something.
		if errors.Is(err, unix.ETXTBSY) && ctx.Err() == nil {
			continue
		}
		return output.Bytes(), err
	}
}

// limited keeps the first bytes that are written to it.
type limited struct {
	bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	keep := p[:min(len(p), l.left)]
	l.left -= len(keep)
	l.Buffer.Write(keep)
	return len(p), nil
}
