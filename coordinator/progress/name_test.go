package progress_test

import (
	"strings"
	"testing"

	"github.com/archfarm/archfarm/coordinator/progress"
	"pgregory.net/rapid"
)

func TestStepName_PutsThePlatformWhereBuildKitDoes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ platform, name, want string }{
		{"linux/amd64", "[2/3] RUN x", "[linux/amd64 2/3] RUN x"},
		{"linux/amd64", "[build  2/13] RUN x", "[linux/amd64 build  2/13] RUN x"},
		{"linux/amd64", "[internal] load x", "[linux/amd64 internal] load x"},
		{"linux/amd64", "exporting to image", "[linux/amd64] exporting to image"},
		{"linux/amd64", "[linux/amd64 2/3] RUN x", "[linux/amd64 2/3] RUN x"},
		{"linux/amd64", "[linux/amd64->arm64 2/3] RUN x", "[linux/amd64->arm64 2/3] RUN x"},
		{"linux/arm64", "[linux/amd64->arm64 2/3] RUN x", "[linux/amd64->arm64 2/3] RUN x"},
		{"linux/arm/v7", "[linux/amd64->arm/v7 2/3] RUN x", "[linux/amd64->arm/v7 2/3] RUN x"},
		{"windows/amd64", "[linux/amd64->windows/amd64 2/3] RUN x", "[linux/amd64->windows/amd64 2/3] RUN x"},
		{"linux/arm", "[linux/arm64 2/3] RUN x", "[linux/arm linux/arm64 2/3] RUN x"},
		{"linux/arm64", "[linux/amd64 2/3] RUN x", "[linux/arm64 linux/amd64 2/3] RUN x"},
		{"linux/amd64", "RUN echo [linux/amd64] y", "[linux/amd64] RUN echo [linux/amd64] y"},
		{"linux/amd64", "[ -f x ", "[linux/amd64] [ -f x "},
		{"linux/amd64", "[] x", "[linux/amd64] x"},
		{"linux/amd64", "", ""},
		{"", "[2/3] RUN x", "[2/3] RUN x"},
	} {
		if got := progress.StepName(tc.platform, tc.name); got != tc.want {
			t.Errorf("StepName(%q, %q) = %q, want %q", tc.platform, tc.name, got, tc.want)
		}
	}
}

func TestStepName_SaysThePlatformOnce(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		platform := rapid.SampledFrom([]string{"linux/amd64", "linux/arm/v7", "windows(10.0.1)/amd64"}).Draw(t, "platform")
		name := rapid.StringMatching(`\[?[a-z0-9/> -]{0,12}\]?[ a-z\[\]]{0,12}`).Draw(t, "name")
		once := progress.StepName(platform, name)
		if twice := progress.StepName(platform, once); twice != once {
			t.Fatalf("%q, then %q", once, twice)
		}
		if name != "" && !strings.Contains(once, platform) {
			t.Fatalf("%q does not say %s", once, platform)
		}
	})
}
