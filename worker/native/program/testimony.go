package program

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
)

// Testimony is what a program said of the process that it was.
type Testimony struct {
	// Exe is what the kernel executes: the program itself, or an emulator.
	Exe string
	// Machine is uname's word, which may be pretence.
	Machine string
	// CPUInfo is /proc/cpuinfo; its end may be missing where the output was clipped.
	CPUInfo []byte

	maps []byte
}

// ErrNotNative is in the chain of what Native returns for a program that
// something else than the CPU executed.
var ErrNotNative = errors.New("not native")

// maxShown bounds what an error quotes, in bytes.
const maxShown = 128

// Parse reads a program's output. Only the end of /proc/cpuinfo may be missing:
// BuildKit clips what a step says.
func Parse(output []byte) (Testimony, error) {
	parts := bytes.SplitN(output, []byte(mark), 5)
	if len(parts) < 4 {
		return Testimony{}, fmt.Errorf("the program said %d of the 4 things that it should: %.*q", len(parts)-1, maxShown, output)
	}
	cpuinfo := parts[3]
	if len(parts) == 4 { // clipped, maybe in the middle of a line
		cpuinfo = cpuinfo[:bytes.LastIndexByte(cpuinfo, '\n')+1]
	}
	machine, _, _ := bytes.Cut(parts[1], []byte{0})
	return Testimony{
		Exe:     string(parts[0]),
		Machine: string(machine),
		CPUInfo: cpuinfo,
		maps:    parts[2],
	}, nil
}

// kernelCode are the executable mappings that the kernel gives every process.
var kernelCode = []string{"[vdso]", "[vsyscall]", "[sigpage]", "[vectors]", "[uprobes]"}

// Native returns nil if the CPU executed the program, which was started as the
// file of this path. Otherwise ErrNotNative is in the error's chain, and the
// error names what executed it.
func (t Testimony) Native(path string) error {
	if t.Exe != path {
		return fmt.Errorf("%w: %.*q executes such programs", ErrNotNative, maxShown, t.Exe)
	}
	// An emulator that hides from /proc/self/exe still is memory with code in it,
	// and its guest's code is data to it.
	own := false
	for line := range strings.Lines(string(t.maps)) {
		permissions, file := mapping(line)
		switch {
		case !strings.Contains(permissions, "x") || isKernelCode(file):
		case file == path:
			own = true
		default:
			return fmt.Errorf("%w: code of %.*q executes such programs", ErrNotNative, maxShown, file)
		}
	}
	if !own {
		return fmt.Errorf("%w: the program is not what its process executes", ErrNotNative)
	}
	return nil
}

func isKernelCode(file string) bool {
	for _, k := range kernelCode {
		if file == k {
			return true
		}
	}
	return false
}

// mapping reads a line of /proc/self/maps: address, permissions, offset, device,
// inode, and the file, which may be empty and may have spaces.
func mapping(line string) (permissions, file string) {
	rest := strings.TrimSuffix(line, "\n")
	for field := range 5 {
		var word string
		word, rest, _ = strings.Cut(strings.TrimLeft(rest, " "), " ")
		if field == 1 {
			permissions = word
		}
	}
	return permissions, strings.TrimLeft(rest, " ")
}
