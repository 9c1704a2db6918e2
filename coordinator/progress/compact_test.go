package progress_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/archfarm/archfarm/coordinator/progress"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

func TestPublish_BeyondTheLimitOldLogsGoAndVerticesStay(t *testing.T) {
	t.Parallel()
	const limit, lines = 6 << 20, 10_000
	s := progress.NewStream(limit)
	for i := range lines {
		name := fmt.Sprint("v", i%500)
		m := logged(name, fmt.Appendf(nil, "%1000d", i))
		m.Vertexes = vertex(name).Vertexes
		s.Publish(m)
	}
	s.Publish(&controlapi.StatusResponse{Warnings: []*controlapi.VertexWarning{{Vertex: dgst("v1")}}})
	for i := range 500 {
		s.Publish(completed(fmt.Sprint("v", i)))
	}
	s.Close()
	late := all(t, s)
	for d, v := range late.vertices {
		if v.Completed == nil {
			t.Errorf("vertex %s is %v", d, v)
		}
	}
	if len(late.vertices) != 500 || late.warnings != 1 || len(late.unknown) != 0 {
		t.Errorf("%d vertices, %d warnings, unknown %v", len(late.vertices), late.warnings, late.unknown)
	}
	if len(late.log) > limit {
		t.Errorf("%d bytes of log are left, the limit is %d", len(late.log), limit)
	}
	// What is left of the log is its end, without gaps.
	first := lines - len(late.log)/1000
	if first == lines {
		t.Error("no log is left")
	}
	for i := first; i < lines; i++ {
		if line := late.log[(i-first)*1000:][:1000]; string(line) != fmt.Sprintf("%1000d", i) {
			t.Fatalf("line %d is %q", i, line)
		}
	}
}

func TestPublish_BeyondTheLimitOldProgressGoesBeforeLogs(t *testing.T) {
	t.Parallel()
	s := progress.NewStream(1 << 20)
	s.Publish(vertex("a"))
	s.Publish(logged("a", []byte("precious")))
	for i := range 10_000 {
		s.Publish(&controlapi.StatusResponse{Statuses: []*controlapi.VertexStatus{
			{ID: "layer", Vertex: dgst("a"), Current: int64(i), Timestamp: at(1)},
		}})
	}
	s.Close()
	late := all(t, s)
	if string(late.log) != "precious" || late.lines[dgst("a")+"layer"].Current != 9999 {
		t.Errorf("the log is %q, the line %v", late.log, late.lines)
	}
}

func TestPublish_BeyondTheLimitNothingButVerticesStays(t *testing.T) {
	t.Parallel()
	const limit = 1 << 20
	s := progress.NewStream(limit)
	for i := range 20_000 {
		name := fmt.Sprint("v", i%100)
		m := vertex(name)
		m.Statuses = []*controlapi.VertexStatus{{ID: fmt.Sprint(i), Vertex: dgst(name)}}
		m.Warnings = []*controlapi.VertexWarning{{Vertex: dgst(name), Short: []byte("w")}}
		s.Publish(m)
	}
	s.Close()
	late := all(t, s)
	if len(late.vertices) != 100 || len(late.unknown) != 0 {
		t.Errorf("%d vertices, unknown %v", len(late.vertices), late.unknown)
	}
	// Each takes far more than 100 bytes.
	if kept := len(late.lines) + late.warnings; kept > limit/100 {
		t.Errorf("%d status lines and warnings are kept", kept)
	}
}

func TestPublish_VerticesStayWhateverTheLimit(t *testing.T) {
	t.Parallel()
	const count = 5000
	s := progress.NewStream(1)
	for i := range count {
		name := fmt.Sprintf("v%1000d", i)
		m := vertex(name)
		m.Logs = logged(name, []byte("x")).Logs
		s.Publish(m)
		s.Publish(completed(name))
	}
	s.Close()
	late, states := newReader(), 0
	if err := s.Follow(t.Context(), func(m *controlapi.StatusResponse) error {
		if states += len(m.Vertexes); states > 2*count {
			return errors.New("the same states come again")
		}
		return late.take(m)
	}); err != nil {
		t.Fatal(err)
	}
	for d, v := range late.vertices {
		if v.Completed == nil {
			t.Fatalf("vertex %s is %v", d, v)
		}
	}
	// 5 MB of vertices come in batches.
	if len(late.vertices) != count || late.messages < 5 || late.largest > maxMessage {
		t.Errorf("%d vertices in %d messages of up to %d bytes", len(late.vertices), late.messages, late.largest)
	}
}

func TestFollow_EarlyAndLateAgreeOnFinalStates(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := progress.NewStream(rapid.IntRange(1, 40_000).Draw(t, "limit"))
		want, halted := newReader(), newReader()
		// A follower that reads a little and then comes back at the end, as a
		// stuck one does.
		pause := rapid.IntRange(0, 20).Draw(t, "pause")
		messages := rapid.SliceOfN(rapid.Custom(drawMessage), 1, 40).Draw(t, "messages")
		resume, end := make(chan struct{}), make(chan error)
		ctx := t.Context()
		go func() {
			end <- s.Follow(ctx, func(m *controlapi.StatusResponse) error {
				if halted.messages >= pause {
					<-resume
				}
				return halted.take(m)
			})
		}()
		for i := range 4 { // every vertex is named first, as BuildKit does
			m := &controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: dgst(string(rune('a' + i)))}}}
			s.Publish(m)
			_ = want.take(m)
		}
		for _, m := range messages {
			s.Publish(m)
			_ = want.take(m)
		}
		s.Close()
		close(resume)
		if err := <-end; err != nil {
			t.Fatal(err)
		}
		for who, got := range map[string]*reader{"late": all(t, s), "halted": halted} {
			requireSame(t, who, got.vertices, want.vertices)
			requireSame(t, who, got.runs, want.runs)
			if len(got.unknown) > 0 {
				t.Fatalf("%s: something is about %v before it was named", who, got.unknown)
			}
			if len(got.log) > len(want.log) || got.warnings > want.warnings {
				t.Fatalf("%s: more arrived than was published", who)
			}
		}
	})
}

func requireSame(t *rapid.T, who string, got, want map[string]*controlapi.Vertex) {
	if len(got) != len(want) {
		t.Fatalf("%s: %d vertices, want %d", who, len(got), len(want))
	}
	for k, v := range want {
		if !proto.Equal(got[k], v) {
			t.Fatalf("%s: %s is %v, want %v", who, k, got[k], v)
		}
	}
}
