package split

import (
	"maps"
	"slices"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
)

func image(attrs ...string) *controlapi.Exporter {
	e := &controlapi.Exporter{Type: "image", Attrs: map[string]string{}}
	for _, a := range attrs {
		k, v, _ := strings.Cut(a, "=")
		e.Attrs[k] = v
	}
	return e
}

func TestExporters_OldRequestsHaveTheirsInAnotherPlace(t *testing.T) {
	t.Parallel()
	attrs := map[string]string{"name": "app"}
	old := &controlapi.SolveRequest{ExporterDeprecated: "image", ExporterAttrsDeprecated: attrs}
	got := Exporters(old)
	if len(got) != 1 || got[0].GetType() != "image" || !maps.Equal(got[0].GetAttrs(), attrs) {
		t.Errorf("of an old request: %v", got)
	}
	both := &controlapi.SolveRequest{ExporterDeprecated: "local", Exporters: []*controlapi.Exporter{image()}}
	if got := Exporters(both); len(got) != 1 || got[0].GetType() != "image" {
		t.Errorf("of a request with both: %v", got)
	}
	if got := Exporters(&controlapi.SolveRequest{}); len(got) != 0 {
		t.Errorf("of a request without: %v", got)
	}
}

func TestPlanExports_LegsPushByDigestToRepositoriesOnly(t *testing.T) {
	t.Parallel()
	const names = "registry.example:5000/team/app:v1,registry.example:5000/team/app:latest,team/app:v1,alpine,docker.io/library/alpine:3"
	attrs := []string{"name=" + names, "push=true", "oci-mediatypes=true", "registry.insecure="}
	legs := legsFor(t, "linux/amd64,linux/arm64")
	plan, err := PlanExports([]*controlapi.Exporter{{Type: "local", Attrs: map[string]string{"dest": "out"}}, image(attrs...)}, legs)
	if err != nil {
		t.Fatal(err)
	}
	publication, ok := plan.Publication()
	want := Publication{Name: names, Names: strings.Split(names, ","), Insecure: true, Index: map[string]string{}, IndexDescriptor: map[string]string{}}
	wantEqual(t, "publication", publication, want)
	if !ok {
		t.Error("there is no image")
	}
	for _, leg := range legs {
		got := plan.Leg(leg)
		if len(got) != 2 || got[0].GetType() != "local" || got[0].GetAttrs()["dest"] != "out" {
			t.Fatalf("%s: the exporters are %v", leg, got)
		}
		want := map[string]string{
			"name": "registry.example:5000/team/app,team/app,alpine,docker.io/library/alpine",
			"push": "true", "push-by-digest": "true", "oci-mediatypes": "true", "registry.insecure": "",
		}
		wantEqual(t, leg.String()+": the image exporter's attributes", got[1].GetAttrs(), want)
	}
}

func TestPlanExports_EachAnnotationGoesToWhereItBelongs(t *testing.T) {
	t.Parallel()
	legs := legsFor(t, "linux/amd64,linux/arm64,linux/arm/v7")
	plan, err := PlanExports([]*controlapi.Exporter{image(
		"annotation.all=1", "annotation-manifest.all=2", "annotation-manifest-descriptor.all=3",
		"annotation[linux/arm64].one=4", "annotation-manifest-descriptor[linux/arm64/v8].one=5", "annotation-manifest[linux/arm].seven=6",
		"annotation-index.whole=7", "annotation-index-descriptor.whole=8",
	)}, legs)
	if err != nil {
		t.Fatal(err)
	}
	publication, _ := plan.Publication()
	wantEqual(t, "of the index", publication.Index, map[string]string{"whole": "7"})
	wantEqual(t, "of its descriptor", publication.IndexDescriptor, map[string]string{"whole": "8"})
	for i, want := range [][]string{
		{"annotation-manifest-descriptor.all", "annotation-manifest.all", "annotation.all"},
		{"annotation-manifest-descriptor.all", "annotation-manifest-descriptor[linux/arm64/v8].one", "annotation-manifest.all", "annotation.all", "annotation[linux/arm64].one"},
		{"annotation-manifest-descriptor.all", "annotation-manifest.all", "annotation-manifest[linux/arm].seven", "annotation.all"},
	} {
		got := slices.Sorted(maps.Keys(plan.Leg(legs[i])[0].GetAttrs()))
		wantEqual(t, legs[i].String(), got, want)
	}
}

