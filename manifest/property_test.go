package manifest_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	"github.com/archfarm/archfarm/manifest"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"
)

var someStrings = rapid.MapOfN(rapid.String(), rapid.String(), 0, 3)

// drawLegs draws legs for distinct platforms, as indexes or bare, with any
// number of attestations, in any order within the leg.
func drawLegs(t *rapid.T) []manifest.Leg {
	asked := rapid.SliceOfNDistinct(rapid.SampledFrom([]string{
		"linux/amd64", "linux/amd64/v3", "linux/arm64", "linux/arm/v7", "linux/arm/v6", "linux/s390x", "windows(10.0.1)/amd64", "darwin/arm64",
	}), 1, 8, rapid.ID).Draw(t, "platforms")
	legs := make([]manifest.Leg, len(asked))
	for i, platform := range asked {
		if rapid.Bool().Draw(t, "bare") {
			legs[i] = leg(platform, bare(ocispecs.MediaTypeImageManifest))
			legs[i].Descriptor.Annotations = rapid.MapOfN(rapid.StringMatching(`[a-z]{1,5}`), rapid.String(), 0, 2).Draw(t, "annotations")
			continue
		}
		d := image("image for "+platform, platform)
		all := []ocispecs.Descriptor{d}
		for n := range rapid.IntRange(0, 2).Draw(t, "attestations") {
			all = append(all, attestation(fmt.Sprint("attestation ", n, platform), d.Digest))
		}
		legs[i] = leg(platform, index(t, nil, rapid.Permutation(all).Draw(t, "order")...))
	}
	return legs
}

func drawAnnotations(t *rapid.T) manifest.Annotations {
	return manifest.Annotations{Index: someStrings.Draw(t, "index"), IndexDescriptor: someStrings.Draw(t, "descriptor")}
}

// split gives the images and what follows them.
func split(all []ocispecs.Descriptor) (images, attestations []ocispecs.Descriptor) {
	n := slices.IndexFunc(all, isAttestation)
	if n < 0 {
		n = len(all)
	}
	return all[:n], all[n:]
}

func isAttestation(d ocispecs.Descriptor) bool {
	return d.Annotations["vnd.docker.reference.type"] != ""
}

// contribution is what a leg adds, as comparable strings.
func contribution(t *rapid.T, l manifest.Leg) (image string, attestations []string) {
	if l.Descriptor.MediaType == ocispecs.MediaTypeImageManifest {
		d := l.Descriptor
		d.Platform = &l.Platform
		return text(t, d), nil
	}
	for _, d := range entries(t, l.Blob) {
		if isAttestation(d) {
			attestations = append(attestations, text(t, d))
		} else {
			image = text(t, d)
		}
	}
	return image, attestations
}

func text(t *rapid.T, d ocispecs.Descriptor) string {
	blob, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return string(blob)
}

func texts(t *rapid.T, all []ocispecs.Descriptor) (out []string) {
	for _, d := range all {
		out = append(out, text(t, d))
	}
	return out
}

func TestAssemble_EveryDescriptorOnceImagesFirstInAskedOrder(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		legs := drawLegs(t)
		var wantImages, wantAttestations []string
		for _, l := range legs {
			image, attestations := contribution(t, l)
			wantImages = append(wantImages, image)
			wantAttestations = append(wantAttestations, attestations...)
		}
		got, err := manifest.Assemble(legs, drawAnnotations(t))
		if err != nil {
			t.Fatal(err)
		}
		images, attestations := split(entries(t, got.Blob))
		if !slices.Equal(texts(t, images), wantImages) {
			t.Fatalf("images are\n%v\nwant\n%v", texts(t, images), wantImages)
		}
		if !slices.Equal(texts(t, attestations), wantAttestations) {
			t.Fatalf("attestations are\n%v\nwant\n%v", texts(t, attestations), wantAttestations)
		}
	})
}

