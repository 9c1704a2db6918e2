package jobprogress_test

import (
	"reflect"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/jobprogress"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func at(s int64) *timestamppb.Timestamp { return timestamppb.New(time.Unix(s, 7)) }

const dgst = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func full() *controlapi.StatusResponse {
	return &controlapi.StatusResponse{
		Vertexes: []*controlapi.Vertex{{
			Digest: dgst, Inputs: []string{"sha256:a", "sha256:b"}, Name: "[1/2] RUN x", Cached: true, Started: at(1), Completed: at(2),
			Error: "no", ProgressGroup: &pb.ProgressGroup{Id: "g", Name: "group", Weak: true},
		}, {Digest: "sha256:bare"}},
		Statuses: []*controlapi.VertexStatus{{
			ID: "layer", Vertex: dgst, Name: "extracting", Current: 3, Total: 4, Timestamp: at(3), Started: at(4), Completed: at(5),
		}},
		Logs:     []*controlapi.VertexLog{{Vertex: dgst, Timestamp: at(6), Stream: 2, Msg: []byte("a\xffb\n")}},
		Warnings: []*controlapi.VertexWarning{{Vertex: dgst, Level: 1, Short: []byte("s"), Detail: [][]byte{[]byte("d")}, Url: "https://x"}},
	}
}

// What BuildKit's own client makes of a status is what a job's watcher gets, by the
// detour of an event.
func TestProgress_KeepsWhatBuildKitsClientSees(t *testing.T) {
	t.Parallel()
	want := client.NewSolveStatus(full())
	p := jobprogress.FromStatus(full())
	wire, err := proto.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	read := &archfarmv1.Progress{}
	if err := proto.Unmarshal(wire, read); err != nil {
		t.Fatal(err)
	}
	got := jobprogress.ToSolveStatus(read)
	want.Vertexes[1].Inputs = nil // none, in another form
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// Every field that an event has is filled by the test above, so that one that is
// forgotten in the conversion is noticed.
func TestFromStatus_FillsEveryField(t *testing.T) {
	t.Parallel()
	p := jobprogress.FromStatus(full())
	p.Platform, p.Attempt = "linux/arm64", 2
	var visit func(m protoreflect.Message, path string)
	visit = func(m protoreflect.Message, path string) {
		fields := m.Descriptor().Fields()
		for i := range fields.Len() {
			f := fields.Get(i)
			if !m.Has(f) {
				t.Errorf("%s.%s is not set", path, f.Name())
				continue
			}
			switch {
			case f.IsList() && f.Message() != nil:
				visit(m.Get(f).List().Get(0).Message(), path+"."+string(f.Name()))
			case f.Message() != nil && f.Message().FullName() != "google.protobuf.Timestamp":
				visit(m.Get(f).Message(), path+"."+string(f.Name()))
			}
		}
	}
	visit(p.ProtoReflect(), "progress")
}

func TestFromStatus_WhatIsNotUTF8CanBeSent(t *testing.T) {
	t.Parallel()
	bad := "a\xff"
	p := jobprogress.FromStatus(&controlapi.StatusResponse{
		Vertexes: []*controlapi.Vertex{{Digest: bad, Inputs: []string{bad}, Name: bad, Error: bad, ProgressGroup: &pb.ProgressGroup{Id: bad, Name: bad}}, nil},
		Statuses: []*controlapi.VertexStatus{{ID: bad, Vertex: bad, Name: bad}},
		Logs:     []*controlapi.VertexLog{{Vertex: bad, Msg: []byte(bad)}},
		Warnings: []*controlapi.VertexWarning{{Vertex: bad, Url: bad, Short: []byte(bad)}},
	})
	if _, err := proto.Marshal(p); err != nil {
		t.Fatal(err)
	}
	if got := string(p.GetLogs()[0].GetMsg()); got != bad {
		t.Errorf("the log is %q", got)
	}
	if len(p.GetVertexes()) != 1 || p.GetVertexes()[0].GetName() != "a\uFFFD" {
		t.Errorf("vertices %v", p.GetVertexes())
	}
}

func TestProgress_OfNothing(t *testing.T) {
	t.Parallel()
	if p := jobprogress.FromStatus(nil); !proto.Equal(p, &archfarmv1.Progress{}) {
		t.Errorf("%v", p)
	}
	if s := jobprogress.ToSolveStatus(nil); !reflect.DeepEqual(s, &client.SolveStatus{}) {
		t.Errorf("%v", s)
	}
}
