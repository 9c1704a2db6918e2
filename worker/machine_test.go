package worker

import (
	"slices"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/worker/native"
)

func TestEmulatedOnly_HasNoArchitectureThatIsNative(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ list, native, want string }{
		"qemu on a PC":               {"linux/arm64 linux/arm/v7 linux/arm/v6", "linux/amd64 linux/amd64/v2 linux/386", "linux/arm64 linux/arm/v7 linux/arm/v6"},
		"another level of the CPU":   {"linux/amd64/v4 linux/arm64", "linux/amd64", "linux/arm64"},
		"a handler for native ones":  {"linux/amd64 linux/386", "linux/amd64 linux/386", ""},
		"386 that the CPU could not": {"linux/386", "linux/amd64", "linux/386"},
		"said twice":                 {"linux/arm64 linux/arm64/v8 linux/arm64", "linux/amd64", "linux/arm64"},
		"nothing":                    {"", "linux/amd64", ""},
	} {
		list, err := native.Parse(strings.Fields(c.list))
		if err != nil {
			t.Fatal(err)
		}
		own, err := native.Parse(strings.Fields(c.native))
		if err != nil {
			t.Fatal(err)
		}
		if got := native.Format(emulatedOnly(append(list, list...), own)); !slices.Equal(got, strings.Fields(c.want)) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
