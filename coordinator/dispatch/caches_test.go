package dispatch

import (
	"fmt"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/split"
)

// TestCacheNotes_TellTheExportsOfOneAttemptApart follows what a worker tells of several exports, of which some are none of
// the merged ones, some wrote nothing, and some are of another attempt in the same session.
func TestCacheNotes_TellTheExportsOfOneAttemptApart(t *testing.T) {
	t.Parallel()
	plan := split.PlanCaches(&controlapi.CacheOptions{Exports: []*controlapi.CacheOptionsEntry{
		{Type: "gha"},
		{Type: "registry", Attrs: map[string]string{"ref": "Not A Reference"}},
		{Type: "registry", Attrs: map[string]string{"ref": "app:whole"}},
		{Type: "local", Attrs: map[string]string{"dest": "/cache"}},
		{Type: "registry", Attrs: map[string]string{"ref": "app:empty"}},
	}})
	vertex := func(session string, i int) string {
		return digest.FromString(fmt.Sprint(session, "-cache-", i)).String()
	}
	manifest := func(of string) digest.Digest { return digest.FromString(of) }
	step := func(digest, name string) *controlapi.StatusResponse {
		return &controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: digest, Name: name}}}
	}
	line := func(vertex, text string) *controlapi.StatusResponse {
		return &controlapi.StatusResponse{Statuses: []*controlapi.VertexStatus{{Vertex: vertex, ID: text}}}
	}
	var notes cacheNotes
	for _, s := range []*controlapi.StatusResponse{
		step(vertex("s", 0), "exporting to GitHub Actions Cache"),
		step(vertex("s", 1), "exporting cache to registry"),
		step(vertex("s", 2), "exporting cache to registry"),
		step(vertex("s", 3), "exporting cache to client directory"),
		step(vertex("s", 4), "exporting cache to registry"),
		step(vertex("other", 1), "exporting cache to registry"),
		step("sha256:run", "[1/1] RUN echo"),
		line(vertex("s", 1), "writing cache image manifest "+manifest("malformed").String()),
		line(vertex("s", 2), "writing config "+manifest("config").String()),
		line(vertex("s", 2), "writing cache image manifest "+manifest("whole").String()),
		line(vertex("s", 3), "writing cache manifest "+manifest("local").String()),
		line(vertex("s", 4), "skipping cache export for empty result"),
		line(vertex("other", 1), "writing cache manifest "+manifest("other").String()),
		line("sha256:run", "writing cache manifest "+manifest("a step that says so").String()),
	} {
		notes.take(s)
	}
	want := []digest.Digest{manifest("whole"), manifest("local"), ""}
	for i, e := range plan.Merged() {
		if got := notes.manifest("s", e); got != want[i] {
			t.Errorf("%s %s%s wrote %q, want %q", e.Step, e.Ref, e.Store, got, want[i])
		}
	}
	if got := notes.manifest("unknown", plan.Merged()[0]); got != "" {
		t.Errorf("of a session that nobody has seen: %s", got)
	}
}
