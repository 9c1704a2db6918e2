package native

import (
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"
)

// Flags of real CPUs, shortened to what matters plus some that do not.
const (
	nehalem = "fpu sse sse2 ht pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
	haswell = nehalem + " avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
	skylake = haswell + " avx512f avx512dq avx512cd avx512bw avx512vl"
)

func TestFrom(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		m    Machine
		want string
	}{
		"core 2":            {Machine{OS: "linux", Arch: "x86_64", IA32: true, CPUFlags: strings.Fields("fpu sse2 pni")}, "linux/amd64 linux/386"},
		"nehalem":           {Machine{OS: "linux", Arch: "x86_64", IA32: true, CPUFlags: strings.Fields(nehalem)}, "linux/amd64 linux/amd64/v2 linux/386"},
		"haswell":           {Machine{OS: "linux", Arch: "x86_64", IA32: true, CPUFlags: strings.Fields(haswell)}, "linux/amd64 linux/amd64/v2 linux/amd64/v3 linux/386"},
		"skylake":           {Machine{OS: "linux", Arch: "x86_64", IA32: true, CPUFlags: strings.Fields(skylake)}, "linux/amd64 linux/amd64/v2 linux/amd64/v3 linux/amd64/v4 linux/386"},
		"a level with gaps": {Machine{OS: "linux", Arch: "x86_64", IA32: true, CPUFlags: strings.Fields(strings.Replace(skylake, "movbe", "", 1))}, "linux/amd64 linux/amd64/v2 linux/386"},
		"no 32-bit kernel":  {Machine{OS: "linux", Arch: "x86_64", CPUFlags: strings.Fields(nehalem)}, "linux/amd64 linux/amd64/v2"},
		"graviton 2":        {Machine{OS: "linux", Arch: "aarch64", AArch32: true}, "linux/arm64 linux/arm/v7 linux/arm/v6"},
		"ampere altra":      {Machine{OS: "linux", Arch: "aarch64"}, "linux/arm64"},
		"raspberry pi 2":    {Machine{OS: "linux", Arch: "armv7l"}, "linux/arm/v7 linux/arm/v6"},
		"raspberry pi 1":    {Machine{OS: "linux", Arch: "armv6l"}, "linux/arm/v6"},
		"32-bit userland":   {Machine{OS: "linux", Arch: "armv8l"}, "linux/arm/v7 linux/arm/v6"},
		"mac mini":          {Machine{OS: "darwin", Arch: "arm64", AArch32: true}, "linux/arm64"},
		"intel mac":         {Machine{OS: "darwin", Arch: "x86_64", IA32: true, CPUFlags: strings.Fields(haswell)}, "linux/amd64"},
		"old pc":            {Machine{OS: "linux", Arch: "i686", CPUFlags: strings.Fields(haswell)}, "linux/386"},
		"risc-v":            {Machine{OS: "linux", Arch: "riscv64"}, "linux/riscv64"},
		"power":             {Machine{OS: "linux", Arch: "ppc64le"}, "linux/ppc64le"},
		"mainframe":         {Machine{OS: "linux", Arch: "s390x"}, "linux/s390x"},
		"loongson":          {Machine{OS: "linux", Arch: "loongarch64"}, "linux/loong64"},
		"unknown":           {Machine{OS: "linux", Arch: "vax"}, ""},
		"unknown system":    {Machine{OS: "plan9", Arch: "x86_64"}, ""},
	} {
		if got := strings.Join(Format(From(c.m)), " "); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// Nothing of another architecture ever appears, whatever the flags say.
func TestFrom_NeverNamesAnotherArchitecture(t *testing.T) {
	t.Parallel()
	related := map[string][]string{"amd64": {"amd64", "386"}, "arm64": {"arm64", "arm"}}
	rapid.Check(t, func(r *rapid.T) {
		m := Machine{
			OS:       rapid.SampledFrom([]string{"linux", "darwin"}).Draw(r, "os"),
			Arch:     rapid.SampledFrom([]string{"x86_64", "aarch64", "s390x", "riscv64", "armv7l"}).Draw(r, "arch"),
			CPUFlags: rapid.SliceOf(rapid.SampledFrom(strings.Fields(skylake))).Draw(r, "flags"),
			AArch32:  rapid.Bool().Draw(r, "aarch32"),
			IA32:     rapid.Bool().Draw(r, "ia32"),
		}
		base := bases[m.Arch].Architecture
		found := From(m)
		for i, p := range found {
			if ok := p.Architecture == base || slices.Contains(related[base], p.Architecture); !ok || p.OS != "linux" {
				r.Fatalf("%+v: %s", m, platforms.Format(p))
			}
			if i == 0 && p.Architecture != base {
				r.Fatalf("%+v: begins with %s", m, platforms.Format(p))
			}
		}
		again, err := Parse(Format(found))
		if err != nil || !slices.EqualFunc(again, found, func(a, b ocispecs.Platform) bool { return platforms.Format(a) == platforms.Format(b) }) {
			r.Fatalf("%q reads back as %q, %v", Format(found), Format(again), err)
		}
	})
}

func TestParse_NormalisesKeepsTheOrderAndDropsRepetitions(t *testing.T) {
	t.Parallel()
	got, err := Parse([]string{"linux/arm64/v8", "linux/arm", "linux/x86_64", "linux/aarch64", "Linux/ARM/v7", "linux/amd64/v3"})
	want := []string{"linux/arm64", "linux/arm/v7", "linux/amd64", "linux/amd64/v3"}
	if err != nil || !slices.Equal(Format(got), want) {
		t.Errorf("%q, %v; want %q", Format(got), err, want)
	}
}

func TestParse_RefusesWhatIsNoPlatform(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "arm64", "linux", "linux/", "/arm64", "a/b/c/d", "linux/arm 64", "linux/" + strings.Repeat("a", 200), "*/*"} {
		if got, err := Parse([]string{s}); err == nil || len(err.Error()) > 400 {
			t.Errorf("Parse(%q) = %q, %v", s, Format(got), err)
		}
	}
	if _, err := Parse(slices.Repeat([]string{"linux/amd64"}, maxPlatforms+1)); err == nil {
		t.Error("took any number of platforms")
	}
}

