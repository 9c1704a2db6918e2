package probe

import (
	"errors"
	"slices"
	"testing"

	"github.com/moby/buildkit/client"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/worker/native"
	"github.com/archfarm/archfarm/worker/native/program"
)

func TestMain(m *testing.M) {
	// farmtest starts processes from a thread that never ends.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/archfarm/archfarm/e2e/farmtest.spawn.func1.1"))
}

// A daemon behind TCP could be anywhere. This one is here, so what the steps
// prove is what the machine says of itself.
func TestMachine_IsWhatTheMachineSaysOfItself(t *testing.T) {
	tools := farmtest.FindTools(t)
	c := dial(t, farmtest.StartBuildkitdTCP(t, tools, "probed"))
	here, err := native.Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second finds the first one's cache
		got, err := Machine(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if want := native.Format(native.From(here)); !slices.Equal(native.Format(native.From(got)), want) {
			t.Errorf("proven %q, want %q", native.Format(native.From(got)), want)
		}
	}
	// What it does not list is not executed natively either.
	for _, b := range bases {
		_, err := ask(t.Context(), c, b.arch)
		if native := runsHere(here, b.arch); native != (err == nil) || !native && !errors.Is(err, program.ErrNotNative) {
			t.Errorf("linux/%s: %v", b.arch, err)
		}
	}
}

func runsHere(m native.Machine, arch string) bool {
	return slices.ContainsFunc(native.From(m), func(p ocispecs.Platform) bool { return p.Architecture == arch })
}

func TestMachine_ADaemonThatWentAwayProvesNothing(t *testing.T) {
	tools := farmtest.FindTools(t)
	daemon := farmtest.StartBuildkitdTCP(t, tools, "leaving")
	c := dial(t, daemon)
	if _, err := Listed(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	daemon.Kill()
	if m, err := Machine(t.Context(), c); err == nil || errors.Is(err, ErrUnproven) {
		t.Errorf("%+v, %v", m, err)
	}
	if _, err := ask(t.Context(), c, "amd64"); err == nil || errors.Is(err, program.ErrNotNative) {
		t.Errorf("a step: %v", err)
	}
}

func dial(t *testing.T, daemon *farmtest.Buildkitd) *client.Client {
	t.Helper()
	c, err := client.New(t.Context(), daemon.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}
