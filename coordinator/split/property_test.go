package split

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"pgregory.net/rapid"
)

// spelling draws one of the ways in which clients write platforms.
var spelling = rapid.OneOf(
	rapid.SampledFrom([]string{
		"linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "linux/x86_64", "linux/386", "linux/arm64", "linux/arm64/v8", "linux/arm64/v9", "linux/aarch64",
		"linux/arm", "linux/arm/v5", "linux/arm/v6", "linux/arm/v7", "linux/arm/7", "linux/armhf", "linux/armel", "linux/s390x", "linux/ppc64le", "linux/riscv64",
		"windows/amd64", "windows(10.0.17763)/amd64", "windows(10.0.20348)/amd64", "freebsd/amd64", "Linux/AMD64",
	}),
	rapid.StringMatching(`[a-z][a-z0-9]{0,6}(\([0-9.]{1,9}\))?/[a-z][a-z0-9]{0,6}(/[a-z][a-z0-9]{0,3})?`),
)

func drawLegs(t *rapid.T) []Leg {
	list := strings.Join(rapid.SliceOfN(spelling, 1, 12).Draw(t, "platforms"), ",")
	legs, err := Legs(map[string]string{optPlatform: list})
	if err != nil {
		t.Fatalf("platforms %q: %v", list, err)
	}
	return legs
}

func TestLegs_PropertyEachPlatformOnceWhereItWasFirstAsked(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(spelling, 1, maxPlatforms).Draw(t, "platforms")
		legs, err := Legs(map[string]string{optPlatform: strings.Join(list, ",")})
		if err != nil {
			t.Fatal(err)
		}
		var want []string // by containerd's own notion of "the same"
		for _, name := range list {
			if p := platforms.FormatAll(platforms.Normalize(platforms.MustParse(name))); !slices.Contains(want, p) {
				want = append(want, p)
			}
		}
		if got := names(legs); !slices.Equal(got, want) {
			t.Fatalf("legs %q, want %q", got, want)
		}
		for _, l := range legs { // what the leg's worker is asked for is the leg again
			again, err := Legs(l.FrontendOpt(map[string]string{optPlatform: strings.Join(list, ","), optMultiPlatform: "true"}))
			if err != nil || len(again) != 1 || again[0].String() != l.String() {
				t.Fatalf("leg %s splits into %v, %v", l, names(again), err)
			}
		}
	})
}

// drawResult is what a leg's frontend returns, and how it looks in Part's output:
// the metadata that belongs to the platform has its key by then.
func drawResult(t *rapid.T, leg Leg, i int) (res *gwpb.Result, ref string, metadata map[string]string, attestations []string) {
	if rapid.Bool().Draw(t, "an image with content") {
		ref = fmt.Sprintf("ref-%d", i)
	}
	res = bare(ref, nil)
	if rapid.Bool().Draw(t, "in the old form") {
		res.Result = &gwpb.Result_RefDeprecated{RefDeprecated: ref}
	}
	metadata = map[string]string{}
	for _, k := range rapid.SliceOfDistinct(rapid.SampledFrom(perPlatform), rapid.ID).Draw(t, "metadata") {
		res.Metadata[k] = fmt.Appendf(nil, "%s of %d", k, i)
		metadata[k+"/"+leg.String()] = string(res.GetMetadata()[k])
	}
	n := rapid.IntRange(0, 3).Draw(t, "attestations")
	for j := range n {
		id := fmt.Sprintf("attestation-%d-%d", i, j)
		attestations = append(attestations, id)
		if res.GetAttestations() == nil {
			res.Attestations = map[string]*gwpb.Attestations{leg.String(): {}}
		}
		list := res.GetAttestations()[leg.String()]
		list.Attestation = append(list.GetAttestation(), &gwpb.Attestation{Ref: &gwpb.Ref{Id: id}})
	}
	return res, ref, metadata, attestations
}

