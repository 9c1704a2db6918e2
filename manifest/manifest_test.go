package manifest_test

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/manifest"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// describe gives the descriptor of a blob, of the type that it says it has.
func describe(blob []byte) ocispecs.Descriptor {
	var of struct {
		MediaType string `json:"mediaType"`
	}
	_ = json.Unmarshal(blob, &of) // hostile blobs are described too
	return ocispecs.Descriptor{MediaType: of.MediaType, Digest: digest.FromBytes(blob), Size: int64(len(blob))}
}

func leg(platform string, blob []byte) manifest.Leg {
	return manifest.Leg{Platform: platforms.MustParse(platform), Descriptor: describe(blob), Blob: blob}
}

// image is a descriptor of an image manifest with some content of that name.
func image(content, platform string) ocispecs.Descriptor {
	p := platforms.MustParse(platform)
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromString(content), Size: int64(len(content)), Platform: &p}
}

func attestation(content string, about digest.Digest) ocispecs.Descriptor {
	d := image(content, "linux/amd64")
	d.Platform = &ocispecs.Platform{OS: "unknown", Architecture: "unknown"}
	d.Annotations = map[string]string{
		"vnd.docker.reference.type":   "attestation-manifest",
		"vnd.docker.reference.digest": about.String(),
	}
	return d
}

