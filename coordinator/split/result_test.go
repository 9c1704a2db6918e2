package split

import (
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
)

func bare(id string, metadata map[string]string) *gwpb.Result {
	return &gwpb.Result{Result: &gwpb.Result_Ref{Ref: &gwpb.Ref{Id: id}}, Metadata: bytesOf(metadata)}
}

// several has a reference for each key, named like it, unless the key is listed
// with another id as key=id.
func several(metadata map[string]string, keys ...string) *gwpb.Result {
	refs := map[string]*gwpb.Ref{}
	for _, k := range keys {
		key, id, ok := strings.Cut(k, "=")
		if !ok {
			id = key
		}
		refs[key] = &gwpb.Ref{Id: id}
	}
	return &gwpb.Result{Result: &gwpb.Result_Refs{Refs: &gwpb.RefMap{Refs: refs}}, Metadata: bytesOf(metadata)}
}

func bytesOf(m map[string]string) map[string][]byte {
	out := map[string][]byte{}
	for k, v := range m {
		out[k] = []byte(v)
	}
	return out
}

func stringsOf(m map[string][]byte) map[string]string {
	out := map[string]string{}
	for k, v := range m {
		out[k] = string(v)
	}
	return out
}

func attested(res *gwpb.Result, key, ref string) *gwpb.Result {
	if res.Attestations == nil {
		res.Attestations = map[string]*gwpb.Attestations{}
	}
	res.Attestations[key] = &gwpb.Attestations{Attestation: []*gwpb.Attestation{{Ref: &gwpb.Ref{Id: ref}}}}
	return res
}

func owned(keys ...string) func(key, ref string) bool {
	return func(key, _ string) bool { return slices.Contains(keys, key) }
}

func platformIDs(t *testing.T, res *gwpb.Result) []string {
	t.Helper()
	list, err := exptypes.ParsePlatforms(res.GetMetadata())
	if err != nil {
		t.Fatal(err)
	}
	ids := []string{}
	for _, p := range list.Platforms {
		ids = append(ids, p.ID)
	}
	return ids
}

func TestMerge_IsWhatAFrontendOfAllPlatformsReturns(t *testing.T) {
	t.Parallel()
	legs := legsFor(t, "linux/arm64,linux/amd64")
	merged, err := Merge(legs, []*gwpb.Result{
		attested(bare("r1", map[string]string{"containerimage.config": "c1", "source.date.epoch": "1", "other": "same"}), "linux/arm64", "a1"),
		bare("r2", map[string]string{"containerimage.config": "c2", "containerimage.base.config": "b2", "other": "same"}),
	})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "platforms", platformIDs(t, merged), []string{"linux/arm64", "linux/amd64"})
	metadata := stringsOf(merged.GetMetadata())
	delete(metadata, exptypes.ExporterPlatformsKey)
	wantEqual(t, "metadata", metadata, map[string]string{
		"containerimage.config/linux/arm64": "c1", "source.date.epoch/linux/arm64": "1",
		"containerimage.config/linux/amd64": "c2", "containerimage.base.config/linux/amd64": "b2", "other": "same",
	})
	refs := merged.GetRefs().GetRefs()
	if len(refs) != 2 || refs["linux/arm64"].GetId() != "r1" || refs["linux/amd64"].GetId() != "r2" {
		t.Errorf("references: %v", refs)
	}
	if got := merged.GetAttestations()["linux/arm64"].GetAttestation()[0].GetRef().GetId(); got != "a1" {
		t.Errorf("the attestation's reference is %q", got)
	}
}

// Windows: the frontend learns the system's version from the base image.
func TestMerge_AFrontendMayNamePlatformsItself(t *testing.T) {
	t.Parallel()
	const key, list = "windows(10.0.1)/amd64", `{"Platforms":[{"ID":"windows(10.0.1)/amd64","Platform":{"os":"windows","architecture":"amd64","os.version":"10.0.1"}}]}`
	merged, err := Merge(legsFor(t, "windows/amd64,linux/amd64"), []*gwpb.Result{
		bare("w", map[string]string{"refs.platforms": list, "containerimage.config": "c"}), bare("l", nil),
	})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "platforms", platformIDs(t, merged), []string{key, "linux/amd64"})
	if merged.GetRefs().GetRefs()[key].GetId() != "w" || string(merged.GetMetadata()["containerimage.config/"+key]) != "c" {
		t.Errorf("the merged result is %v", merged)
	}
}

func TestMerge_UnderstandsEveryFormOfResult(t *testing.T) {
	t.Parallel()
	legs := legsFor(t, "linux/amd64,linux/arm64,linux/s390x,linux/ppc64le,linux/riscv64")
	merged, err := Merge(legs, []*gwpb.Result{
		{Result: &gwpb.Result_RefDeprecated{RefDeprecated: "old"}},
		{Result: &gwpb.Result_RefsDeprecated{RefsDeprecated: &gwpb.RefMapDeprecated{Refs: map[string]string{"linux/arm64": "old map"}}}},
		several(nil, "linux/s390x"),
		{Result: &gwpb.Result_Ref{}}, // an empty image
		nil,                          // likewise
	})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for key, ref := range merged.GetRefs().GetRefs() {
		got[key] = ref.GetId()
	}
	wantEqual(t, "references", got, map[string]string{"linux/amd64": "old", "linux/arm64": "old map", "linux/s390x": "linux/s390x", "linux/ppc64le": "", "linux/riscv64": ""})
}

