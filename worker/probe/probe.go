// Package probe proves what the machine runs natively on which a buildkitd lives
// that may be elsewhere: in a virtual machine, behind a forwarded socket.
//
// BuildKit's own list of platforms does not say: it has whatever a small test
// survives, emulated or not. So steps are built that are nothing but a program
// of package program, without an image and without a network, and tell who
// executes them.
package probe

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/worker/native"
	"github.com/archfarm/archfarm/worker/native/program"
)

const (
	// path of the program in its step.
	path = "/archfarm-probe"
	// stdout is the stream's number in BuildKit's logs.
	stdout = 1
	// stepWithin bounds one step on a busy or slow machine.
	stepWithin = time.Minute
	// maxOutput is more than BuildKit lets a step say by default.
	maxOutput = 4 << 20
	// maxReasons bounds what an error tells, in platforms.
	maxReasons = 4
)

// ErrUnproven is in the chain of Machine's error if the daemon answers, but
// nothing could be proven.
var ErrUnproven = errors.New("nothing could be proven to run natively where buildkitd is")

// Machine finds out what executes the steps of the daemon behind c: its Arch,
// CPUFlags, IA32 and AArch32 are proven. If none of the platforms that the
// daemon lists is native, or there is no program to prove it, ErrUnproven is in
// the error's chain; any other error says that the daemon could not be asked.
func Machine(ctx context.Context, c *client.Client) (native.Machine, error) {
	listed, err := Listed(ctx, c)
	if err != nil {
		return native.Machine{}, err
	}
	return prove(architectures(listed), func(arch string) (program.Testimony, error) { return ask(ctx, c, arch) })
}

// Listed are the platforms that the daemon behind c says it builds for: the
// native ones, what it emulates, and what its operator says.
func Listed(ctx context.Context, c *client.Client) (list []ocispecs.Platform, err error) {
	workers, err := c.ListWorkers(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking buildkitd for its platforms: %w", err)
	}
	for _, w := range workers {
		list = append(list, w.Platforms...)
	}
	return list, nil
}

// architectures are those of Linux, each once, in their order.
func architectures(list []ocispecs.Platform) (found []string) {
	for _, p := range list {
		if p.OS == "linux" && !slices.Contains(found, p.Architecture) {
			found = append(found, p.Architecture)
		}
	}
	return found
}

// bases are what a machine can be, with uname's word for it, and which 32-bit
// relative it may run beside. A machine that is a 32-bit one has nothing before
// it in this list that is native.
var bases = []struct{ arch, uname, relative string }{
	{"amd64", "x86_64", "386"},
	{"arm64", "aarch64", "arm"},
	{"riscv64", "riscv64", ""},
	{"ppc64le", "ppc64le", ""},
	{"s390x", "s390x", ""},
	{"arm", "armv7l", ""},
	{"386", "i686", ""},
}

// prove asks for the testimonies of the listed architectures until one is native.
func prove(listed []string, ask func(arch string) (program.Testimony, error)) (native.Machine, error) {
	var reasons []string
	for _, b := range bases {
		if !slices.Contains(listed, b.arch) {
			continue
		}
		t, err := ask(b.arch)
		if errors.Is(err, program.ErrNotNative) {
			reasons = append(reasons, err.Error())
			continue
		}
		if err != nil {
			return native.Machine{}, err
		}
		m := native.Machine{OS: "linux", Arch: b.uname}
		if b.arch == "arm" && strings.HasPrefix(t.Machine, "armv6") {
			m.Arch = "armv6l"
		}
		if b.arch == "amd64" {
			if m.CPUFlags, err = native.CommonFlags(bytes.NewReader(t.CPUInfo)); err != nil {
				return native.Machine{}, fmt.Errorf("reading /proc/cpuinfo of buildkitd's machine: %w", err)
			}
		}
		if b.relative == "" || !slices.Contains(listed, b.relative) {
			return m, nil
		}
		_, err = ask(b.relative)
		if err != nil && !errors.Is(err, program.ErrNotNative) {
			return native.Machine{}, err
		}
		m.IA32, m.AArch32 = err == nil && b.arch == "amd64", err == nil && b.arch == "arm64"
		return m, nil
	}
	return native.Machine{}, unproven(listed, reasons)
}

func unproven(listed, reasons []string) error {
	if len(reasons) == 0 {
		return fmt.Errorf("%w: it lists %.200q, and there is a proof for none of them", ErrUnproven, listed)
	}
	return fmt.Errorf("%w: %s", ErrUnproven, strings.Join(reasons[:min(len(reasons), maxReasons)], "; "))
}

// ask builds the step of an architecture. If the step ran, but not on the CPU,
// or could not be run, program.ErrNotNative is in the error's chain.
func ask(ctx context.Context, c *client.Client, arch string) (program.Testimony, error) {
	output, err := build(ctx, c, arch)
	switch {
	case ctx.Err() != nil:
		return program.Testimony{}, fmt.Errorf("proving linux/%s: %w", arch, ctx.Err())
	case status.Code(err) == codes.Unavailable:
		return program.Testimony{}, fmt.Errorf("proving linux/%s: buildkitd went away: %w", arch, err)
	case err != nil:
		return program.Testimony{}, fmt.Errorf("linux/%s is %w: %w", arch, program.ErrNotNative, err)
	}
	t, err := program.Parse(output)
	if err != nil {
		return t, fmt.Errorf("linux/%s is %w: %w", arch, program.ErrNotNative, err)
	}
	if err := t.Native(path); err != nil {
		return t, fmt.Errorf("linux/%s is %w", arch, err)
	}
	return t, nil
}

// build runs the program of an architecture as a step, always anew, and returns
// what it wrote.
func build(ctx context.Context, c *client.Client, arch string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, stepWithin, fmt.Errorf("the step took longer than %v", stepWithin))
	defer cancel()
	step := llb.Scratch().
		File(llb.Mkfile(path, 0o755, program.Bytes(arch)), llb.WithCustomName("make a program that tells who executes it")).
		Run(llb.Args([]string{path}), llb.IgnoreCache, llb.Network(llb.NetModeNone),
			llb.WithCustomNamef("prove that linux/%s is native", arch))
	def, err := step.Root().Marshal(ctx, llb.Platform(ocispecs.Platform{OS: "linux", Architecture: arch}))
	if err != nil {
		return nil, err
	}
	var (
		output  []byte
		reading sync.WaitGroup
		updates = make(chan *client.SolveStatus)
	)
	reading.Go(func() { // until Solve closes updates
		for update := range updates {
			output = appendOutput(output, update)
		}
	})
	_, err = c.Solve(ctx, def, client.SolveOpt{Internal: true}, updates)
	reading.Wait()
	return output, err
}

// appendOutput adds what the one step wrote, up to maxOutput.
func appendOutput(output []byte, update *client.SolveStatus) []byte {
	for _, l := range update.Logs {
		if l.Stream == stdout {
			output = append(output, l.Data[:min(len(l.Data), maxOutput-len(output))]...)
		}
	}
	return output
}
