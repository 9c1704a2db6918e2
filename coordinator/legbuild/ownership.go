package legbuild

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/coordinator/progress"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// ownership makes the vertices of one attempt its own: several attempts at a job have
// equal steps, which those who draw them must tell apart.
type ownership struct {
	prefix string
	// platform is in the names of the steps when the job has several.
	platform string
	open     map[string]*archfarmv1.Vertex
}

func newOwnership(leg job.Leg) *ownership {
	o := &ownership{
		prefix: fmt.Sprintf("%s\x00%d\x00%s\x00", leg.Platform, leg.Attempt, leg.Ref),
		open:   map[string]*archfarmv1.Vertex{},
	}
	if len(leg.Spec.GetPlatforms()) > 1 {
		o.platform = leg.Platform
	}
	return o
}

// take changes p.
func (o *ownership) take(p *archfarmv1.Progress) {
	for _, v := range p.GetVertexes() {
		v.Digest, v.Name = o.digest(v.GetDigest()), progress.StepName(o.platform, v.GetName())
		for i, in := range v.GetInputs() {
			v.Inputs[i] = o.digest(in)
		}
		if g := v.GetProgressGroup(); g != nil {
			g.Id, g.Name = o.digest(g.GetId()), progress.StepName(o.platform, g.GetName())
		}
		o.follow(v)
	}
	for _, s := range p.GetStatuses() {
		s.Vertex = o.digest(s.GetVertex())
	}
	for _, l := range p.GetLogs() {
		l.Vertex = o.digest(l.GetVertex())
	}
	for _, w := range p.GetWarnings() {
		w.Vertex = o.digest(w.GetVertex())
	}
}

func (o *ownership) digest(old string) string {
	if old == "" {
		return ""
	}
	return digest.FromString(o.prefix + old).String()
}

// follow keeps o.open. BuildKit repeats the form of before the start of vertices that
// have started: it says nothing.
func (o *ownership) follow(v *archfarmv1.Vertex) {
	switch {
	case v.GetCompleted() != nil:
		delete(o.open, v.GetDigest())
	case v.GetStarted() != nil:
		o.open[v.GetDigest()] = v
	}
}

// abandon returns every vertex that is open, completed with an error.
func (o *ownership) abandon(reason string) []*archfarmv1.Vertex {
	var out []*archfarmv1.Vertex
	for _, v := range o.open {
		out = append(out, &archfarmv1.Vertex{
			Digest: v.GetDigest(), Inputs: v.GetInputs(), Name: v.GetName(), Started: v.GetStarted(), ProgressGroup: v.GetProgressGroup(),
			Completed: later(timestamppb.Now(), v.GetStarted()), Error: reason,
		})
	}
	clear(o.open)
	slices.SortFunc(out, func(a, b *archfarmv1.Vertex) int {
		return cmp.Or(a.GetStarted().AsTime().Compare(b.GetStarted().AsTime()), strings.Compare(a.GetDigest(), b.GetDigest()))
	})
	return out
}

func later(a, b *timestamppb.Timestamp) *timestamppb.Timestamp {
	if a.AsTime().Before(b.AsTime()) {
		return b
	}
	return a
}
