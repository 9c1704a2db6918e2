package worker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/worker/native"
	"github.com/archfarm/archfarm/worker/native/binfmt"
	"github.com/archfarm/archfarm/worker/probe"
)

const (
	// emulatorsEvery is the time between two looks for emulators, which are
	// registered and taken away while everything runs.
	emulatorsEvery = 5 * time.Second
	// probeTimes is how often a daemon that goes away is probed.
	probeTimes = 3
)

// machine is the one on which buildkitd lives.
type machine struct {
	// name is operating system and architecture, such as "linux/arm64".
	name string
	// offered is what the operator says, else what was found to be native.
	offered []ocispecs.Platform
	// native is known to need no emulator: what is offered, and what was found.
	native []ocispecs.Platform
}

// here is this process's machine. It stays what it is, so it is looked at once.
var here = sync.OnceValues(func() (native.Machine, error) { return native.Detect(context.Background()) })

// lookAt finds out what d's machine runs natively: by a look at this machine if
// they are the same, else by a probe through BuildKit. What the operator says
// spares the probe. It returns an error if nothing is said and nothing is proven.
func lookAt(ctx context.Context, d *daemon, said []ocispecs.Platform) (*machine, error) {
	local, err := d.near(ctx)
	if err != nil {
		return nil, fmt.Errorf("finding out where buildkitd at %s runs: %w", d.addr, err)
	}
	var m native.Machine
	switch {
	case local || len(said) > 0:
		m, err = here()
	default:
		d.log.Info("buildkitd may live on another machine: proving what it runs natively", "buildkit", d.addr.String())
		m, err = d.prove(ctx)
	}
	switch {
	case err != nil && len(said) == 0:
		return nil, fmt.Errorf("finding out what buildkitd at %s runs natively: %w; name its platforms with --platform", d.addr, err)
	case err != nil || len(said) > 0 && !local:
		// The operator's word has to do. Relatives that the CPU may run as well are
		// left open: they are neither offered nor called emulated.
		return &machine{name: said[0].OS + "/" + said[0].Architecture, offered: said, native: withRelatives(said)}, nil
	}
	found := native.From(m)
	if len(said) == 0 && len(found) == 0 {
		return nil, fmt.Errorf("what %s runs natively is not known; name its platforms with --platform", m)
	}
	if len(said) == 0 {
		said = found
	}
	return &machine{name: m.String(), offered: said, native: slices.Concat(said, found)}, nil
}

// near tells whether d is under this kernel. It asks again if d goes away meanwhile.
func (d *daemon) near(ctx context.Context) (local bool, err error) {
	for range probeTimes {
		if _, local, err = d.peer(ctx); err == nil || ctx.Err() != nil {
			return local, err
		}
		if _, err := d.await(ctx); err != nil {
			return false, err
		}
	}
	return false, err
}

// prove probes d's machine, again if d goes away meanwhile.
func (d *daemon) prove(ctx context.Context) (m native.Machine, err error) {
	for range probeTimes {
		m, err = probe.Machine(ctx, d.client)
		if status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return m, err
		}
		if _, err := d.await(ctx); err != nil {
			return m, err
		}
	}
	return m, err
}

// relatives are the 32-bit architectures that many CPUs run beside their own.
var relatives = map[string]string{"amd64": "386", "arm64": "arm"}

func withRelatives(list []ocispecs.Platform) []ocispecs.Platform {
	all := slices.Clone(list)
	for _, p := range list {
		if r, ok := relatives[p.Architecture]; ok {
			all = append(all, ocispecs.Platform{OS: p.OS, Architecture: r})
		}
	}
	return all
}

// watchEmulators keeps s informed of what can be emulated, until ctx ends.
func (m *machine) watchEmulators(ctx context.Context, d *daemon, s *slots) {
	var before []string
	for {
		list, err := d.emulates(ctx)
		found := native.Format(emulatedOnly(list, m.native))
		switch {
		case ctx.Err() != nil:
			return
		case err != nil: // what was seen before has to do
			d.log.Debug("looking for emulators", "error", err)
		case !slices.Equal(found, before):
			d.log.Info("platforms that could be emulated here", "platforms", found)
			s.setEmulated(found)
			before = found
		}
		if !sleep(ctx, emulatorsEvery) {
			return
		}
	}
}

// emulatedOnly drops from list whatever is of an architecture that is native in
// any variant, and repetitions.
func emulatedOnly(list, native []ocispecs.Platform) (found []ocispecs.Platform) {
	for _, p := range list {
		isNative := slices.ContainsFunc(native, func(n ocispecs.Platform) bool { return n.OS == p.OS && n.Architecture == p.Architecture })
		isThere := slices.ContainsFunc(found, func(f ocispecs.Platform) bool {
			return f.OS == p.OS && f.Architecture == p.Architecture && f.Variant == p.Variant
		})
		if !isNative && !isThere {
			found = append(found, p)
		}
	}
	return found
}

// emulates lists what d's machine executes with or without an emulator. On this
// machine the kernel and the folders say what emulators there are. Elsewhere, and
// in a container that does not see them, BuildKit's own list is the next best:
// what it has beyond the native platforms is emulated, but what it once had stays.
func (d *daemon) emulates(ctx context.Context) ([]ocispecs.Platform, error) {
	pid, local, err := d.peer(ctx)
	if err != nil {
		return nil, err
	}
	if !local {
		return d.listed(ctx)
	}
	bundled := binfmt.Bundled(pid)
	handlers, err := binfmt.List(os.DirFS(binfmt.Folder))
	if errors.Is(err, fs.ErrNotExist) {
		listed, err := d.listed(ctx)
		return slices.Concat(listed, bundled), err
	}
	return slices.Concat(binfmt.Platforms(handlers), bundled), err
}

func (d *daemon) listed(ctx context.Context) ([]ocispecs.Platform, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timing.checkWithin)
	defer cancel()
	list, err := probe.Listed(ctx, d.client)
	for i, p := range list {
		list[i] = platforms.Normalize(p)
	}
	return list, err
}

// announce puts into the Hello what the machine is. It returns an error if
// buildkitd cannot be used, or nothing is known to be native.
func (a *agent) announce(ctx context.Context, said []ocispecs.Platform) error {
	if err := usable(a.hello.GetBuildkitVersion()); err != nil {
		return err
	}
	m, err := lookAt(ctx, a.buildkit, said)
	if err != nil {
		return err
	}
	a.machine = m
	a.hello.Platforms, a.hello.Machine = native.Format(m.offered), m.name
	return nil
}

// notIfStopped is nil if ctx has ended, which is why err came.
func notIfStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("worker: %w", err)
}
