package split_test

import (
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"

	"github.com/archfarm/archfarm/coordinator/split"
)

// publishing is a policy by which the repositories of "strict" are the farm's, and it is
// told of "told"'s.
func publishing(repository string) split.Publishing {
	switch {
	case repository == "", strings.HasPrefix(repository, "docker.io/strict/"):
		return split.ByFarm
	case strings.HasPrefix(repository, "docker.io/told/"):
		return split.ByWorkerTold
	}
	return split.ByWorker
}

func TestPlanSole(t *testing.T) {
	t.Parallel()
	image := func(pairs ...string) *controlapi.Exporter {
		e := &controlapi.Exporter{Type: "image", Attrs: map[string]string{}}
		for i := 0; i < len(pairs); i += 2 {
			e.Attrs[pairs[i]] = pairs[i+1]
		}
		return e
	}
	for name, test := range map[string]struct {
		exporter *controlapi.Exporter
		want     split.Kind
		leg      map[string]string // attributes that the leg gets instead; nil: the client's
	}{
		"not pushed":                      {exporter: image("name", "strict/a:1")},
		"a repository of nobody's":        {exporter: image("name", "free/a:1", "push", "true")},
		"told":                            {exporter: image("name", "told/a:1", "push", "true"), want: split.KindPushed},
		"by the farm":                     {exporter: image("name", "strict/a:1", "push", "true"), want: split.KindImage, leg: map[string]string{"name": "strict/a", "push": "true", "push-by-digest": "true"}},
		"the strictest of several":        {exporter: image("name", "free/a:1,told/a:1,strict/a:1", "push", ""), want: split.KindImage, leg: map[string]string{"name": "free/a,told/a,strict/a", "push": "", "push-by-digest": "true"}},
		"without a tag, which is latest":  {exporter: image("name", "told/a", "push", "true"), want: split.KindPushed},
		"by digest, which moves no tag":   {exporter: image("name", "strict/a", "push", "true", "push-by-digest", "true")},
		"the frontend's choice":           {exporter: image("name", "*", "push", "true"), want: split.KindImage, leg: map[string]string{"name": "*", "push": "true", "push-by-digest": "true"}},
		"with a name that the client set": {exporter: image("name", "*", "image.name", "told/a:1", "push", "true"), want: split.KindPushed},
		"other platforms' annotations, which the worker refuses": {
			exporter: image("name", "strict/a:1", "push", "true", "annotation-manifest[linux/s390x].a", "b"), want: split.KindImage,
			leg: map[string]string{"name": "strict/a", "push": "true", "push-by-digest": "true", "annotation-manifest[linux/s390x].a": "b"},
		},
		"what is no flag, which the worker refuses": {exporter: image("name", "strict/a:1", "push", "maybe")},
		"what is no name, which the worker refuses": {exporter: image("name", "strict/A:1", "push", "true")},
		"an archive": {exporter: &controlapi.Exporter{Type: "oci", Attrs: map[string]string{"name": "strict/a:1"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan := split.PlanSole([]*controlapi.Exporter{test.exporter}, publishing)
			if test.want == split.KindForward {
				if plan != nil {
					t.Fatalf("planned %+v, want that the worker does it", plan.Exports())
				}
				return
			}
			if plan == nil {
				t.Fatal("the worker does it, want a plan")
			}
			if e := plan.Exports()[0]; e.Kind != test.want || !e.Sole || !e.Naming {
				t.Errorf("planned %+v, want the kind %d, sole and naming", e, test.want)
			}
			want := test.leg
			if want == nil {
				want = test.exporter.GetAttrs()
			}
			got := plan.Leg(split.Leg{})[0].GetAttrs()
			for k := range want {
				if got[k] != want[k] {
					t.Errorf("the leg's %s is %q, want %q", k, got[k], want[k])
				}
			}
			if len(got) != len(want) {
				t.Errorf("the leg's attributes are %q, want %q", got, want)
			}
		})
	}
}

// TestPlanSole_OfSeveralExportersTheLastNameIsAnswered is as buildkitd merges answers.
func TestPlanSole_OfSeveralExportersTheLastNameIsAnswered(t *testing.T) {
	t.Parallel()
	pushed := &controlapi.Exporter{Type: "image", Attrs: map[string]string{"name": "strict/a:1", "push": "true"}}
	for name, test := range map[string]struct {
		then *controlapi.Exporter
		want bool
	}{
		"an archive without a name": {&controlapi.Exporter{Type: "oci"}, true},
		"an archive with a name":    {&controlapi.Exporter{Type: "docker", Attrs: map[string]string{"name": "b:2"}}, false},
		"an image with a name":      {&controlapi.Exporter{Type: "image", Attrs: map[string]string{"name": "b:2"}}, false},
		"files":                     {&controlapi.Exporter{Type: "local"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan := split.PlanSole([]*controlapi.Exporter{pushed, test.then}, publishing)
			if got := plan.Exports()[0].Naming; got != test.want {
				t.Errorf("naming: %t, want %t", got, test.want)
			}
			metadata, err := plan.Metadata(map[string][]byte{exptypes.ExporterImageNameKey: []byte("c:3")})
			if err != nil || string(metadata[exptypes.ExporterImageNameKey]) != "c:3" {
				t.Errorf("the frontend's name, which no exporter asks for, became %q (%v)", metadata[exptypes.ExporterImageNameKey], err)
			}
		})
	}
}
