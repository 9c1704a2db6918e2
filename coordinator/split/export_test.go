package split

import (
	"maps"
	"slices"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
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

func exporter(kind string, attrs ...string) *controlapi.Exporter {
	e := image(attrs...)
	e.Type = kind
	return e
}

// planned plans the exports of two platforms.
func planned(t *testing.T, exporters ...*controlapi.Exporter) (*ExportPlan, []Leg) {
	t.Helper()
	legs := legsFor(t, "linux/amd64,linux/arm64")
	plan, err := PlanExports(exporters, legs)
	if err != nil {
		t.Fatal(err)
	}
	return plan, legs
}

// published is the publication of a plan's only image.
func published(t *testing.T, e Export, metadata map[string][]byte) Publication {
	t.Helper()
	p, err := e.Publication(metadata, index)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// index is the digest of a merged index.
const index = digest.Digest("sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef")

func TestPlanExports_EachExporterIsMergedInItsWay(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		exporter *controlapi.Exporter
		want     Kind
		captured bool
	}{
		"an image":                        {image(), KindImage, false},
		"an OCI archive":                  {exporter("oci"), KindArchive, true},
		"a tar archive":                   {exporter("tar"), KindTar, true},
		"a folder":                        {exporter("local"), KindForward, false},
		"a folder for each platform":      {exporter("local", "platform-split=true", "mode=copy"), KindForward, false},
		"one folder":                      {exporter("local", "platform-split=false"), KindTree, true},
		"a mirrored folder":               {exporter("local", "mode=delete"), KindTree, true},
		"a mirrored folder, in BuildKit":  {exporter("local", "mode= DELETE "), KindTree, true},
		"a mirrored one of both":          {exporter("local", "mode=delete", "platform-split=0"), KindTree, true},
		"what the legs themselves refuse": {exporter("local", "mode=remove", "platform-split=perhaps"), KindForward, false},
		"a docker archive, as well":       {exporter("docker"), KindForward, false},
		"what nobody knows":               {exporter("teleport"), KindForward, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan, _ := planned(t, exporter("cacheonly"), test.exporter)
			got := plan.Exports()[1]
			if got.Exporter != 1 || got.Kind != test.want || got.Captured() != test.captured || plan.Captures() != test.captured {
				t.Errorf("got %+v", got)
			}
			if test.want == KindTree && got.Apart != (test.exporter.GetAttrs()["platform-split"] == "") {
				t.Errorf("apart: %t", got.Apart)
			}
		})
	}
}

func TestPlanExports_LegsPushByDigestToRepositoriesOnly(t *testing.T) {
	t.Parallel()
	const names = "registry.example:5000/team/app:v1,registry.example:5000/team/app:latest,team/app:v1,alpine,docker.io/library/alpine:3"
	attrs := []string{"name=" + names, "push=true", "oci-mediatypes=true", "registry.insecure="}
	plan, legs := planned(t, exporter("local", "dest=out"), image(attrs...))
	want := Publication{Name: names, Names: strings.Split(names, ","), Insecure: true}
	wantEqual(t, "publication", published(t, plan.Exports()[1], nil), want)
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

func TestPlanExports_EachImageHasItsOwnNames(t *testing.T) {
	t.Parallel()
	plan, legs := planned(t, image("name=a:1", "push=true"), exporter("oci", "name=c:3,d", "annotation-index.x=y"), image("name=b:2", "push-by-digest=false"), image("name=e", "push=true", "push-by-digest=true"))
	exports, leg := plan.Exports(), plan.Leg(legs[0])
	wantEqual(t, "the first", published(t, exports[0], nil), Publication{Name: "a:1", Names: []string{"a:1"}})
	wantEqual(t, "the second", published(t, exports[2], nil), Publication{Name: "b:2"})
	wantEqual(t, "the third", published(t, exports[3], nil), Publication{Name: "e", Names: []string{"e"}, ByDigest: true})
	names, err := exports[1].ArchiveNames(nil)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "the archive's", names, []string{"docker.io/library/c:3", "docker.io/library/d:latest"})
	wantEqual(t, "the archive's annotations", exports[1].Index, map[string]string{"x": "y"})
	for i, want := range []string{"a", "c:3,d", "b:2", "e"} {
		wantEqual(t, "a leg's names", leg[i].GetAttrs()["name"], want)
	}
	wantEqual(t, "the exporter that an answer describes", plan.Describing(), 3)
}

