// Package build holds the words of the domain that every part of the coordinator
// shares: above all the errors a build can end with, each with the gRPC code it has
// at the edge. It imports nothing else of this module.
package build

import (
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// noWorkers is how an empty fleet is written in NoWorkerError.Fleet.
const noWorkers = "no workers"

// NoWorkerError says that a platform is needed which no worker of the farm runs
// natively. Its gRPC code is FailedPrecondition: to try again helps only after
// somebody has attached a worker.
type NoWorkerError struct {
	// Platform is what is needed, formatted as OCI does: linux/arm/v7.
	Platform string
	// Step names what needs it, for instance `[linux/s390x 3/4] RUN make`;
	// empty when the whole leg does.
	Step string
	// Pools that it may run in; empty: any.
	Pools []string
	// Fleet lists what the farm, or those pools, have: "linux/amd64 (3), linux/arm64
	// (5)". Empty and "no workers" both mean that nothing is attached.
	Fleet string
	// Others lists likewise what other pools have; empty for nothing, or nothing that
	// the build's client may know of.
	Others string
	// Emulators counts workers of those pools that could emulate the platform, but
	// must not.
	Emulators int
	// Detail says why workers of that platform do not count, if there are any:
	// "2 draining, 1 full".
	Detail string
}

func (e *NoWorkerError) Error() string {
	var b strings.Builder
	b.WriteString("no native worker for ")
	b.WriteString(e.Platform)
	if len(e.Pools) > 0 {
		b.WriteString(" in ")
		b.WriteString(Pools(e.Pools))
	}
	if e.Step != "" {
		fmt.Fprintf(&b, ", needed by %q", e.Step)
	}
	b.WriteString(": ")
	if e.Detail != "" {
		b.WriteString(e.Detail)
		b.WriteString("; ")
	}
	e.writeFleet(&b)
	if e.Emulators > 0 {
		fmt.Fprintf(&b, "; emulation would be possible on %d of them, if the coordinator's --allow-emulation named their pool", e.Emulators)
	}
	return b.String()
}

func (e *NoWorkerError) writeFleet(b *strings.Builder) {
	nothing := e.Fleet == "" || e.Fleet == noWorkers
	switch {
	case len(e.Pools) > 0 && nothing:
		b.WriteString(Pools(e.Pools))
		b.WriteString(have(e.Pools))
		b.WriteString("no workers")
	case len(e.Pools) > 0:
		b.WriteString(Pools(e.Pools))
		b.WriteString(have(e.Pools))
		b.WriteString(e.Fleet)
	case nothing:
		b.WriteString(`the farm has no workers; start one with "archfarm worker"`)
	default:
		b.WriteString("the farm has ")
		b.WriteString(e.Fleet)
	}
	if e.Others != "" {
		b.WriteString("; other pools have ")
		b.WriteString(e.Others)
	}
}

// Pools names pools, of which there are some: "pool office", "pools cloud, office".
func Pools(names []string) string {
	if len(names) == 1 {
		return "pool " + names[0]
	}
	return "pools " + strings.Join(names, ", ")
}

func have(names []string) string {
	if len(names) == 1 {
		return " has "
	}
	return " have "
}

// GRPCStatus makes the error a FailedPrecondition on the wire.
func (e *NoWorkerError) GRPCStatus() *status.Status {
	return status.New(codes.FailedPrecondition, e.Error())
}

// LegError says in which leg, on which worker and at which attempt a build failed.
// Code and details of the wrapped error stay as they are; the details carry the lines
// of the Dockerfile that the client shows.
type LegError struct {
	// Platform of the leg, formatted.
	Platform string
	// Worker that ran the attempt; empty when none was chosen yet.
	Worker string
	// Attempt counts from 1; 0 when the leg was never tried.
	Attempt int
	// Err is what went wrong.
	Err error
}

func (e *LegError) Error() string {
	var b strings.Builder
	b.WriteString(e.Platform)
	if e.Worker != "" {
		b.WriteString(" on ")
		b.WriteString(e.Worker)
	}
	if e.Attempt > 0 {
		fmt.Fprintf(&b, " (attempt %d)", e.Attempt)
	}
	b.WriteString(": ")
	b.WriteString(Message(e.Err))
	return b.String()
}

// Unwrap returns the wrapped error.
func (e *LegError) Unwrap() error { return e.Err }

// GRPCStatus is the wrapped error's status, its details included, under this error's
// message. Details that grpcerrors.FromGRPC has turned into typed errors are not
// repeated in it: grpcerrors.ToGRPC, which finds them by unwrapping, would send them
// twice and the client would print the Dockerfile's lines twice. So an error that has
// been through FromGRPC has to leave through ToGRPC.
func (e *LegError) GRPCStatus() *status.Status {
	inner, ok := grpcerrors.AsGRPCStatus(e.Err)
	if !ok || inner == nil {
		inner = status.New(grpcerrors.Code(e.Err), "")
	}
	p := inner.Proto() // a copy
	// ToGRPC lets a code set by grpcerrors.WrapCode win over the status; do the same.
	if code := grpcerrors.Code(e.Err); code != codes.OK && code != codes.Unknown {
		p.Code = int32(code)
	}
	if codes.Code(p.Code) == codes.OK { //nolint:gosec // gRPC's own numbering
		p.Code = int32(codes.Unknown)
	}
	p.Message = e.Error()
	return status.FromProto(p)
}

// LostError says that a worker went away (crashed, unreachable, killed) while it had an
// attempt. Its gRPC code is Unavailable: to try again may well help.
type LostError struct {
	// Worker is the name of the lost one.
	Worker string
	// Cause is how it was noticed; may be nil.
	Cause error
}

func (e *LostError) Error() string {
	if e.Cause == nil {
		return "worker " + e.Worker + " was lost"
	}
	return "worker " + e.Worker + " was lost: " + Message(e.Cause)
}

// Unwrap returns the cause.
func (e *LostError) Unwrap() error { return e.Cause }

// GRPCStatus makes the error an Unavailable on the wire, whatever the cause's own code.
func (e *LostError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, e.Error())
}

// Message is err's text without the "rpc error: code = … desc = " that gRPC puts
// before a status' message: the code travels beside the text, and people read the text.
func Message(err error) string {
	if err == nil {
		return "unknown error"
	}
	text := err.Error()
	var carrier interface {
		error
		GRPCStatus() *status.Status
	}
	if !errors.As(err, &carrier) {
		return text
	}
	st := carrier.GRPCStatus()
	if st == nil || st.Message() == "" {
		return text
	}
	return strings.Replace(text, carrier.Error(), st.Message(), 1)
}
