package progress

import (
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// FuzzStatus passes what a worker may send as progress through a leg and a stream that keeps little.
func FuzzStatus(f *testing.F) {
	for _, r := range []*controlapi.StatusResponse{
		{},
		{Vertexes: []*controlapi.Vertex{{Digest: "sha256:1", Name: "[1/2] RUN x", Inputs: []string{"sha256:0", ""}, Started: timestamppb.New(time.Unix(1, 0))}}},
		{Statuses: []*controlapi.VertexStatus{{ID: "a", Vertex: "sha256:1", Current: -1, Timestamp: &timestamppb.Timestamp{Seconds: 1 << 62, Nanos: -1}}}},
		{Logs: []*controlapi.VertexLog{{Vertex: "sha256:1", Msg: []byte("\xff\x00")}}, Warnings: []*controlapi.VertexWarning{{Vertex: "", Short: []byte("x")}}},
	} {
		raw, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, int64(time.Hour), true)
	}
	f.Fuzz(func(t *testing.T, raw []byte, skew int64, rewrite bool) {
		r := &controlapi.StatusResponse{}
		if proto.Unmarshal(raw, r) != nil {
			return
		}
		before := proto.CloneOf(r)
		leg, stream := NewLeg("linux/arm64", rewrite), NewStream(1)
		leg.SetSkew(time.Duration(skew))
		for range 2 { // the second time around, what the first has left
			translated := leg.Translate(r)
			if len(translated.GetVertexes()) != len(r.GetVertexes()) || len(translated.GetStatuses()) != len(r.GetStatuses()) ||
				len(translated.GetLogs()) != len(r.GetLogs()) || len(translated.GetWarnings()) != len(r.GetWarnings()) {
				t.Errorf("something came or went: %v", translated)
			}
			stream.Publish(translated)
		}
		if failed := leg.Fail(time.Unix(1, 0), "lost"); failed != nil {
			stream.Publish(failed)
		}
		stream.Close()
		if !proto.Equal(r, before) {
			t.Errorf("the worker's message was changed to %v", r)
		}
		if err := stream.Follow(t.Context(), func(m *controlapi.StatusResponse) error {
			_, err := proto.Marshal(m)
			return err
		}); err != nil {
			t.Errorf("what the client gets: %v", err)
		}
	})
}