func TestPart_PropertyGivesEachLegBackWhatItGaveToMerge(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		legs := drawLegs(t)
		results := make([]*gwpb.Result, len(legs))
		refs, metadata, attestations := make([]string, len(legs)), make([]map[string]string, len(legs)), make([][]string, len(legs))
		for i, l := range legs {
			results[i], refs[i], metadata[i], attestations[i] = drawResult(t, l, i)
		}
		merged, err := Merge(legs, results)
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range legs {
			part, err := Part(merged, func(key, ref string) bool { return key == l.String() && ref == refs[i] })
			if err != nil || part == nil {
				t.Fatalf("%s: part %v, %v", l, part, err)
			}
			checkPart(t, l, part, refs[i], metadata[i], attestations[i])
		}
	})
}

func checkPart(t *rapid.T, l Leg, part *gwpb.Result, ref string, metadata map[string]string, attestations []string) {
	got := part.GetRefs().GetRefs()
	if len(got) != 1 || got[l.String()] == nil || got[l.String()].GetId() != ref {
		t.Fatalf("%s: references %v, want %q", l, got, ref)
	}
	list, err := exptypes.ParsePlatforms(part.GetMetadata())
	if err != nil || len(list.Platforms) != 1 || list.Platforms[0].ID != l.String() || platforms.FormatAll(list.Platforms[0].Platform) != l.String() {
		t.Fatalf("%s: platforms %v, %v", l, list, err)
	}
	others := stringsOf(part.GetMetadata())
	delete(others, exptypes.ExporterPlatformsKey)
	if !maps.Equal(others, metadata) {
		t.Fatalf("%s: metadata %v, want %v", l, others, metadata)
	}
	var ids []string
	for key, list := range part.GetAttestations() {
		if key != l.String() {
			t.Fatalf("%s: has attestations of %s", l, key)
		}
		for _, a := range list.GetAttestation() {
			ids = append(ids, a.GetRef().GetId())
		}
	}
	if !slices.Equal(ids, attestations) {
		t.Fatalf("%s: attestations %v, want %v", l, ids, attestations)
	}
}

func repository(t *rapid.T, name string) string {
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	return named.Name()
}

func TestPlanExports_PropertyNoTagReachesALeg(t *testing.T) {
	t.Parallel()
	name := rapid.Custom(func(t *rapid.T) string {
		host := rapid.SampledFrom([]string{"", "registry.example/", "localhost:5000/", "docker.io/library/", "docker.io/"}).Draw(t, "host")
		repo := rapid.StringMatching(`[a-z]{1,5}(/[a-z]{1,5})?`).Draw(t, "repository")
		return host + repo + rapid.SampledFrom([]string{"", ":latest", ":v1", ":5000"}).Draw(t, "tag")
	})
	rapid.Check(t, func(t *rapid.T) {
		legs := drawLegs(t)
		list := rapid.SliceOfN(name, 1, 8).Draw(t, "names")
		plan, err := PlanExports([]*controlapi.Exporter{image("push=true", "name="+strings.Join(list, ","))}, legs)
		if err != nil {
			t.Fatal(err)
		}
		asked := map[string]bool{}
		for _, n := range list {
			asked[repository(t, n)] = true
		}
		for _, l := range legs {
			attrs := plan.Leg(l)[0].GetAttrs()
			if attrs["push-by-digest"] != "true" {
				t.Fatalf("%s does not push by digest: %v", l, attrs)
			}
			for repo := range strings.SplitSeq(attrs["name"], ",") {
				last := repo[strings.LastIndex(repo, "/")+1:]
				if strings.ContainsAny(last, ":@") {
					t.Fatalf("%s would push %s", l, repo)
				}
				if !asked[repository(t, repo)] {
					t.Fatalf("%s would push to %s, which is none of %q", l, repo, list)
				}
			}
		}
		if p, err := plan.Exports()[0].Publication(nil, index); err != nil || !slices.Equal(p.Names, list) {
			t.Fatalf("to be published: %q, %v", p.Names, err)
		}
	})
}
