package managed

import (
	"os"
	"syscall"
)

// apart is a process in a group of its own, which a terminal's Ctrl-C does not
// reach: the agent drains first. It is told to end should the agent die, so that
// it ends its containers, which would go on if it were killed.
func apart() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// kill ends a process that apart was applied to, and its group.
func kill(p *os.Process) { _ = syscall.Kill(-p.Pid, syscall.SIGKILL) }
