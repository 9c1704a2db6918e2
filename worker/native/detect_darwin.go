package native

import (
	"context"

	"golang.org/x/sys/unix"
)

// detail corrects what Rosetta pretends: for a translated process uname says
// x86_64 on an ARM machine.
func (m *Machine) detail(context.Context) error {
	// The name is unknown on machines without Rosetta.
	if translated, err := unix.SysctlUint32("sysctl.proc_translated"); err == nil && translated == 1 {
		m.Arch = "arm64"
	}
	return nil
}
