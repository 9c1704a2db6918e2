package progress_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/progress"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// at is a time in seconds after an arbitrary one.
func at(seconds float64) *timestamppb.Timestamp {
	return timestamppb.New(epoch.Add(time.Duration(seconds * float64(time.Second))))
}

func dgst(name string) string { return digest.FromString(name).String() }

func arm64(name string) string { return dgst("linux/arm64\x00" + dgst(name)) }

func requireEqual(t interface{ Fatalf(string, ...any) }, got, want proto.Message) {
	if !proto.Equal(got, want) {
		t.Fatalf("got  %v\nwant %v", got, want)
	}
}

// everything is a message with each field in use.
func everything() *controlapi.StatusResponse {
	return &controlapi.StatusResponse{
		Vertexes: []*controlapi.Vertex{{
			Digest: dgst("b"), Inputs: []string{dgst("a")}, Name: "[2/3] COPY x", Cached: true,
			Started: at(1), Completed: at(2), Error: "e", ProgressGroup: &pb.ProgressGroup{Id: "g", Name: "[2/3] COPY", Weak: true},
		}},
		Statuses: []*controlapi.VertexStatus{{
			ID: "s", Vertex: dgst("b"), Name: "extracting", Current: 1, Total: 2, Timestamp: at(1), Started: at(1), Completed: at(2),
		}},
		Logs: []*controlapi.VertexLog{{Vertex: dgst("b"), Timestamp: at(1), Stream: 1, Msg: []byte("hello")}},
		Warnings: []*controlapi.VertexWarning{{
			Vertex: dgst("b"), Level: 1, Short: []byte("short"), Detail: [][]byte{[]byte("d")}, Url: "https://example.com",
			Info: &pb.SourceInfo{Filename: "Dockerfile"}, Ranges: []*pb.Range{{Start: &pb.Position{Line: 3}}},
		}},
	}
}

func TestTranslate_RewritesWhatNamesAVertexAndNothingElse(t *testing.T) {
	t.Parallel()
	in, want := everything(), everything()
	want.Vertexes[0].Digest, want.Vertexes[0].Inputs[0] = arm64("b"), arm64("a")
	want.Vertexes[0].Name = "[linux/arm64 2/3] COPY x"
	want.Vertexes[0].ProgressGroup.Id, want.Vertexes[0].ProgressGroup.Name = "g/linux/arm64", "[linux/arm64 2/3] COPY"
	want.Statuses[0].Vertex, want.Logs[0].Vertex, want.Warnings[0].Vertex = arm64("b"), arm64("b"), arm64("b")

	got := progress.NewLeg("linux/arm64", true).Translate(in)
	requireEqual(t, got, want)
	requireEqual(t, in, everything())
	if &got.Logs[0].Msg[0] != &in.Logs[0].Msg[0] {
		t.Error("the bytes of the log were copied")
	}
}

func TestTranslate_KeepsFieldsOfANewerBuildKit(t *testing.T) {
	t.Parallel()
	in := everything()
	unknown := []byte{0xf8, 0x7f, 0x01} // field 2047, varint 1
	for _, m := range []proto.Message{in, in.Vertexes[0], in.Vertexes[0].ProgressGroup, in.Statuses[0], in.Logs[0], in.Warnings[0]} {
		m.ProtoReflect().SetUnknown(unknown)
	}
	out := progress.NewLeg("linux/arm64", true).Translate(in)
	for _, m := range []proto.Message{out, out.Vertexes[0], out.Vertexes[0].ProgressGroup, out.Statuses[0], out.Logs[0], out.Warnings[0]} {
		if string(m.ProtoReflect().GetUnknown()) != string(unknown) {
			t.Errorf("%T lost its unknown fields", m)
		}
	}
}

func TestTranslate_OneLegPassesThrough(t *testing.T) {
	t.Parallel()
	leg := progress.NewLeg("linux/arm64", false)
	in := everything()
	if out := leg.Translate(in); out != in {
		t.Error("the message was copied")
	}
	requireEqual(t, in, everything())
	if got := leg.Translated(dgst("a")); got != dgst("a") {
		t.Errorf("Translated gives %s", got)
	}
	if leg.Translate(nil) != nil {
		t.Error("nothing became something")
	}
}

func TestTranslated_IsWhatTranslateDoes(t *testing.T) {
	t.Parallel()
	leg := progress.NewLeg("linux/arm64", true)
	if got := leg.Translated(dgst("b")); got != arm64("b") {
		t.Errorf("got %s, want %s", got, arm64("b"))
	}
	if got := leg.Translated(""); got != "" {
		t.Errorf("no digest became %s", got)
	}
}