// index writes an index as BuildKit does. It is written apart from the package
// on purpose.
func index(t interface{ Fatal(...any) }, change func(*ocispecs.Index), entries ...ocispecs.Descriptor) []byte {
	idx := ocispecs.Index{MediaType: ocispecs.MediaTypeImageIndex, Manifests: entries}
	idx.SchemaVersion = 2
	if change != nil {
		change(&idx)
	}
	blob, err := json.MarshalIndent(idx, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// bare is an image manifest.
func bare(mediaType string) []byte {
	return []byte(`{"schemaVersion":2,"mediaType":"` + mediaType + `","config":{"mediaType":"` +
		ocispecs.MediaTypeImageConfig + `","digest":"` + digest.FromString("config").String() + `","size":2},"layers":[]}`)
}

func entries(t interface{ Fatal(...any) }, blob []byte) []ocispecs.Descriptor {
	var idx ocispecs.Index
	if err := json.Unmarshal(blob, &idx); err != nil {
		t.Fatal(err)
	}
	return idx.Manifests
}

func golden(t *testing.T, name string) []byte {
	t.Helper()
	blob, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return blob
}

// The files in testdata were written by buildkitd 0.34.2, for one Dockerfile and
// SOURCE_DATE_EPOCH: the indexes by builds for both platforms, the legs by builds
// for one.
func TestAssemble_WritesWhatOneBuildkitdWrites(t *testing.T) {
	t.Parallel()
	annotations := manifest.Annotations{
		Index:           map[string]string{"a.b": "x<y"},
		IndexDescriptor: map[string]string{"c": "d"},
	}
	provenance := golden(t, "index-provenance.json")
	parts := entries(t, provenance)
	for _, tc := range []struct {
		scenario, want string
		legs           []manifest.Leg
		annotations    manifest.Annotations
	}{
		{"indexes and annotations", "index-annotated.json", []manifest.Leg{
			leg("linux/amd64", golden(t, "leg-amd64.json")),
			leg("linux/arm64", golden(t, "leg-arm64.json")),
		}, annotations},
		{"bare manifests of docker's types", "index-docker.json", []manifest.Leg{
			leg("linux/amd64", golden(t, "manifest-docker-amd64.json")),
			leg("linux/arm64", golden(t, "manifest-docker-arm64.json")),
		}, manifest.Annotations{Index: map[string]string{}}},
		{"provenance", "index-provenance.json", []manifest.Leg{
			leg("linux/amd64", index(t, nil, parts[0], parts[2])),
			leg("linux/arm64", index(t, nil, parts[1], parts[3])),
		}, manifest.Annotations{}},
	} {
		t.Run(tc.scenario, func(t *testing.T) {
			t.Parallel()
			got, err := manifest.Assemble(tc.legs, tc.annotations)
			if err != nil {
				t.Fatal(err)
			}
			want := golden(t, tc.want)
			if string(got.Blob) != string(want) {
				t.Fatalf("got\n%s\nwant\n%s", got.Blob, want)
			}
			d := describe(want)
			if got.Descriptor.Digest != d.Digest || got.Descriptor.Size != d.Size || got.Descriptor.MediaType != d.MediaType ||
				!maps.Equal(got.Descriptor.Annotations, tc.annotations.IndexDescriptor) {
				t.Errorf("the descriptor is %+v", got.Descriptor)
			}
			if err := manifest.Validate(want); err != nil {
				t.Errorf("what BuildKit wrote: %v", err)
			}
		})
	}
}

func TestAssemble_BareManifestKeepsItsDescriptor(t *testing.T) {
	t.Parallel()
	l := leg("linux/arm64", bare(ocispecs.MediaTypeImageManifest))
	l.Descriptor.Annotations = map[string]string{"config.digest": "sha256:abc", "mine": "kept"}
	got, err := manifest.Assemble([]manifest.Leg{l}, manifest.Annotations{})
	if err != nil {
		t.Fatal(err)
	}
	d := entries(t, got.Blob)[0]
	if !maps.Equal(d.Annotations, map[string]string{"mine": "kept"}) || d.Platform.Architecture != "arm64" {
		t.Errorf("the entry is %+v", d)
	}
	if len(l.Descriptor.Annotations) != 2 || l.Descriptor.Platform != nil {
		t.Errorf("the leg was changed: %+v", l.Descriptor)
	}
}

func TestAssemble_PlatformsAreTheSameInAnySpelling(t *testing.T) {
	t.Parallel()
	windows := image("w", "windows/amd64")
	windows.Platform.OSVersion = "10.0.20348.1"
	for _, tc := range []struct {
		asked ocispecs.Platform
		image ocispecs.Descriptor
	}{
		{ocispecs.Platform{OS: "linux", Architecture: "aarch64"}, image("a", "linux/arm64")},
		{ocispecs.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, image("a", "linux/arm64")},
		{ocispecs.Platform{OS: "linux", Architecture: "arm"}, image("a", "linux/arm/v7")},
		{ocispecs.Platform{OS: "windows", Architecture: "amd64"}, windows},
	} {
		blob := index(t, nil, tc.image)
		got, err := manifest.Assemble([]manifest.Leg{{Platform: tc.asked, Descriptor: describe(blob), Blob: blob}}, manifest.Annotations{})
		if err != nil {
			t.Errorf("%+v: %v", tc.asked, err)
			continue
		}
		if !slices.Equal(got.Blob, blob) {
			t.Errorf("%+v: the entry was changed:\n%s", tc.asked, got.Blob)
		}
	}
}

func TestAssemble_RefusesAndSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	arm := image("arm", "linux/arm64")
	good := leg("linux/amd64", index(t, nil, image("amd", "linux/amd64")))
	other := func(change func(*manifest.Leg)) manifest.Leg {
		l := leg("linux/arm64", index(t, nil, arm))
		change(&l)
		return l
	}
	for _, tc := range []struct {
		scenario string
		leg      manifest.Leg
		want     []string
	}{
		{"content exchanged", other(func(l *manifest.Leg) {
			l.Blob = []byte(strings.Replace(string(l.Blob), "arm64", "amd64", 1))
		}), []string{"linux/arm64", "damaged or exchanged"}},
		{"content cut off", other(func(l *manifest.Leg) { l.Blob = l.Blob[:20] }), []string{"linux/arm64", "20 bytes"}},
		{"no content", other(func(l *manifest.Leg) { l.Blob = nil }), []string{"linux/arm64", "0 bytes"}},
		{"no digest", other(func(l *manifest.Leg) { l.Descriptor.Digest = "" }), []string{"linux/arm64", "digest"}},
		{"unknown digest algorithm", other(func(l *manifest.Leg) { l.Descriptor.Digest = "md5:d41d8cd98f00b204e9800998ecf8427e" }),
			[]string{"linux/arm64", "md5"}},
		{"a config where an index is due", other(func(l *manifest.Leg) { l.Descriptor.MediaType = ocispecs.MediaTypeImageConfig }),
			[]string{"linux/arm64", "neither an index nor an image manifest"}},
		{"types of index and descriptor differ", other(func(l *manifest.Leg) { l.Descriptor.MediaType = dockerIndex }),
			[]string{"linux/arm64", "its descriptor says"}},
		{"no platform asked", other(func(l *manifest.Leg) { l.Platform = ocispecs.Platform{} }), []string{"not complete"}},
		{"another platform", leg("linux/s390x", index(t, nil, arm)), []string{"leg linux/s390x", "is for linux/arm64"}},
		{"another variant", leg("linux/arm/v6", index(t, nil, image("a", "linux/arm/v7"))), []string{"linux/arm/v6", "is for linux/arm/v7"}},
		{"another windows", leg("windows(10.0.1)/amd64", index(t, nil, image("a", "windows(10.0.2)/amd64"))), []string{"is for windows(10.0.2)/amd64"}},
		{"two images", leg("linux/arm64", index(t, nil, arm, image("b", "linux/s390x"))), []string{"linux/arm64", "2 image manifests"}},
		{"the platform twice", leg("linux/amd64", index(t, nil, image("b", "linux/amd64"))), []string{"two", "linux/amd64"}},
		{"docker's types beside oci's", leg("linux/arm64", bare(dockerManifest)), []string{"linux/arm64", "linux/amd64", "oci-mediatypes"}},
		{"attestation of another leg's image", leg("linux/arm64", index(t, nil, arm, attestation("x", image("amd", "linux/amd64").Digest))),
			[]string{"linux/arm64", "attestation manifest", "no image manifest here"}},
		{"bare manifest that is also an index", leg("linux/arm64", []byte(strings.Replace(
			string(bare(ocispecs.MediaTypeImageManifest)), `{`, `{"manifests":[],`, 1))), []string{"linux/arm64", "as an index does"}},
		{"bare manifest without a config", leg("linux/arm64", []byte(`{"schemaVersion":2,"mediaType":"`+ocispecs.MediaTypeImageManifest+`"}`)),
			[]string{"linux/arm64", "config digest"}},
		{"bare manifest of schema 1", leg("linux/arm64", []byte(`{"schemaVersion":1,"mediaType":"`+ocispecs.MediaTypeImageManifest+`"}`)),
			[]string{"linux/arm64", "schemaVersion is 1"}},
		{"bare manifest that is malformed", manifest.Leg{Platform: platforms.MustParse("linux/arm64"), Blob: []byte("{"),
			Descriptor: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromString("{"), Size: 1}},
			[]string{"linux/arm64", "malformed"}},
		{"bare manifest for another platform", func() manifest.Leg {
			l := leg("linux/arm64", bare(ocispecs.MediaTypeImageManifest))
			l.Descriptor.Platform = &ocispecs.Platform{OS: "linux", Architecture: "riscv64"}
			return l
		}(), []string{"leg linux/arm64", "is for linux/riscv64"}},
		{"bare attestation", func() manifest.Leg {
			l := leg("linux/arm64", bare(ocispecs.MediaTypeImageManifest))
			l.Descriptor.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
			return l
		}(), []string{"linux/arm64", "no image manifest"}},
	} {
		t.Run(tc.scenario, func(t *testing.T) {
			t.Parallel()
			_, err := manifest.Assemble([]manifest.Leg{good, tc.leg}, manifest.Annotations{})
			requireError(t, err, tc.want...)
		})
	}
}

