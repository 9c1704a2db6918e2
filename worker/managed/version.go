package managed

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Version is a release of BuildKit: major, minor, patch.
type Version [3]int

// Minimum is the oldest buildkitd that this package runs. What the coordinator
// needs there has been since v0.13 (SolveRequest.Exporters: an older daemon
// ignores them, and exports nothing). The names of the space settings in
// buildkitd.toml, and of the same in PruneRequest, are those of v0.17: an older
// daemon would overlook the limits, and throw away its whole cache at every
// garbage collection.
var Minimum = Version{0, 17, 0}

// ForCoordinator is the oldest buildkitd that a coordinator can use, see Minimum.
var ForCoordinator = Version{0, 13, 0}

func (v Version) String() string { return fmt.Sprintf("v%d.%d.%d", v[0], v[1], v[2]) }

var versionPattern = regexp.MustCompile(`(?:^|\s)v?([0-9]{1,6})\.([0-9]{1,6})\.([0-9]{1,6})\b`)

// ParseVersion finds a version in what buildkitd says of itself. A build without
// one, v0.0.0+unknown, is not known.
func ParseVersion(text string) (v Version, known bool) {
	m := versionPattern.FindStringSubmatch(text)
	if m == nil {
		return v, false
	}
	for i := range v {
		v[i], _ = strconv.Atoi(m[i+1]) // six digits
	}
	return v, v != Version{}
}

// Before tells whether v is older than w.
func (v Version) Before(w Version) bool {
	for i := range v {
		if v[i] != w[i] {
			return v[i] < w[i]
		}
	}
	return false
}

const (
	versionWithin = 10 * time.Second
	maxVersion    = 4 << 10
)

// checkVersion asks program for its version, and refuses one that is too old. A
// version that is not known is taken for a developer's build.
func checkVersion(ctx context.Context, program string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, versionWithin)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "--version") //nolint:gosec // the operator's own choice
	cmd.WaitDelay = outputWithin
	out, err := cmd.CombinedOutput()
	out = bytes.TrimSpace(out[:min(len(out), maxVersion)])
	if err != nil {
		return "", fmt.Errorf("asking %s for its version: %w: %s", program, err, out)
	}
	text := strings.ToValidUTF8(string(out), "?")
	if !strings.Contains(text, "buildkit") {
		return "", fmt.Errorf("%s is no buildkitd: its version is %q", program, text)
	}
	if v, known := ParseVersion(text); known && v.Before(Minimum) {
		return "", fmt.Errorf("%s is BuildKit %s, and %s is the oldest that can be managed: install a newer one, or run it yourself and name its address with --buildkit", program, v, Minimum)
	}
	return text, nil
}