func TestSetSkew_CorrectsEveryTimestamp(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		skew, want time.Duration
	}{
		{49 * time.Millisecond, 0},
		{-49 * time.Millisecond, 0},
		{50 * time.Millisecond, 50 * time.Millisecond},
		{-50 * time.Millisecond, -50 * time.Millisecond},
		{-time.Hour, -time.Hour},
	} {
		for _, rewrite := range []bool{false, true} {
			leg := progress.NewLeg("linux/arm64", rewrite)
			leg.SetSkew(tc.skew)
			in := everything()
			out := leg.Translate(in)
			requireEqual(t, in, everything())
			for _, pair := range [][2]*timestamppb.Timestamp{
				{in.Vertexes[0].Started, out.Vertexes[0].Started},
				{in.Vertexes[0].Completed, out.Vertexes[0].Completed},
				{in.Statuses[0].Timestamp, out.Statuses[0].Timestamp},
				{in.Statuses[0].Started, out.Statuses[0].Started},
				{in.Statuses[0].Completed, out.Statuses[0].Completed},
				{in.Logs[0].Timestamp, out.Logs[0].Timestamp},
			} {
				if got := pair[1].AsTime().Sub(pair[0].AsTime()); got != tc.want {
					t.Errorf("rewrite %v: a skew of %v moves a time by %v", rewrite, tc.skew, got)
				}
			}
		}
	}
}

// A client takes the start for the identity of a vertex's run: if it moved while
// the vertex is open, the client would show a run that never ends.
func TestSetSkew_OpenVertexKeepsItsCorrection(t *testing.T) {
	t.Parallel()
	for _, rewrite := range []bool{false, true} {
		leg := progress.NewLeg("linux/arm64", rewrite)
		leg.SetSkew(time.Second)
		begun := leg.Translate(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: dgst("a"), Started: at(1)}}})
		leg.SetSkew(0)
		ended := leg.Translate(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{
			{Digest: dgst("a"), Started: at(1), Completed: at(3)},
			{Digest: dgst("b"), Started: at(3)},
		}})
		requireEqual(t, ended.Vertexes[0].Started, begun.Vertexes[0].Started)
		requireEqual(t, ended.Vertexes[0].Completed, at(4))
		requireEqual(t, ended.Vertexes[1].Started, at(3))
	}
}

func TestFail_CompletesWhatIsOpenAndOnlyThat(t *testing.T) {
	t.Parallel()
	for _, rewrite := range []bool{false, true} {
		leg := progress.NewLeg("linux/arm64", rewrite)
		if leg.Fail(epoch, "cancelled") != nil {
			t.Fatal("something was open before the start")
		}
		leg.Translate(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{
			{Digest: dgst("pending"), Name: "x"},
			{Digest: dgst("second"), Name: "x", Started: at(9)},
			{Digest: dgst("first"), Name: "x", Inputs: []string{dgst("done")}, Started: at(1)},
			{Digest: dgst("first"), Name: "x"}, // BuildKit repeats it so
			{Digest: dgst("done"), Name: "x", Started: at(1)},
			{Digest: dgst("done"), Name: "x", Started: at(1), Completed: at(2)},
		}})
		name := "x"
		if rewrite {
			name = "[linux/arm64] x"
		}
		requireEqual(t, leg.Fail(epoch.Add(5*time.Second), "worker \xff lost"), &controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{
			{Digest: leg.Translated(dgst("first")), Name: name, Inputs: []string{leg.Translated(dgst("done"))},
				Started: at(1), Completed: at(5), Error: "worker \uFFFD lost"},
			// Its worker's clock is ahead: it cannot end before its start.
			{Digest: leg.Translated(dgst("second")), Name: name, Started: at(9), Completed: at(9), Error: "worker \uFFFD lost"},
		}})
		if leg.Fail(epoch, "again") != nil {
			t.Error("something was open after Fail")
		}
	}
}

func drawDigest(t *rapid.T, label string) string {
	return rapid.SampledFrom([]string{dgst("a"), dgst("b"), dgst("c"), dgst("d")}).Draw(t, label)
}

