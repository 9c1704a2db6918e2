package native

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

const (
	perLinux32     = 0x0008     // PER_LINUX32 of linux/personality.h
	askPersonality = 0xffffffff // personality(2): returns the present one, changes nothing
)

func (m *Machine) detail() error {
	switch m.Arch {
	case "x86_64":
		f, err := os.Open("/proc/cpuinfo")
		if err != nil {
			return err
		}
		defer f.Close()
		m.CPUFlags, err = commonFlags(f)
		return err
	case "aarch64":
		m.AArch32 = runsAArch32()
	}
	return nil
}

// runsAArch32 asks an arm64 kernel whether a 32-bit program could run: it grants
// PER_LINUX32 only if it has CONFIG_COMPAT and the CPU has AArch32 at EL0
// (arch/arm64/kernel/sys.c). Executing a program would also answer yes when
// an emulator is registered with binfmt_misc.
//
// The personality belongs to the thread, so one thread is locked for it. If it
// could not be restored, the goroutine ends with the thread still locked,
// which makes the runtime end the thread.
func runsAArch32() bool {
	answer := make(chan bool)
	go func() {
		runtime.LockOSThread()
		before, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, askPersonality, 0, 0)
		if errno != 0 {
			runtime.UnlockOSThread()
			answer <- false
			return
		}
		_, _, errno = unix.RawSyscall(unix.SYS_PERSONALITY, perLinux32, 0, 0)
		granted := errno == 0
		if _, _, errno = unix.RawSyscall(unix.SYS_PERSONALITY, before, 0, 0); errno == 0 {
			runtime.UnlockOSThread()
		}
		answer <- granted
	}()
	return <-answer
}
