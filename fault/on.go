//go:build archfarm_faults

package fault

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

// passed counts how often the point of ARCHFARM_FAULT was passed.
var passed atomic.Int64

// Point kills the process, as kill -9 does, at the point that ARCHFARM_FAULT names:
// "publish.tagged" the first time, "publish.tagged:2" the second.
func Point(name string) {
	wanted, nth, counted := strings.Cut(os.Getenv("ARCHFARM_FAULT"), ":")
	if wanted != name {
		return
	}
	at := 1
	if counted {
		at, _ = strconv.Atoi(nth)
	}
	if passed.Add(1) != int64(at) {
		return
	}
	fmt.Fprintln(os.Stderr, "fault: dying at", name)
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGKILL) // does not return
	select {}
}
