package dispatch

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/fleet"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// readingTimeout bounds how long a failed build waits for its worker's agent to
	// say whether the kernel killed something.
	readingTimeout = 2 * time.Second
	// exitKilled is the exit code of a shell's or container's process that SIGKILL ended.
	exitKilled = 137
	// outOfMemory is how BuildKit words a step in whose own cgroup the kernel killed
	// something (executor/runcexecutor, detectOOM).
	outOfMemory = "did not complete successfully: cannot allocate memory"
)

// memory is what is known of a worker's memory since an attempt began.
type memory struct {
	kills    uint64 // of processes, since the machine booted
	known    bool   // the worker tells
	crowded  bool   // other attempts ran there when this one began, or in its very slot
	checking sync.Mutex
	verdict  string // once something was killed; guarded by checking
}

// begin notes how things are before the attempt, which may be a guest in another's slot.
func (m *memory) begin(w *fleet.Worker, guest bool) {
	m.known, m.kills = kills(w.Load())
	m.crowded = guest || w.Report().GetSlots().GetUsed() > 1
}

// kills is how many processes the kernel has killed, if the load tells.
func kills(l *archfarmv1.Load) (known bool, n uint64) {
	return l != nil && l.OomKills != nil, l.GetOomKills()
}

// withKill adds to the error of a step that failed that the worker's kernel killed
// processes for want of memory meanwhile, if it did. The error's details stay.
func (l *leg) withKill(err error) error {
	if err == nil {
		return nil
	}
	carrier, ok := err.(interface{ GRPCStatus() *status.Status }) // not errors.As: of a wrapped one, the text around it would be lost
	if !ok {
		return err
	}
	code, exited := exitCode(err)
	if !exited {
		return err
	}
	why := l.killed(code, strings.Contains(carrier.GRPCStatus().Message(), outOfMemory))
	if why == "" {
		return err
	}
	told := carrier.GRPCStatus().Proto() // a copy
	told.Message += ": " + why
	return status.ErrorProto(told)
}

// exitCode is that of the step that failed, if it is a step that did.
func exitCode(err error) (code uint32, exited bool) {
	if c := status.Code(err); c == codes.Canceled || c == codes.Unavailable {
		return 0, false
	}
	var exit *gwpb.ExitError
	if errors.As(grpcerrors.FromGRPC(err), &exit) && exit.ExitCode != 0 {
		return exit.ExitCode, true
	}
	return 0, false
}

// killed says, if the kernel killed something since the attempt began, what is known
// of it. Certain: BuildKit has seen it kill something of the very step.
func (l *leg) killed(code uint32, certain bool) string {
	m := &l.memory
	m.checking.Lock()
	defer m.checking.Unlock()
	if m.verdict != "" || !m.known && !certain {
		return m.verdict
	}
	if !certain {
		ctx, cancel := context.WithTimeout(l.build.ctx, readingTimeout)
		defer cancel()
		if err := l.worker.Direct(ctx, &archfarmv1.Directive{Action: &archfarmv1.Directive_ReportNow{ReportNow: &archfarmv1.ReportNow{}}}); err != nil {
			l.build.log.Info("asking whether a step ran out of memory", "worker", l.worker.Name, "error", err) // its last report may still tell
		}
		if _, n := kills(l.worker.Load()); n <= m.kills {
			return ""
		}
	}
	crowded := m.crowded || l.worker.Report().GetSlots().GetUsed() > 1
	m.verdict = verdict(l.worker.Name, l.worker.Load().GetMemoryTotalBytes(), certain || code == exitKilled && !crowded)
	l.build.log.Warn("a leg ran out of memory", "platform", l.String(), "worker", l.worker.Name, "certain", certain, "exit code", code)
	l.build.farm.Metrics.ranOutOfMemory(l.worker.Name)
	return m.verdict
}

// verdict words it. Where other attempts ran on the worker, or the step ended itself
// after one of its processes had been killed, the kill may not be its own.
func verdict(worker string, total uint64, certain bool) string {
	has := ""
	if total > 0 {
		has = fmt.Sprintf("the machine has %.1f GB; ", float64(total)/1e9)
	}
	advice := " (" + has + "let the step do less at a time, or give the worker fewer slots or more memory)"
	if certain {
		return "the kernel of worker " + worker + " killed a process for want of memory" + advice
	}
	return "the kernel of worker " + worker + " killed a process for want of memory meanwhile, probably one of this step's" + advice
}
