package probe

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/worker/native"
	"github.com/archfarm/archfarm/worker/native/program"
)

func TestProve(t *testing.T) {
	t.Parallel()
	const flags = "flags : cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3\n"
	for name, c := range map[string]struct {
		listed string            // by buildkitd
		native map[string]string // and uname's word there
		want   string
	}{
		"a PC":                            {"amd64 386 arm64", map[string]string{"amd64": "x86_64", "386": "x86_64"}, "linux/amd64 linux/amd64/v2 linux/386"},
		"a PC without 32 bits":            {"amd64 386", map[string]string{"amd64": "x86_64"}, "linux/amd64 linux/amd64/v2"},
		"386 is not listed":               {"amd64", map[string]string{"amd64": "x86_64", "386": "x86_64"}, "linux/amd64 linux/amd64/v2"},
		"a Mac's VM with Rosetta":         {"arm64 amd64", map[string]string{"arm64": "aarch64"}, "linux/arm64"},
		"qemu for 32-bit ARM":             {"arm64 arm", map[string]string{"arm64": "aarch64"}, "linux/arm64"},
		"graviton 2":                      {"arm64 arm", map[string]string{"arm64": "aarch64", "arm": "armv8l"}, "linux/arm64 linux/arm/v7 linux/arm/v6"},
		"raspberry pi 1":                  {"arm", map[string]string{"arm": "armv6l"}, "linux/arm/v6"},
		"raspberry pi 2":                  {"arm amd64", map[string]string{"arm": "armv7l"}, "linux/arm/v7 linux/arm/v6"},
		"mainframe":                       {"s390x", map[string]string{"s390x": "s390x"}, "linux/s390x"},
		"the first that is listed is not": {"s390x riscv64", map[string]string{"riscv64": "riscv64"}, "linux/riscv64"},
	} {
		m, err := prove(strings.Fields(c.listed), func(arch string) (program.Testimony, error) {
			machine, ok := c.native[arch]
			if !ok {
				return program.Testimony{}, fmt.Errorf("linux/%s is %w: qemu", arch, program.ErrNotNative)
			}
			return program.Testimony{Machine: machine, CPUInfo: []byte(flags)}, nil
		})
		if got := strings.Join(native.Format(native.From(m)), " "); got != c.want || err != nil {
			t.Errorf("%s: %q, %v, want %q", name, got, err, c.want)
		}
	}
}

func TestProve_SaysWhyNothingIsProven(t *testing.T) {
	t.Parallel()
	emulated := func(arch string) (program.Testimony, error) {
		return program.Testimony{}, fmt.Errorf("linux/%s is %w: qemu executes it", arch, program.ErrNotNative)
	}
	for listed, want := range map[string]string{"loong64": "a proof for none", "": "a proof for none", "arm64 386": "qemu executes it"} {
		m, err := prove(strings.Fields(listed), emulated)
		if !errors.Is(err, ErrUnproven) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %+v, %v", listed, m, err)
		}
	}
	gone := errors.New("gone")
	_, err := prove([]string{"amd64"}, func(string) (program.Testimony, error) { return program.Testimony{}, gone })
	if !errors.Is(err, gone) || errors.Is(err, ErrUnproven) {
		t.Errorf("a daemon that went away: %v", err)
	}
}

func TestArchitectures(t *testing.T) {
	t.Parallel()
	got := architectures([]ocispecs.Platform{{OS: "linux", Architecture: "arm64"}, {OS: "linux", Architecture: "arm", Variant: "v7"}, {OS: "windows", Architecture: "amd64"}, {OS: "linux", Architecture: "arm"}})
	if !slices.Equal(got, []string{"arm64", "arm"}) {
		t.Errorf("%q", got)
	}
}
