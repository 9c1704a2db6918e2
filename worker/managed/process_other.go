//go:build !linux

package managed

import (
	"os"
	"syscall"
)

// apart has nothing to ask for where there is no buildkitd to build with: its
// worker needs Linux.
func apart() *syscall.SysProcAttr { return nil }

func kill(p *os.Process) { _ = p.Kill() }
