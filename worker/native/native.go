// Package native tells which platforms a machine runs natively.
//
// The answer comes from the machine: its architecture, its CPU's level, and
// whether its kernel was seen to run 32-bit programs. It never comes from BuildKit's
// own list, which names whatever a tiny test program survives, and so also what
// a binfmt_misc handler emulates (github.com/moby/buildkit, util/archutil).
package native

import (
	"slices"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// Machine is what there is to know of a machine.
type Machine struct {
	// OS is the operating system as Go names it: "linux", "darwin".
	OS string
	// Arch is the hardware's name as uname -m prints it: "x86_64", "aarch64".
	Arch string
	// CPUFlags are the features of the CPU as /proc/cpuinfo of an x86 machine
	// lists them; nil elsewhere. A feature counts only if every core has it.
	CPUFlags []string
	// IA32 tells that a 64-bit x86 machine also runs 32-bit programs: its kernel
	// may be built or told not to.
	IA32 bool
	// AArch32 tells that a 64-bit ARM machine also runs 32-bit programs. Apple
	// Silicon, Ampere Altra and Neoverse V1 and later do not.
	AArch32 bool
}

// String is OS and architecture in the notation of platforms: "linux/arm64".
func (m Machine) String() string {
	arch := m.Arch
	if p, ok := bases[m.Arch]; ok {
		arch = p.Architecture
	}
	return m.OS + "/" + arch
}

// bases maps what uname -m prints to the platform it names. A 32-bit ARM runs
// the older variants too, see From.
var bases = map[string]ocispecs.Platform{
	"x86_64":      linux("amd64", ""),
	"amd64":       linux("amd64", ""),
	"aarch64":     linux("arm64", ""),
	"arm64":       linux("arm64", ""), // Darwin's word
	"armv7l":      linux("arm", "v7"),
	"armv8l":      linux("arm", "v7"), // an arm64 kernel under a 32-bit userland
	"armv6l":      linux("arm", "v6"),
	"i386":        linux("386", ""),
	"i486":        linux("386", ""),
	"i586":        linux("386", ""),
	"i686":        linux("386", ""),
	"riscv64":     linux("riscv64", ""),
	"ppc64le":     linux("ppc64le", ""),
	"s390x":       linux("s390x", ""),
	"loongarch64": linux("loong64", ""),
	"loong64":     linux("loong64", ""),
}

// From returns what m runs natively, best first, as buildkitd orders its list:
// the base, its variants, the 32-bit relatives. It is empty if the
// architecture or the operating system is unknown. The platforms are
// normalised.
//
// On macOS BuildKit lives in a Linux virtual machine of the host's
// architecture. Of that nothing is known but the architecture, so that is all
// that is promised for it.
func From(m Machine) []ocispecs.Platform {
	base, ok := bases[m.Arch]
	switch {
	case !ok:
		return nil
	case m.OS == "darwin":
		return []ocispecs.Platform{base}
	case m.OS != "linux":
		return nil
	}
	found := []ocispecs.Platform{base}
	switch {
	case base.Architecture == "amd64":
		for _, level := range levels(m.CPUFlags) {
			found = append(found, linux("amd64", level))
		}
		// Linux calls it IA32 emulation, but it is the CPU's own 32-bit mode.
		if m.IA32 {
			found = append(found, linux("386", ""))
		}
	case base.Architecture == "arm64" && m.AArch32:
		found = append(found, linux("arm", "v7"), linux("arm", "v6"))
	case base.Architecture == "arm" && base.Variant == "v7":
		found = append(found, linux("arm", "v6"))
	}
	for i := range found {
		found[i] = platforms.Normalize(found[i])
	}
	return found
}

// x86Levels are the levels of the x86-64 psABI (section 3.1.1, table 3.1) in the
// words of /proc/cpuinfo, where SSE3 is "pni" and LZCNT is "abm". OSXSAVE is
// implied by avx: the kernel clears it when it does not save the registers.
var x86Levels = []struct {
	variant string
	flags   []string
}{
	{"v2", []string{"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}},
	{"v3", []string{"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}},
	{"v4", []string{"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}},
}

// levels returns the levels above the base that a CPU with these flags has; each
// includes the ones before.
func levels(flags []string) (variants []string) {
	for _, level := range x86Levels {
		for _, f := range level.flags {
			if !slices.Contains(flags, f) {
				return variants
			}
		}
		variants = append(variants, level.variant)
	}
	return variants
}

func linux(arch, variant string) ocispecs.Platform {
	return ocispecs.Platform{OS: "linux", Architecture: arch, Variant: variant}
}
