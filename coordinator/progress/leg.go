package progress

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// minSkew is the clock difference that is worth a correction. Below it the
	// measurement is no better than the clocks.
	minSkew = 50 * time.Millisecond
	// maxMapped bounds the memory for digests seen before. A build has some
	// hundreds of vertices; beyond the bound a digest is computed anew.
	maxMapped = 1 << 15
)

// Leg translates the status stream of one leg. It is safe for concurrent use,
// but the order of a stream is that of the calls.
type Leg struct {
	platform string
	rewrite  bool

	mu     sync.Mutex
	skew   time.Duration
	mapped map[string]string
	open   map[string]openVertex // by translated digest

	warned   *Warned               // nil: there are no others
	second   bool                  // not the first of them
	warnings map[digest.Digest]int // of this leg, by content
}

// openVertex is a vertex that has started and not completed.
type openVertex struct {
	vertex *controlapi.Vertex
	// skew is the correction that its start got. What follows gets the same:
	// clients take the start for the identity of a vertex's run.
	skew time.Duration
}

// NewLeg returns the translator for the leg of a platform. With rewrite unset,
// for a build of one leg, messages pass through as they are.
func NewLeg(platform string, rewrite bool) *Leg {
	return &Leg{
		platform: platform,
		rewrite:  rewrite,
		mapped:   make(map[string]string),
		open:     make(map[string]openVertex),
	}
}

// SetSkew sets the correction for the worker's clock: d is added to every
// timestamp from now on, except for vertices that are open. A d below 50 ms
// either way counts as none.
func (l *Leg) SetSkew(d time.Duration) {
	if d.Abs() < minSkew {
		d = 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.skew = d
}

// Translate returns r as the build's client should see it: digests that are
// this leg's own, names that say the platform, times of this machine's clock. It
// does not change r; the result shares what is the same in both, and is r itself
// where nothing is to be changed. Nil gives nil.
func (l *Leg) Translate(r *controlapi.StatusResponse) *controlapi.StatusResponse {
	if r == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.rewrite && l.skew == 0 && !l.openSkewed() {
		for _, v := range r.Vertexes {
			l.track(v, 0)
		}
		return r
	}
	out := &controlapi.StatusResponse{
		Vertexes: translateAll(r.Vertexes, l.vertex),
		Statuses: translateAll(r.Statuses, l.status),
		Logs:     translateAll(r.Logs, l.log),
		Warnings: translateAll(l.fresh(r.Warnings), l.warning),
	}
	keepUnknown(out, r)
	return out
}

// Translated returns the digest that Translate puts in the place of dgst.
func (l *Leg) Translated(dgst string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.digest(dgst)
}

// Fail returns a message that completes every vertex that is open, with reason
// as its error, at now by this machine's clock. Without it clients show the
// steps of a leg that was cancelled as done. It returns nil if none is open.
func (l *Leg) Fail(now time.Time, reason string) *controlapi.StatusResponse {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.open) == 0 {
		return nil
	}
	out := &controlapi.StatusResponse{}
	for _, o := range l.open {
		v := copyVertex(o.vertex)
		v.Completed = timestamppb.New(later(now, v.Started.AsTime()))
		v.Error = validText(reason)
		out.Vertexes = append(out.Vertexes, v)
	}
	clear(l.open)
	slices.SortFunc(out.Vertexes, func(a, b *controlapi.Vertex) int {
		if c := a.Started.AsTime().Compare(b.Started.AsTime()); c != 0 {
			return c
		}
		return strings.Compare(a.Digest, b.Digest)
	})
	return out
}

