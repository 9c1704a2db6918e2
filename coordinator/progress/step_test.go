package progress_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/progress"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// play runs steps on a stream whose clock goes on by a second with each look,
// from second 1 on, and returns what was published.
func play(t *testing.T, steps func(*progress.Stream)) *controlapi.StatusResponse {
	t.Helper()
	s := progress.NewStream(0)
	now := epoch
	s.Now = func() time.Time {
		now = now.Add(time.Second)
		return now
	}
	steps(s)
	s.Close()
	out := &controlapi.StatusResponse{}
	if err := s.Follow(t.Context(), func(m *controlapi.StatusResponse) error {
		proto.Merge(out, m)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestStep_FromStartToDone(t *testing.T) {
	t.Parallel()
	got := play(t, func(s *progress.Stream) {
		step := s.Step("waiting for a worker")
		step.Start()
		step.Start()
		step.Log("both are full")
		step.Log("still\n")
		step.Done(errors.New("no \xff worker"))
		step.Done(nil)
		step.Cached()
		step.Log("too late")
		step.Status("x", "too late")
		step.Start()
	})
	d := got.Vertexes[0].Digest
	requireEqual(t, got, &controlapi.StatusResponse{
		Vertexes: []*controlapi.Vertex{
			{Digest: d, Name: "waiting for a worker", Started: at(1)},
			{Digest: d, Name: "waiting for a worker", Started: at(1), Completed: at(4), Error: "no \uFFFD worker"},
		},
		Logs: []*controlapi.VertexLog{
			{Vertex: d, Timestamp: at(2), Stream: 2, Msg: []byte("both are full\n")},
			{Vertex: d, Timestamp: at(3), Stream: 2, Msg: []byte("still\n")},
		},
	})
}

func TestStep_ErrorIsShownWithoutGRPCsWords(t *testing.T) {
	t.Parallel()
	got := play(t, func(s *progress.Stream) {
		s.Step("pushing").Done(status.Error(codes.PermissionDenied, "the registry refuses"))
		s.Step("placing").Done(fmt.Errorf("linux/arm64: %w", status.Error(codes.Unavailable, "gone")))
	})
	for i, want := range []string{"the registry refuses", "linux/arm64: gone"} {
		if reason := got.Vertexes[i].Error; reason != want {
			t.Errorf("error %q, want %q", reason, want)
		}
	}
}

func TestStep_StatusLineIsReplacedAndCompleted(t *testing.T) {
	t.Parallel()
	got := play(t, func(s *progress.Stream) {
		step := s.Step("waiting")
		step.Status("place", "2 ahead") // starts at 1, the line at 2
		step.Status("place", "2 ahead")
		step.Status("place", "1 ahead") // at 3
		step.Status("place", "")        // at 4
		step.Status("place", "")
		step.Status("place", "running") // at 5
		step.Done(nil)                  // at 6
	})
	d := got.Vertexes[0].Digest
	line := func(text string, now, started, completed float64) *controlapi.VertexStatus {
		s := &controlapi.VertexStatus{ID: text, Name: text, Vertex: d, Timestamp: at(now), Started: at(started)}
		if completed > 0 {
			s.Completed = at(completed)
		}
		return s
	}
	requireEqual(t, got, &controlapi.StatusResponse{
		Vertexes: []*controlapi.Vertex{
			{Digest: d, Name: "waiting", Started: at(1)},
			{Digest: d, Name: "waiting", Started: at(1), Completed: at(6)},
		},
		Statuses: []*controlapi.VertexStatus{
			line("2 ahead", 2, 2, 0),
			line("2 ahead", 3, 2, 3),
			line("1 ahead", 3, 3, 0),
			line("1 ahead", 4, 3, 4),
			line("running", 5, 5, 0),
			line("running", 6, 5, 6),
		},
	})
}

func TestStep_CachedWithoutStart(t *testing.T) {
	t.Parallel()
	got := play(t, func(s *progress.Stream) { s.Step("x").Cached() })
	requireEqual(t, got, &controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{
		{Digest: got.Vertexes[0].Digest, Name: "x", Cached: true, Started: at(1), Completed: at(1)},
	}})
}

func TestStep_StepsOfOneNameAreDifferent(t *testing.T) {
	t.Parallel()
	got := play(t, func(s *progress.Stream) {
		for range 100 {
			s.Step("x").Done(nil)
		}
	})
	seen := make(map[string]bool)
	for _, v := range got.Vertexes {
		seen[v.Digest] = true
	}
	if len(seen) != 100 {
		t.Errorf("%d digests", len(seen))
	}
}

func TestStep_UnseenUntilItStarts(t *testing.T) {
	t.Parallel()
	if got := play(t, func(s *progress.Stream) { s.Step("x") }); len(got.Vertexes) != 0 {
		t.Errorf("got %v", got)
	}
}