func TestDetect_NamesTheArchitectureOfThisProcess(t *testing.T) {
	t.Parallel()
	m, err := Detect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	found := From(m)
	if len(found) == 0 {
		t.Fatalf("nothing for %+v", m)
	}
	// A 64-bit kernel may run a 32-bit test, not the other way round.
	if !slices.ContainsFunc(found, func(p ocispecs.Platform) bool { return p.Architecture == runtime.GOARCH }) {
		t.Errorf("%q lacks %s", Format(found), runtime.GOARCH)
	}
	again, err := Detect(t.Context())
	if err != nil || again.Arch != m.Arch || again.AArch32 != m.AArch32 || again.IA32 != m.IA32 {
		t.Errorf("asked again: %+v, %v; before %+v", again, err, m)
	}
}

func TestCommonFlags_AreThoseOfEveryCPU(t *testing.T) {
	t.Parallel()
	got, err := CommonFlags(strings.NewReader("processor\t: 0\nflags\t\t: fpu avx avx512f\nvmx flags\t: ept\n\nprocessor\t: 1\nflags\t\t: avx fpu\n"))
	if err != nil || !slices.Equal(got, []string{"fpu", "avx"}) {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := CommonFlags(strings.NewReader("")); err != nil || len(got) != 0 {
		t.Errorf("of nothing: %q, %v", got, err)
	}
	if _, err := CommonFlags(strings.NewReader("flags : " + strings.Repeat("x", maxLine+1))); err == nil {
		t.Error("read a line without bounds")
	}
}