func TestPlanExports_RefusesWhatCannotBeMerged(t *testing.T) {
	t.Parallel()
	tooMany := strings.Repeat("a,", maxNames) + "a"
	for name, test := range map[string]struct {
		exporters []*controlapi.Exporter
		code      codes.Code
		words     []string
	}{
		"oci":                             {[]*controlapi.Exporter{{Type: "oci"}}, codes.Unimplemented, []string{`"oci" exporter`, "linux/amd64, linux/arm64", "--push"}},
		"tar beside an image":             {[]*controlapi.Exporter{image(), {Type: "tar"}}, codes.Unimplemented, []string{`"tar" exporter`}},
		"an unknown one":                  {[]*controlapi.Exporter{{Type: "teleport"}}, codes.Unimplemented, []string{`"teleport" exporter`}},
		"two images":                      {[]*controlapi.Exporter{image(), image()}, codes.Unimplemented, []string{"several image exporters"}},
		"local that deletes":              {[]*controlapi.Exporter{{Type: "local", Attrs: map[string]string{"mode": "delete"}}}, codes.Unimplemented, []string{"mode=delete"}},
		"local in one folder":             {[]*controlapi.Exporter{{Type: "local", Attrs: map[string]string{"platform-split": "false"}}}, codes.Unimplemented, []string{"platform-split=false"}},
		"a name chosen later":             {[]*controlapi.Exporter{image("name=*", "push=true")}, codes.Unimplemented, []string{`name="*"`}},
		"a name that is none":             {[]*controlapi.Exporter{image("name=App:v1", "push=true")}, codes.InvalidArgument, []string{`"App:v1"`}},
		"an empty name among others":      {[]*controlapi.Exporter{image("name=app,", "push=true")}, codes.InvalidArgument, []string{`""`}},
		"a name without end":              {[]*controlapi.Exporter{image("name="+strings.Repeat("a", 1<<20), "push=true")}, codes.InvalidArgument, []string{"1048576 bytes"}},
		"names without end":               {[]*controlapi.Exporter{image("name="+tooMany, "push=true")}, codes.InvalidArgument, []string{"1001 names"}},
		"a tag by digest":                 {[]*controlapi.Exporter{image("name=app:v1", "push=true", "push-by-digest=true")}, codes.InvalidArgument, []string{"can't push tagged ref", "app:v1"}},
		"neither true nor false":          {[]*controlapi.Exporter{image("name=app", "push=perhaps")}, codes.InvalidArgument, []string{`"perhaps"`, "push"}},
		"neither, insecure":               {[]*controlapi.Exporter{image("registry.insecure=perhaps")}, codes.InvalidArgument, []string{"registry.insecure"}},
		"an annotation of what":           {[]*controlapi.Exporter{image("annotation-nothing.key=v")}, codes.InvalidArgument, []string{"annotation-nothing.key"}},
		"an annotation of no leg":         {[]*controlapi.Exporter{image("annotation[linux/s390x].key=v")}, codes.InvalidArgument, []string{"no platform linux/s390x found"}},
		"an annotation of a bad platform": {[]*controlapi.Exporter{image("annotation[linux/a/b/c].key=v")}, codes.InvalidArgument, []string{"linux/a/b/c"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := PlanExports(test.exporters, legsFor(t, "linux/amd64,linux/arm64"))
			wantRefusal(t, err, test.code, test.words...)
		})
	}
}

func TestPlanExports_NothingIsPublishedUnlessPushed(t *testing.T) {
	t.Parallel()
	legs := legsFor(t, "linux/amd64,linux/arm64")
	for name, attrs := range map[string][]string{
		"a name without push": {"name=app:v1"},
		"push=false":          {"name=app:v1", "push=false"},
		"no name":             {"push=true"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan, err := PlanExports([]*controlapi.Exporter{image(attrs...)}, legs)
			if err != nil {
				t.Fatal(err)
			}
			if p, ok := plan.Publication(); !ok || len(p.Names) > 0 {
				t.Errorf("to be published: %v (an image: %t)", p.Names, ok)
			}
			wantEqual(t, "the leg's attributes", plan.Leg(legs[0])[0].GetAttrs(), image(attrs...).GetAttrs())
		})
	}
}

func TestImage_BuildsWithoutOne(t *testing.T) {
	t.Parallel()
	var none *ExportPlan
	if _, ok := none.Publication(); ok {
		t.Error("a build of one leg has an image to merge")
	}
	plan, err := PlanExports([]*controlapi.Exporter{{Type: "local"}, {Type: "cacheonly"}}, legsFor(t, "linux/amd64,linux/arm64"))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := plan.Publication(); ok {
		t.Error("a build into a folder has an image")
	}
	if got := plan.Leg(legsFor(t, "linux/amd64")[0]); len(got) != 2 {
		t.Errorf("the leg's exporters: %v", got)
	}
}
