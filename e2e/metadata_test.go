package e2e_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// metadata is what these tests read of a --metadata-file.
type metadata struct {
	Digest       string             `json:"containerimage.digest"`
	ConfigDigest string             `json:"containerimage.config.digest"`
	Descriptor   ocispec.Descriptor `json:"containerimage.descriptor"`
	ImageName    string             `json:"image.name"`
	BuildRef     string             `json:"buildx.build.ref"`

	all map[string]json.RawMessage
}

func readMetadata(t *testing.T, file string) metadata {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var m metadata
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	if err := json.Unmarshal(raw, &m.all); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	return m
}

func TestMetadata_FileAndIidfileNameTheIndex(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	out := farmtest.Folder(t)
	file, iid := filepath.Join(out, "metadata.json"), filepath.Join(out, "iid")
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), "-t", r.ref("v2"),
		"--metadata-file", file, "--iidfile", iid, r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	m := readMetadata(t, file)
	wantEqual(t, "containerimage.digest", m.Digest, index.Digest.String())
	wantEqual(t, "--iidfile", readFile(t, out, "iid"), index.Digest.String())
	wantEqual(t, "descriptor's digest", m.Descriptor.Digest, index.Digest)
	wantEqual(t, "descriptor's size", m.Descriptor.Size, int64(len(index.Raw)))
	wantEqual(t, "descriptor's media type", m.Descriptor.MediaType, index.MediaType)
	wantEqual(t, "image.name", m.ImageName, r.ref("v1")+","+r.ref("v2"))
	wantEqual(t, "containerimage.config.digest, which several platforms do not have", m.ConfigDigest, "")
	if m.BuildRef == "" {
		t.Error("no buildx.build.ref in the metadata")
	}
	for _, platform := range []string{"linux/amd64", "linux/arm64"} {
		if provenance := m.all["buildx.build.provenance/"+platform]; len(provenance) < 100 {
			t.Errorf("no provenance for %s in the metadata: %s", platform, provenance)
		}
	}
}

func TestMetadata_OnePlatformNamesItsConfigurationToo(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	out := farmtest.Folder(t)
	file := filepath.Join(out, "metadata.json")
	r.Client.Build(t, "--platform", "linux/arm64", "--provenance=false", "--push", "-t", r.ref("v1"),
		"--metadata-file", file, "--iidfile", filepath.Join(out, "iid"), r.legsContext(t))
	single := r.registry.Index(t, r.repo, "v1")
	m := readMetadata(t, file)
	wantEqual(t, "containerimage.digest", m.Digest, single.Digest.String())
	image := r.registry.Image(t, r.repo, farmtest.Descriptor(single))
	wantEqual(t, "containerimage.config.digest", m.ConfigDigest, image.Manifest.Config.Digest.String())
	wantEqual(t, "--iidfile", readFile(t, out, "iid"), image.Manifest.Config.Digest.String())
}