func TestAssemble_NoLegs(t *testing.T) {
	t.Parallel()
	_, err := manifest.Assemble(nil, manifest.Annotations{})
	requireError(t, err, "no legs")
}

func TestAssemble_DockerListTakesNoAnnotations(t *testing.T) {
	t.Parallel()
	for _, a := range []manifest.Annotations{
		{Index: map[string]string{"a": "b"}},
		{IndexDescriptor: map[string]string{"a": "b"}},
	} {
		_, err := manifest.Assemble([]manifest.Leg{leg("linux/arm64", bare(dockerManifest))}, a)
		requireError(t, err, "oci-mediatypes=true")
	}
}

func TestAssemble_NothingThatNoRegistryTakes(t *testing.T) {
	t.Parallel()
	l := leg("linux/arm64", index(t, nil, image("a", "linux/arm64")))
	_, err := manifest.Assemble([]manifest.Leg{l}, manifest.Annotations{Index: map[string]string{"a": strings.Repeat("x", manifest.MaxBlob)}})
	requireError(t, err, "registries take 4194304")

	large := append(slices.Clone(l.Blob), make([]byte, manifest.MaxBlob)...)
	_, err = manifest.Assemble([]manifest.Leg{{Platform: l.Platform, Blob: large,
		Descriptor: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromBytes(large), Size: int64(len(large))}}},
		manifest.Annotations{})
	requireError(t, err, "linux/arm64", "at most 4194304")
	requireError(t, manifest.Validate(large), "at most 4194304")
}

func requireError(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one about %q", want)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%q does not say %q", err, w)
		}
	}
}

// A client that runs the frontend itself may have one leg build several platforms, between which others stand.
func TestAssemble_PlacesTheImagesOfALegThatHasSeveral(t *testing.T) {
	t.Parallel()
	a, b, c := image("a", "linux/amd64"), image("b", "linux/arm64"), image("c", "linux/386")
	ofA, ofB, ofC := attestation("of a", a.Digest), attestation("of b", b.Digest), attestation("of c", c.Digest)
	two, one := index(t, nil, a, c, ofA, ofC), index(t, nil, b, ofB)
	legs := []manifest.Leg{
		{Platform: *a.Platform, Further: []ocispecs.Platform{*c.Platform}, Positions: []int{0, 2}, Descriptor: describe(two), Blob: two},
		{Platform: *b.Platform, Positions: []int{1}, Descriptor: describe(one), Blob: one},
	}
	got, err := manifest.Assemble(legs, manifest.Annotations{})
	if err != nil {
		t.Fatal(err)
	}
	var whole ocispecs.Index
	if err := json.Unmarshal(got.Blob, &whole); err != nil {
		t.Fatal(err)
	}
	want := []digest.Digest{a.Digest, b.Digest, c.Digest, ofA.Digest, ofB.Digest, ofC.Digest}
	for i, d := range whole.Manifests {
		if i >= len(want) || d.Digest != want[i] {
			t.Errorf("manifest %d is %s of %v", i, d.Digest, want)
		}
	}
	legs[0].Further = nil
	if _, err := manifest.Assemble(legs, manifest.Annotations{}); err == nil {
		t.Error("a leg with more images than platforms was assembled")
	}
}