// drawMessage draws a message about the vertices a to d.
func drawMessage(t *rapid.T) *controlapi.StatusResponse {
	r := &controlapi.StatusResponse{}
	second := func(label string) *timestamppb.Timestamp {
		return at(float64(rapid.IntRange(1, 5).Draw(t, label)))
	}
	for range rapid.IntRange(0, 3).Draw(t, "vertexes") {
		v := &controlapi.Vertex{Digest: drawDigest(t, "vertex"), Name: rapid.StringMatching(`[a-z]{0,400}`).Draw(t, "name")}
		for range rapid.IntRange(0, 2).Draw(t, "inputs") {
			v.Inputs = append(v.Inputs, drawDigest(t, "input"))
		}
		if rapid.Bool().Draw(t, "started") {
			v.Started = second("start")
			if rapid.Bool().Draw(t, "completed") {
				v.Completed = timestamppb.New(v.Started.AsTime().Add(time.Second))
			}
		}
		r.Vertexes = append(r.Vertexes, v)
	}
	for range rapid.IntRange(0, 3).Draw(t, "statuses") {
		r.Statuses = append(r.Statuses, &controlapi.VertexStatus{
			ID: rapid.SampledFrom([]string{"x", "y"}).Draw(t, "id"), Vertex: drawDigest(t, "vertex"), Timestamp: second("time"),
		})
	}
	for range rapid.IntRange(0, 3).Draw(t, "logs") {
		r.Logs = append(r.Logs, &controlapi.VertexLog{
			Vertex: drawDigest(t, "vertex"), Msg: make([]byte, rapid.IntRange(0, 4000).Draw(t, "bytes")),
		})
	}
	if rapid.Bool().Draw(t, "warning") {
		r.Warnings = []*controlapi.VertexWarning{{Vertex: drawDigest(t, "vertex"), Short: []byte("w")}}
	}
	return r
}

// named lists every mention of a vertex, in order.
func named(r *controlapi.StatusResponse) (out []string) {
	for _, v := range r.GetVertexes() {
		out = append(append(out, v.Digest), v.Inputs...)
	}
	for _, v := range r.GetStatuses() {
		out = append(out, v.Vertex)
	}
	for _, v := range r.GetLogs() {
		out = append(out, v.Vertex)
	}
	for _, v := range r.GetWarnings() {
		out = append(out, v.Vertex)
	}
	return out
}

func TestTranslate_LegsNeverCollideAndReferencesHold(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		legs := []*progress.Leg{progress.NewLeg("linux/amd64", true), progress.NewLeg("linux/arm64", true)}
		origin := make(map[string]string) // translated digest → leg and digest
		for range rapid.IntRange(1, 8).Draw(t, "messages") {
			in := drawMessage(t)
			before := proto.Clone(in)
			for i, leg := range legs {
				old, got := named(in), named(leg.Translate(in))
				requireEqual(t, in, before)
				if len(got) != len(old) {
					t.Fatalf("%d mentions became %d", len(old), len(got))
				}
				for j := range got {
					from := fmt.Sprint(i, old[j])
					if known, ok := origin[got[j]]; ok && known != from {
						t.Fatalf("%s stands for %s and %s", got[j], known, from)
					}
					origin[got[j]] = from
					if got[j] != leg.Translated(old[j]) {
						t.Fatalf("%s is translated in two ways", old[j])
					}
				}
			}
		}
	})
}

func TestFail_LeavesNoStartedVertexOpen(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		leg := progress.NewLeg("linux/arm64", rapid.Bool().Draw(t, "rewrite"))
		final := make(map[string]*controlapi.Vertex)
		see := func(r *controlapi.StatusResponse) {
			for _, v := range r.GetVertexes() {
				if v.Started != nil {
					final[v.Digest] = v
				}
			}
		}
		for range rapid.IntRange(1, 12).Draw(t, "messages") {
			if rapid.IntRange(0, 3).Draw(t, "clock") == 0 {
				leg.SetSkew(time.Duration(rapid.IntRange(-2000, 2000).Draw(t, "skew")) * time.Millisecond)
			}
			see(leg.Translate(drawMessage(t)))
		}
		wasOpen := 0
		for _, v := range final {
			if v.Completed == nil {
				wasOpen++
			}
		}
		failed := leg.Fail(epoch, "cancelled")
		if got := len(failed.GetVertexes()); got != wasOpen {
			t.Fatalf("%d vertices failed, %d were open", got, wasOpen)
		}
		see(failed)
		for d, v := range final {
			if v.Completed == nil || v.Completed.AsTime().Before(v.Started.AsTime()) {
				t.Fatalf("vertex %s ends as %v", d, v)
			}
		}
	})
}

func BenchmarkTranslate(b *testing.B) {
	in := &controlapi.StatusResponse{}
	for range 16 {
		in.Logs = append(in.Logs, &controlapi.VertexLog{Vertex: dgst("a"), Timestamp: at(1), Stream: 1, Msg: make([]byte, 4096)})
	}
	leg := progress.NewLeg("linux/arm64", true)
	b.ReportAllocs()
	for b.Loop() {
		leg.Translate(in)
	}
}
