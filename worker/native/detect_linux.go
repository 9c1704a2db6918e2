package native

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/archfarm/archfarm/worker/native/program"
)

func (m *Machine) detail(ctx context.Context) error {
	base := bases[m.Arch].Architecture
	// Under an emulator uname says what the emulator pretends to be. Where nothing
	// may be executed, or there is no program, uname's word has to do.
	if _, err := program.Run(ctx, base); err != nil && !errors.Is(err, program.ErrCannotRun) {
		return fmt.Errorf("this process says that it is on %s, but: %w", base, err)
	}
	switch base {
	case "amd64":
		m.IA32 = runs(ctx, "386")
		f, err := os.Open("/proc/cpuinfo")
		if err != nil {
			return err
		}
		defer f.Close()
		m.CPUFlags, err = CommonFlags(f)
		return err
	case "arm64":
		m.AArch32 = runs(ctx, "arm")
	}
	return nil
}

// runs tells whether the CPU was seen to execute programs of an architecture.
// To ask is not enough: a kernel may be built without its 32-bit half (as the
// arm64 kernels with 64 KiB pages are), or told to leave it alone
// (ia32_emulation=0), on a CPU that has it.
func runs(ctx context.Context, arch string) bool {
	_, err := program.Run(ctx, arch)
	return err == nil
}