func TestPlanExports_TheFrontendMayChooseTheName(t *testing.T) {
	t.Parallel()
	metadata := map[string][]byte{"image.name": []byte("example.com/app:v1,example.com/app:v2"), "other": []byte("kept")}
	for name, test := range map[string]struct {
		attrs     []string
		metadata  map[string][]byte
		published Publication
		leg, told string // the name that a leg's exporter is given, and the frontend's choice as it is told
	}{
		"and does":              {[]string{"name=*", "push=true"}, metadata, Publication{Name: "example.com/app:v1,example.com/app:v2", Names: []string{"example.com/app:v1", "example.com/app:v2"}}, "*", "example.com/app"},
		"but need not":          {[]string{"name=x:1", "push=true"}, metadata, Publication{Name: "x:1", Names: []string{"x:1"}}, "x", string(metadata["image.name"])},
		"of what is not pushed": {[]string{"name=*"}, metadata, Publication{Name: "example.com/app:v1,example.com/app:v2"}, "*", string(metadata["image.name"])},
		"the client overrules":  {[]string{"name=*", "push=true", "image.name=y:2"}, metadata, Publication{Name: "y:2", Names: []string{"y:2"}}, "y", "example.com/app"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan, legs := planned(t, image(test.attrs...))
			wantEqual(t, "publication", published(t, plan.Exports()[0], test.metadata), test.published)
			wantEqual(t, "the leg's name", plan.Leg(legs[0])[0].GetAttrs()["name"], test.leg)
			told, err := plan.Metadata(test.metadata)
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "what the leg is told", string(told["image.name"])+" "+string(told["other"]), test.told+" kept")
		})
	}
	plan, _ := planned(t, image("name=*", "push=true"))
	_, err := plan.Metadata(map[string][]byte{"image.name": []byte("App")})
	wantRefusal(t, err, codes.InvalidArgument, `"App"`)
	if string(metadata["image.name"]) != "example.com/app:v1,example.com/app:v2" {
		t.Error("the client's own metadata was changed")
	}
}

func TestPlanExports_DanglingNamesEndInTheMergedDigest(t *testing.T) {
	t.Parallel()
	at := "r.io/dangling@" + index.String()
	for name, test := range map[string]struct {
		attrs     []string
		published Publication
		leg       string
	}{
		"beside others":       {[]string{"name=r.io/a:1", "push=true", "dangling-name-prefix=r.io/dangling"}, Publication{Name: "r.io/a:1," + at, Names: []string{"r.io/a:1", at}}, "r.io/a,r.io/dangling"},
		"alone":               {[]string{"push=true", "dangling-name-prefix=r.io/dangling"}, Publication{Name: at, Names: []string{at}}, "r.io/dangling"},
		"not pushed":          {[]string{"dangling-name-prefix=r.io/dangling"}, Publication{Name: at}, ""},
		"only where nameless": {[]string{"name=r.io/a", "push=true", "dangling-name-prefix=r.io/dangling", "danging-name-empty-only=true"}, Publication{Name: "r.io/a", Names: []string{"r.io/a"}}, "r.io/a"},
		"only, and nameless":  {[]string{"push=true", "dangling-name-prefix=r.io/dangling", "danging-name-empty-only="}, Publication{Name: at, Names: []string{at}}, "r.io/dangling"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan, legs := planned(t, image(test.attrs...))
			wantEqual(t, "publication", published(t, plan.Exports()[0], nil), test.published)
			attrs := plan.Leg(legs[0])[0].GetAttrs()
			wantEqual(t, "the leg's names", attrs["name"], test.leg)
			_, dangles := attrs["dangling-name-prefix"]
			wantEqual(t, "the leg's own image dangles", dangles, test.leg == "")
		})
	}
}

func TestPlanExports_ArchivesOfLegsAreSentAsFiles(t *testing.T) {
	t.Parallel()
	for attr, store := range map[string]bool{"tar=false": true, "tar=0": true, "tar=true": false, "tar=": false, "name=a": false} {
		plan, legs := planned(t, exporter("oci", attr))
		if plan.Exports()[0].Store != store {
			t.Errorf("%s: store is %t", attr, !store)
		}
		if v, ok := plan.Leg(legs[0])[0].GetAttrs()["tar"]; store && ok {
			t.Errorf("%s: a leg is told tar=%s", attr, v)
		}
	}
	plan, legs := planned(t, exporter("oci", "tar=perhaps"))
	wantEqual(t, "what the leg refuses", plan.Leg(legs[0])[0].GetAttrs()["tar"], "perhaps")
	_, err := plan.Exports()[0].ArchiveNames(nil)
	if err != nil {
		t.Errorf("of an archive without a name: %v", err)
	}
	plan, _ = planned(t, exporter("oci", "name=App"))
	_, err = plan.Exports()[0].ArchiveNames(nil)
	wantRefusal(t, err, codes.Unknown, "failed to parse App")
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
	export := plan.Exports()[0]
	wantEqual(t, "of the index", export.Index, map[string]string{"whole": "7"})
	wantEqual(t, "of its descriptor", export.IndexDescriptor, map[string]string{"whole": "8"})
	// A leg gets those of the index too, and refuses what buildkitd does; its own index is not kept.
	all := []string{"annotation-index-descriptor.whole", "annotation-index.whole", "annotation-manifest-descriptor.all", "annotation-manifest.all", "annotation.all"}
	for i, own := range [][]string{
		nil,
		{"annotation-manifest-descriptor[linux/arm64/v8].one", "annotation[linux/arm64].one"},
		{"annotation-manifest[linux/arm].seven"},
	} {
		got := slices.Sorted(maps.Keys(plan.Leg(legs[i])[0].GetAttrs()))
		wantEqual(t, legs[i].String(), got, slices.Sorted(slices.Values(slices.Concat(all, own))))
	}
}

