package program

import (
	"context"
	"errors"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestRun_TheArchitectureOfThisProcessIsNative(t *testing.T) {
	t.Parallel()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	got, err := Run(t.Context(), runtime.GOARCH)
	if errors.Is(err, ErrCannotRun) {
		t.Skip(err)
	}
	if err != nil || got.Machine != unix.ByteSliceToString(u.Machine[:]) || len(got.CPUInfo) == 0 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRun_AnotherArchitectureIsNot(t *testing.T) {
	t.Parallel()
	related := map[string]string{"amd64": "386", "arm64": "arm"}
	for arch := range targets {
		if arch == runtime.GOARCH || arch == related[runtime.GOARCH] {
			continue
		}
		if got, err := Run(t.Context(), arch); !errors.Is(err, ErrNotNative) && !errors.Is(err, ErrCannotRun) {
			t.Errorf("%s on %s: %+v, %v", arch, runtime.GOARCH, got, err)
		}
	}
	if _, err := Run(t.Context(), "vax"); !errors.Is(err, ErrCannotRun) {
		t.Errorf("an architecture without a program: %v", err)
	}
}

func TestRun_EndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, runtime.GOARCH); err == nil {
		t.Error("ran although it was not to")
	}
}

// qemu's user-mode emulators pretend to be the program that they execute. The
// programs see through it, and so prove their own machine code on the way.
func TestPrograms_SeeThroughQEMU(t *testing.T) {
	t.Parallel()
	names := map[string]string{"amd64": "x86_64", "386": "i386", "arm64": "aarch64"}
	ran := false
	for arch := range targets {
		name := arch
		if n, ok := names[arch]; ok {
			name = n
		}
		qemu, err := exec.LookPath("qemu-" + name + "-static")
		if err != nil {
			continue
		}
		ran = true
		file, err := inMemory(Bytes(arch))
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd := exec.CommandContext(t.Context(), qemu, "/proc/self/fd/3")
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
		output, err := cmd.Output()
		if err != nil {
			t.Errorf("%s: %v", arch, err)
			continue
		}
		testimony, err := Parse(output)
		if err != nil || testimony.Exe != qemu || len(testimony.CPUInfo) == 0 || testimony.Machine == "" {
			t.Errorf("%s: %.200q, %v", arch, output, err)
			continue
		}
		for _, path := range []string{memfdPath, "/probe", "/proc/self/fd/3"} {
			if err := testimony.Native(path); !errors.Is(err, ErrNotNative) || !strings.Contains(err.Error(), "qemu") {
				t.Errorf("%s: %v", arch, err)
			}
		}
		// Hidden better, the emulator's own code would still give it away.
		testimony.Exe = memfdPath
		if err := testimony.Native(memfdPath); !errors.Is(err, ErrNotNative) {
			t.Errorf("%s, hidden: %v", arch, err)
		}
	}
	if !ran {
		t.Skip("install qemu-user-static: no emulator to see through")
	}
}
