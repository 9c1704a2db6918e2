// Package jobprogress turns BuildKit's progress into that of a job's events and
// back, for what draws it.
package jobprogress

import (
	"strings"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// FromStatus returns a copy of a piece of BuildKit's status stream as a job's event
// has it. Platform and attempt are the caller's to set. Of warnings, the place in the
// source is left out. What is not UTF-8, which BuildKit lets through and archfarm's
// API does not, is replaced; logs stay byte for byte. Nil gives an empty piece.
func FromStatus(r *controlapi.StatusResponse) *archfarmv1.Progress {
	return &archfarmv1.Progress{
		Vertexes: each(r.GetVertexes(), fromVertex),
		Statuses: each(r.GetStatuses(), fromStatus),
		Logs:     each(r.GetLogs(), fromLog),
		Warnings: each(r.GetWarnings(), fromWarning),
	}
}

func fromVertex(v *controlapi.Vertex) *archfarmv1.Vertex {
	return &archfarmv1.Vertex{
		Digest: text(v.GetDigest()), Inputs: texts(v.GetInputs()), Name: text(v.GetName()), Cached: v.GetCached(),
		Started: v.GetStarted(), Completed: v.GetCompleted(), Error: text(v.GetError()),
		ProgressGroup: fromGroup(v.GetProgressGroup()),
	}
}

func fromGroup(g *pb.ProgressGroup) *archfarmv1.ProgressGroup {
	if g == nil {
		return nil
	}
	return &archfarmv1.ProgressGroup{Id: text(g.GetId()), Name: text(g.GetName()), Weak: g.GetWeak()}
}

func fromStatus(s *controlapi.VertexStatus) *archfarmv1.VertexStatus {
	return &archfarmv1.VertexStatus{
		Id: text(s.GetID()), Vertex: text(s.GetVertex()), Name: text(s.GetName()), Current: s.GetCurrent(), Total: s.GetTotal(),
		Timestamp: s.GetTimestamp(), Started: s.GetStarted(), Completed: s.GetCompleted(),
	}
}

func fromLog(l *controlapi.VertexLog) *archfarmv1.VertexLog {
	return &archfarmv1.VertexLog{Vertex: text(l.GetVertex()), Timestamp: l.GetTimestamp(), Stream: l.GetStream(), Msg: l.GetMsg()}
}

func fromWarning(w *controlapi.VertexWarning) *archfarmv1.VertexWarning {
	return &archfarmv1.VertexWarning{
		Vertex: text(w.GetVertex()), Level: w.GetLevel(), Short: w.GetShort(), Detail: w.GetDetail(), Url: text(w.GetUrl()),
	}
}

// ToSolveStatus returns a piece of a job's progress as BuildKit's progress display
// takes it. Nil gives an empty piece.
func ToSolveStatus(p *archfarmv1.Progress) *client.SolveStatus {
	return &client.SolveStatus{
		Vertexes: each(p.GetVertexes(), toVertex),
		Statuses: each(p.GetStatuses(), toStatus),
		Logs:     each(p.GetLogs(), toLog),
		Warnings: each(p.GetWarnings(), toWarning),
	}
}

func toVertex(v *archfarmv1.Vertex) *client.Vertex {
	out := &client.Vertex{
		Digest: digest.Digest(v.GetDigest()), Name: v.GetName(), Cached: v.GetCached(),
		Started: when(v.GetStarted()), Completed: when(v.GetCompleted()), Error: v.GetError(),
	}
	for _, in := range v.GetInputs() {
		out.Inputs = append(out.Inputs, digest.Digest(in))
	}
	if g := v.GetProgressGroup(); g != nil {
		out.ProgressGroup = &pb.ProgressGroup{Id: g.GetId(), Name: g.GetName(), Weak: g.GetWeak()}
	}
	return out
}

func toStatus(s *archfarmv1.VertexStatus) *client.VertexStatus {
	return &client.VertexStatus{
		ID: s.GetId(), Vertex: digest.Digest(s.GetVertex()), Name: s.GetName(), Current: s.GetCurrent(), Total: s.GetTotal(),
		Timestamp: s.GetTimestamp().AsTime(), Started: when(s.GetStarted()), Completed: when(s.GetCompleted()),
	}
}

func toLog(l *archfarmv1.VertexLog) *client.VertexLog {
	return &client.VertexLog{
		Vertex: digest.Digest(l.GetVertex()), Stream: int(l.GetStream()), Data: l.GetMsg(), Timestamp: l.GetTimestamp().AsTime(),
	}
}

func toWarning(w *archfarmv1.VertexWarning) *client.VertexWarning {
	return &client.VertexWarning{
		Vertex: digest.Digest(w.GetVertex()), Level: int(w.GetLevel()), Short: w.GetShort(), Detail: w.GetDetail(), URL: w.GetUrl(),
	}
}

// each converts the items that are there.
func each[From, To any](in []*From, one func(*From) *To) []*To {
	if len(in) == 0 {
		return nil
	}
	out := make([]*To, 0, len(in))
	for _, item := range in {
		if item != nil {
			out = append(out, one(item))
		}
	}
	return out
}

func when(ts *timestamppb.Timestamp) *time.Time {
	if ts == nil {
		return nil
	}
	t := ts.AsTime()
	return &t
}

func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

func texts(in []string) []string {
	if len(in) == 0 {
		return nil
	}
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = text(s)
	}
	return out
}