func TestPlanExports_RefusesWhatIsWrong(t *testing.T) {
	t.Parallel()
	tooMany := strings.Repeat("a,", maxNames) + "a"
	for name, test := range map[string]struct {
		exporter *controlapi.Exporter
		words    []string
	}{
		"a name that is none":                {image("name=App:v1", "push=true"), []string{`"App:v1"`}},
		"an empty name among others":         {image("name=app,", "push=true"), []string{`""`}},
		"a name without end":                 {image("name="+strings.Repeat("a", 1<<20), "push=true"), []string{"1048576 bytes"}},
		"names without end":                  {image("name="+tooMany, "push=true"), []string{"1001 names"}},
		"a tag by digest":                    {image("name=app:v1", "push=true", "push-by-digest=true"), []string{"can't push tagged ref", "app:v1"}},
		"neither true nor false":             {image("name=app", "push=perhaps"), []string{`"perhaps"`, "push"}},
		"neither, insecure":                  {image("registry.insecure=perhaps"), []string{"registry.insecure"}},
		"an annotation of what":              {image("annotation-nothing.key=v"), []string{"annotation-nothing.key"}},
		"an annotation of no leg":            {image("annotation[linux/s390x].key=v"), []string{"no platform linux/s390x found"}},
		"an annotation of no leg, archived":  {exporter("oci", "annotation[linux/s390x].key=v"), []string{"no platform linux/s390x found"}},
		"an annotation of a bad platform":    {image("annotation[linux/a/b/c].key=v"), []string{"linux/a/b/c"}},
		"an annotation of what, in archives": {exporter("oci", "annotation-nothing.key=v"), []string{"annotation-nothing.key"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := PlanExports([]*controlapi.Exporter{test.exporter}, legsFor(t, "linux/amd64,linux/arm64"))
			wantRefusal(t, err, codes.InvalidArgument, test.words...)
		})
	}
}

func TestPlanExports_NothingIsPublishedUnlessPushed(t *testing.T) {
	t.Parallel()
	for name, attrs := range map[string][]string{
		"a name without push": {"name=app:v1"},
		"push=false":          {"name=app:v1", "push=false"},
		"no name":             {"push=true"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			plan, legs := planned(t, image(attrs...))
			if p := published(t, plan.Exports()[0], nil); len(p.Names) > 0 {
				t.Errorf("to be published: %v", p.Names)
			}
			wantEqual(t, "the leg's attributes", plan.Leg(legs[0])[0].GetAttrs(), image(attrs...).GetAttrs())
		})
	}
}

func TestPlanExports_BuildsOfOneLegHaveNone(t *testing.T) {
	t.Parallel()
	var none *ExportPlan
	told, err := none.Metadata(map[string][]byte{"image.name": []byte("App")})
	if none.Captures() || len(none.Exports()) > 0 || err != nil || string(told["image.name"]) != "App" {
		t.Errorf("captures %t, exports %v, metadata %v, %v", none.Captures(), none.Exports(), told, err)
	}
}

func TestKeys_AreInTheOrderOfTheResultsPlatforms(t *testing.T) {
	t.Parallel()
	ref := &gwpb.Ref{Id: "1"}
	several := &gwpb.Result{
		Result:   &gwpb.Result_Refs{Refs: &gwpb.RefMap{Refs: map[string]*gwpb.Ref{"linux/amd64": ref, "linux/arm64": ref, "beyond": ref, "windows": ref}}},
		Metadata: map[string][]byte{"refs.platforms": []byte(`{"Platforms":[{"ID":"windows","Platform":{"os":"windows","architecture":"amd64"}},{"ID":"linux/arm64","Platform":{"os":"linux","architecture":"arm64"}},{"ID":"linux/amd64","Platform":{"os":"linux","architecture":"amd64"}}]}`)},
	}
	wantEqual(t, "keys", Keys(several), []string{"windows", "linux/arm64", "linux/amd64", "beyond"})
	several.Metadata["refs.platforms"] = []byte("{")
	wantEqual(t, "keys of a list that cannot be read", Keys(several), []string{"beyond", "linux/amd64", "linux/arm64", "windows"})
	wantEqual(t, "keys of a single reference", Keys(&gwpb.Result{Result: &gwpb.Result_Ref{Ref: ref}}), []string{""})
}
