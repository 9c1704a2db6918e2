package native

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxPlatforms is more than there are, for one worker.
	maxPlatforms = 64
	// maxPlatform bounds one platform in bytes.
	maxPlatform = 128
)

// Parse reads what an operator says a worker runs: platforms such as
// "linux/arm64" and "linux/arm/v7". It returns them normalised, in their order,
// each once. At most 64 are taken.
func Parse(list []string) ([]ocispecs.Platform, error) {
	if len(list) > maxPlatforms {
		return nil, fmt.Errorf("%d platforms are named, at most %d make sense", len(list), maxPlatforms)
	}
	var (
		found []ocispecs.Platform
		names []string
	)
	for _, s := range list {
		if len(s) > maxPlatform {
			return nil, fmt.Errorf("platform %q…: longer than %d bytes", s[:maxPlatform], maxPlatform)
		}
		// containerd completes a bare architecture with the operating system of this
		// process, which on macOS is not the one that builds.
		if !strings.Contains(s, "/") {
			return nil, fmt.Errorf("platform %q: write os/architecture or os/architecture/variant, such as linux/arm64", s)
		}
		p, err := platforms.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("platform %q: %w", s, err)
		}
		p = platforms.Normalize(p)
		if name := platforms.FormatAll(p); !slices.Contains(names, name) {
			found, names = append(found, p), append(names, name)
		}
	}
	return found, nil
}

// Format writes platforms in containerd's notation, which Parse reads.
func Format(list []ocispecs.Platform) []string {
	names := make([]string, len(list))
	for i, p := range list {
		names[i] = platforms.FormatAll(p)
	}
	return names
}
