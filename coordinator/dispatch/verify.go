package dispatch

import (
	"context"
	"slices"
	"strings"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/verifier"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/result"

	"github.com/archfarm/archfarm/coordinator/split"
)

// verify warns of platforms that the client asked for and did not return, which
// each of several legs sees only its part of.
func (b *Build) verify(ctx context.Context, res *gwpb.Result) error {
	if len(b.running()) < 2 {
		return nil
	}
	all := &result.Result[string]{}
	for k, v := range res.GetMetadata() {
		all.AddMeta(k, v)
	}
	for key, ref := range split.RefsByKey(res) {
		if split.Single(res) {
			all.SetRef(ref.GetId())
		} else {
			all.AddRef(key, ref.GetId())
		}
	}
	if err := verifier.CaptureFrontendOpts(b.req.GetFrontendAttrs(), all); err != nil {
		return err
	}
	warnings, err := verifier.CheckInvalidPlatforms(ctx, all)
	if err != nil || len(warnings) == 0 {
		return err
	}
	step := b.Progress.Step("Verifying build result")
	step.Start()
	for _, w := range warnings {
		step.Warn(&controlapi.VertexWarning{Level: int64(w.Level), Short: w.Short, Detail: w.Detail, Url: w.URL})
	}
	step.Done(nil)
	return nil
}

// verdicts are how BuildKit's verifier begins its warnings (exporter/verifier).
var verdicts = []string{
	"Invalid platform result requested ", "Duplicate platform result requested ", "Requested platform ",
	"Requested platforms ", "Multiple platforms requested but result is not multi-platform",
}

// withoutVerdicts leaves out what a leg's worker thinks of the leg's part of the
// result: verify looks at the whole.
func withoutVerdicts(s *controlapi.StatusResponse) *controlapi.StatusResponse {
	if len(s.GetWarnings()) == 0 {
		return s
	}
	kept := slices.DeleteFunc(slices.Clone(s.GetWarnings()), func(w *controlapi.VertexWarning) bool {
		return slices.ContainsFunc(verdicts, func(v string) bool { return strings.HasPrefix(string(w.GetShort()), v) })
	})
	return &controlapi.StatusResponse{Vertexes: s.GetVertexes(), Statuses: s.GetStatuses(), Logs: s.GetLogs(), Warnings: kept}
}