func TestProvenance_OnKeepsBothAttestationManifests(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Client.Build(t, "--platform", both, "--provenance=mode=max", "--push", "-t", r.ref("v1"), r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	if len(index.Manifests) != 4 || farmtest.IsAttestation(index.Manifests[0]) || farmtest.IsAttestation(index.Manifests[1]) {
		t.Fatalf("want two images, then their two attestation manifests:\n%s", index.Raw)
	}
	var described []string
	for i, desc := range index.Manifests[2:] {
		if !farmtest.IsAttestation(desc) || farmtest.PlatformName(desc.Platform) != "unknown/unknown" {
			t.Errorf("manifest %d is not an attestation manifest: %+v", i+2, desc)
			continue
		}
		described = append(described, desc.Annotations["vnd.docker.reference.digest"])
		r.checkProvenance(t, desc)
	}
	wantList(t, "described images", described, index.Manifests[0].Digest.String(), index.Manifests[1].Digest.String())
}

// checkProvenance checks that an attestation manifest's statement is about its image and names the platform of the
// machine that built it: amd64 for every leg here, on the worker that was told to be arm64 too.
func (r rig) checkProvenance(t *testing.T, desc ocispec.Descriptor) {
	t.Helper()
	manifest := r.registry.Manifest(t, r.repo, desc.Digest)
	if len(manifest.Layers) != 1 {
		t.Fatalf("attestation manifest %s has %d statements, want the provenance", desc.Digest, len(manifest.Layers))
	}
	raw := r.registry.Blob(t, r.repo, manifest.Layers[0])
	var statement struct {
		PredicateType string `json:"predicateType"`
		Subject       []struct {
			Digest map[string]string `json:"digest"`
		} `json:"subject"`
		Predicate struct {
			BuildDefinition struct {
				InternalParameters struct {
					BuilderPlatform string `json:"builderPlatform"`
				} `json:"internalParameters"`
			} `json:"buildDefinition"`
		} `json:"predicate"`
	}
	if err := json.Unmarshal(raw, &statement); err != nil {
		t.Fatalf("%v: %s", err, raw)
	}
	if !strings.HasPrefix(statement.PredicateType, "https://slsa.dev/provenance/v1") {
		t.Errorf("predicate type %q is not SLSA provenance 1", statement.PredicateType)
	}
	subject := digest.Digest(desc.Annotations["vnd.docker.reference.digest"])
	if len(statement.Subject) == 0 || statement.Subject[0].Digest["sha256"] != subject.Encoded() {
		t.Errorf("the provenance's subject %v is not its image %s", statement.Subject, subject)
	}
	wantEqual(t, "builder platform", statement.Predicate.BuildDefinition.InternalParameters.BuilderPlatform, "linux/amd64")
	if strings.Contains(string(raw), "multi-platform") {
		t.Errorf("the split leaks into the provenance: %s", raw)
	}
}

func TestProvenance_OffLeavesOnlyImages(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.Client.Build(t, "--platform", both, "--provenance=false", "--push", "-t", r.ref("v1"), r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	if len(index.Manifests) != 2 || slices.ContainsFunc(index.Manifests, farmtest.IsAttestation) {
		t.Errorf("want two images and nothing else:\n%s", index.Raw)
	}
	wantList(t, "platforms", index.Platforms(), "linux/amd64", "linux/arm64")
}

func TestAnnotations_LandWhereTheyWereAskedFor(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	file := filepath.Join(farmtest.Folder(t), "metadata.json")
	r.Client.Build(t, "--platform", both, "--push", "-t", r.ref("v1"), "--metadata-file", file,
		"--annotation", "index:on=index", "--annotation", "index-descriptor:on=index descriptor",
		"--annotation", "manifest:on=every manifest", "--annotation", "manifest[linux/amd64]:amd=this manifest",
		"--annotation", "manifest-descriptor:on=every descriptor",
		"--annotation", "manifest-descriptor[linux/arm64]:arm=this descriptor", r.legsContext(t))
	index := r.registry.Index(t, r.repo, "v1")
	wantEqual(t, "index", index.Annotations["on"], "index")
	amd, arm := index.For(t, "linux/amd64"), index.For(t, "linux/arm64")
	wantEqual(t, "amd64's descriptor", amd.Annotations["on"], "every descriptor")
	wantEqual(t, "arm64's descriptor", arm.Annotations["on"], "every descriptor")
	wantEqual(t, "arm64's descriptor alone", arm.Annotations["arm"], "this descriptor")
	wantEqual(t, "amd64's descriptor without arm64's", amd.Annotations["arm"], "")
	amdManifest, armManifest := r.registry.Manifest(t, r.repo, amd.Digest), r.registry.Manifest(t, r.repo, arm.Digest)
	wantEqual(t, "amd64's manifest", amdManifest.Annotations["on"], "every manifest")
	wantEqual(t, "arm64's manifest", armManifest.Annotations["on"], "every manifest")
	wantEqual(t, "amd64's manifest alone", amdManifest.Annotations["amd"], "this manifest")
	wantEqual(t, "arm64's manifest without amd64's", armManifest.Annotations["amd"], "")
	wantEqual(t, "index descriptor", readMetadata(t, file).Descriptor.Annotations["on"], "index descriptor")
}