func TestMerge_RefusesWhatLegsMayNotReturn(t *testing.T) {
	t.Parallel()
	legs := legsFor(t, "linux/amd64,linux/arm64")
	for name, test := range map[string]struct {
		first, second *gwpb.Result
		word          string
	}{
		"another leg's platform":     {bare("a", nil), several(nil, "linux/amd64=b"), "linux/amd64 was returned twice"},
		"another leg's attestations": {attested(bare("a", nil), "linux/amd64", "x"), attested(bare("b", nil), "linux/amd64", "y"), "attestations of linux/amd64"},
		"no list of platforms":       {bare("a", map[string]string{"refs.platforms": "not JSON"}), bare("b", nil), "linux/amd64"},
		"an empty list":              {bare("a", nil), bare("b", map[string]string{"refs.platforms": "{}"}), "linux/arm64"},
		"a platform without a key":   {bare("a", nil), bare("b", map[string]string{"refs.platforms": `{"Platforms":[{}]}`}), "linux/arm64"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Merge(legs, []*gwpb.Result{test.first, test.second})
			wantRefusal(t, err, codes.InvalidArgument, test.word)
		})
	}
}

func TestPart_OfASingleReferenceIsAllOrNothing(t *testing.T) {
	t.Parallel()
	res := bare("r", map[string]string{"containerimage.config": "c"})
	part, err := Part(res, func(key, ref string) bool { return key == "" && ref == "r" })
	if err != nil || part != res {
		t.Errorf("the owner's part is %v, %v", part, err)
	}
	if part, err := Part(res, owned()); err != nil || part != nil {
		t.Errorf("another's part is %v, %v", part, err)
	}
}

func TestPart_KeysThatEndInOneAnotherAreToldApart(t *testing.T) {
	t.Parallel()
	metadata := map[string]string{
		"config/b": "1", "config/a/b": "2", "config": "3", "config/x/a/b": "4", "config/": "5",
		"config/" + strings.Repeat("long/", maxName) + "b": "6",
	}
	res := attested(attested(several(metadata, "b", "a/b"), "b", "x"), "a/b", "y")
	for key, want := range map[string][]string{"b": {"1", "3", "5", "6"}, "a/b": {"2", "3", "4", "5"}} {
		part, err := Part(res, owned(key))
		if err != nil {
			t.Fatal(err)
		}
		got := slices.Sorted(maps.Values(stringsOf(part.GetMetadata())))
		wantEqual(t, "metadata of "+key, got, want)
		wantEqual(t, "attestations of "+key, slices.Collect(maps.Keys(part.GetAttestations())), []string{key})
	}
	if len(res.GetMetadata()) != len(metadata) {
		t.Error("the result itself was changed")
	}
}

func TestPart_AnnotationsOfAResultGoToTheirPlatforms(t *testing.T) {
	t.Parallel()
	legs := legsFor(t, "linux/amd64,linux/arm64")
	merged, err := Merge(legs, []*gwpb.Result{bare("a", nil), bare("b", nil)})
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"annotation.all", "annotation.ends/linux/arm64", "annotation-index.whole", "annotation-manifest[linux/arm64].one", "annotation[linux/amd64].two"} {
		merged.Metadata[k] = []byte("v")
	}
	for key, want := range map[string][]string{
		"linux/amd64": {"annotation-index.whole", "annotation.all", "annotation.ends/linux/arm64", "annotation[linux/amd64].two", "refs.platforms"},
		"linux/arm64": {"annotation-index.whole", "annotation-manifest[linux/arm64].one", "annotation.all", "annotation.ends/linux/arm64", "refs.platforms"},
	} {
		part, err := Part(merged, owned(key))
		if err != nil {
			t.Fatal(err)
		}
		wantEqual(t, key, slices.Sorted(maps.Keys(part.GetMetadata())), want)
	}
}

func TestPart_RefusesWhatNobodyCouldExport(t *testing.T) {
	t.Parallel()
	_, err := Part(several(map[string]string{"refs.platforms": "[]"}, "a"), owned("a"))
	wantRefusal(t, err, codes.InvalidArgument, "platforms")
	_, err = Part(several(nil, strings.Repeat("a", maxName+1)), owned())
	wantRefusal(t, err, codes.InvalidArgument, "256 bytes")
}

func TestRefs_ListsThoseOfAttestationsToo(t *testing.T) {
	t.Parallel()
	res := attested(several(nil, "a", "b", "empty="), "a", "att")
	res.Attestations["b"] = &gwpb.Attestations{Attestation: []*gwpb.Attestation{{}, nil}}
	res.Attestations["none"] = nil
	got := []string{}
	for _, ref := range Refs(res) {
		got = append(got, ref.GetId())
	}
	slices.Sort(got)
	wantEqual(t, "references", got, []string{"a", "att", "b"})
	if refs := Refs(nil); len(refs) != 0 {
		t.Errorf("of no result: %v", refs)
	}
}

func TestSingle(t *testing.T) {
	t.Parallel()
	for res, want := range map[*gwpb.Result]bool{
		nil:                                     true,
		bare("a", nil):                          true,
		several(nil, "a"):                       false,
		{Result: &gwpb.Result_RefDeprecated{}}:  true,
		{Result: &gwpb.Result_RefsDeprecated{}}: false,
	} {
		if got := Single(res); got != want {
			t.Errorf("%v: %t", res, got)
		}
	}
}