func TestAssemble_IsSoundAndDescribed(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		got, err := manifest.Assemble(drawLegs(t), drawAnnotations(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := manifest.Validate(got.Blob); err != nil {
			t.Fatal(err)
		}
		if got.Descriptor.Digest != digest.FromBytes(got.Blob) || got.Descriptor.Size != int64(len(got.Blob)) {
			t.Fatalf("the descriptor is %+v", got.Descriptor)
		}
	})
}

func TestAssemble_PermutedLegsOnlyPermute(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		legs, a := drawLegs(t), drawAnnotations(t)
		one, err := manifest.Assemble(legs, a)
		if err != nil {
			t.Fatal(err)
		}
		two, err := manifest.Assemble(rapid.Permutation(legs).Draw(t, "permuted"), a)
		if err != nil {
			t.Fatal(err)
		}
		if len(one.Blob) != len(two.Blob) {
			t.Fatalf("%d bytes became %d", len(one.Blob), len(two.Blob))
		}
		x, y := texts(t, entries(t, one.Blob)), texts(t, entries(t, two.Blob))
		slices.Sort(x)
		slices.Sort(y)
		if !slices.Equal(x, y) {
			t.Fatalf("got\n%v\nand\n%v", x, y)
		}
	})
}

func TestAssemble_LeavesItsArgumentsAlone(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		legs, a := drawLegs(t), drawAnnotations(t)
		before := fmt.Sprintf("%#v %#v", legs, a)
		got, err := manifest.Assemble(legs, a)
		if err != nil {
			t.Fatal(err)
		}
		if got.Descriptor.Annotations != nil {
			got.Descriptor.Annotations["later"] = "x"
		}
		if _, leaked := a.IndexDescriptor["later"]; leaked || fmt.Sprintf("%#v %#v", legs, a) != before {
			t.Fatal("the arguments were changed")
		}
	})
}

func FuzzAssemble(f *testing.F) {
	good := leg("linux/amd64", index(f, nil, image("amd", "linux/amd64")))
	arm := image("arm", "linux/arm64")
	f.Add(index(f, nil, arm), "linux/arm64")
	f.Add(index(f, nil, arm, attestation("x", arm.Digest)), "linux/arm64")
	f.Add(bare(ocispecs.MediaTypeImageManifest), "linux/arm64")
	f.Add(bare(dockerManifest), "windows(10.0.1)/amd64")
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{}]}`), "linux/arm64")
	f.Fuzz(func(t *testing.T, blob []byte, platform string) {
		p, err := platforms.Parse(platform)
		if err != nil {
			return
		}
		hostile := manifest.Leg{Platform: p, Descriptor: describe(blob), Blob: blob}
		for _, legs := range [][]manifest.Leg{{hostile}, {good, hostile}} {
			got, err := manifest.Assemble(legs, manifest.Annotations{})
			if err != nil {
				continue
			}
			if err := manifest.Validate(got.Blob); err != nil {
				t.Fatalf("assembled %s: %v", got.Blob, err)
			}
			if got.Descriptor.Digest != digest.FromBytes(got.Blob) {
				t.Fatalf("the descriptor says %s", got.Descriptor.Digest)
			}
		}
	})
}

func FuzzValidate(f *testing.F) {
	amd := image("amd", "linux/amd64")
	f.Add(index(f, nil, amd, attestation("x", amd.Digest)))
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"` + dockerIndex + `","manifests":null}`))
	f.Add(bare(ocispecs.MediaTypeImageManifest))
	f.Fuzz(func(t *testing.T, blob []byte) {
		if manifest.Validate(blob) != nil {
			return
		}
		// What is sound stays so when it is written anew, if it is not too
		// large then.
		var idx ocispecs.Index
		if err := json.Unmarshal(blob, &idx); err != nil {
			t.Fatal(err)
		}
		again := index(t, func(i *ocispecs.Index) { i.MediaType = idx.MediaType }, idx.Manifests...)
		if len(again) <= manifest.MaxBlob {
			if err := manifest.Validate(again); err != nil {
				t.Fatalf("%s\nwritten anew: %v", blob, err)
			}
		}
	})
}