// Interrupt is Fail for what will be begun again: clients show it as canceled.
func (l *Leg) Interrupt(now time.Time, reason string) *controlapi.StatusResponse {
	return l.Fail(now, reason+": "+context.Canceled.Error()) // progressui looks for that suffix
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// digest is Translated with l.mu held.
func (l *Leg) digest(old string) string {
	if !l.rewrite || old == "" {
		return old
	}
	if d, ok := l.mapped[old]; ok {
		return d
	}
	d := digest.FromString(l.platform + "\x00" + old).String()
	if len(l.mapped) < maxMapped {
		l.mapped[old] = d
	}
	return d
}

// skewOf is the correction for what is about a vertex.
func (l *Leg) skewOf(dgst string) time.Duration {
	if o, ok := l.open[dgst]; ok {
		return o.skew
	}
	return l.skew
}

// openSkewed says whether a vertex is open whose start was corrected.
func (l *Leg) openSkewed() bool {
	for _, o := range l.open {
		if o.skew != 0 {
			return true
		}
	}
	return false
}

// track keeps l.open, given a translated vertex. BuildKit repeats the initial,
// not started, form of vertices that have started: it says nothing.
func (l *Leg) track(v *controlapi.Vertex, skew time.Duration) {
	switch {
	case v == nil:
	case v.Completed != nil:
		delete(l.open, v.Digest)
	case v.Started != nil:
		l.open[v.Digest] = openVertex{vertex: v, skew: skew}
	}
}

func (l *Leg) vertex(v *controlapi.Vertex) *controlapi.Vertex {
	out := copyVertex(v)
	out.Digest = l.digest(v.Digest)
	skew := l.skewOf(out.Digest)
	out.Started, out.Completed = shift(v.Started, skew), shift(v.Completed, skew)
	if l.rewrite {
		out.Name = StepName(l.platform, v.Name)
		out.ProgressGroup = l.group(v.ProgressGroup)
		if len(v.Inputs) > 0 {
			out.Inputs = make([]string, len(v.Inputs))
			for i, in := range v.Inputs {
				out.Inputs[i] = l.digest(in)
			}
		}
	}
	l.track(out, skew)
	return out
}

func (l *Leg) group(g *pb.ProgressGroup) *pb.ProgressGroup {
	if g == nil {
		return nil
	}
	out := &pb.ProgressGroup{Id: g.Id + "/" + l.platform, Name: StepName(l.platform, g.Name), Weak: g.Weak}
	keepUnknown(out, g)
	return out
}

func (l *Leg) status(s *controlapi.VertexStatus) *controlapi.VertexStatus {
	dgst := l.digest(s.Vertex)
	skew := l.skewOf(dgst)
	out := &controlapi.VertexStatus{
		ID: s.ID, Vertex: dgst, Name: s.Name, Current: s.Current, Total: s.Total,
		Timestamp: shift(s.Timestamp, skew), Started: shift(s.Started, skew), Completed: shift(s.Completed, skew),
	}
	keepUnknown(out, s)
	return out
}

func (l *Leg) log(g *controlapi.VertexLog) *controlapi.VertexLog {
	dgst := l.digest(g.Vertex)
	out := &controlapi.VertexLog{
		Vertex: dgst, Timestamp: shift(g.Timestamp, l.skewOf(dgst)), Stream: g.Stream, Msg: g.Msg,
	}
	keepUnknown(out, g)
	return out
}

func (l *Leg) warning(w *controlapi.VertexWarning) *controlapi.VertexWarning {
	out := &controlapi.VertexWarning{
		Vertex: l.digest(w.Vertex), Level: w.Level, Short: w.Short, Detail: w.Detail, Url: w.Url, Info: w.Info, Ranges: w.Ranges,
	}
	keepUnknown(out, w)
	return out
}

// copyVertex returns a copy of which every field may be replaced.
func copyVertex(v *controlapi.Vertex) *controlapi.Vertex {
	out := &controlapi.Vertex{
		Digest: v.Digest, Inputs: v.Inputs, Name: v.Name, Cached: v.Cached,
		Started: v.Started, Completed: v.Completed, Error: v.Error, ProgressGroup: v.ProgressGroup,
	}
	keepUnknown(out, v)
	return out
}

func shift(ts *timestamppb.Timestamp, d time.Duration) *timestamppb.Timestamp {
	if ts == nil || d == 0 {
		return ts
	}
	return timestamppb.New(ts.AsTime().Add(d))
}

func translateAll[T any](in []*T, one func(*T) *T) []*T {
	if len(in) == 0 {
		return nil
	}
	out := make([]*T, 0, len(in))
	for _, item := range in {
		if item != nil {
			out = append(out, one(item))
		}
	}
	return out
}

// keepUnknown carries over the fields that a newer BuildKit has and this
// program does not know.
func keepUnknown(to, from proto.Message) {
	if u := from.ProtoReflect().GetUnknown(); len(u) > 0 {
		to.ProtoReflect().SetUnknown(u)
	}
}
