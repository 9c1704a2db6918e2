package manifest

import (
	// The algorithms that a digest may name: go-digest takes only those that
	// are linked in.
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// The annotations by which an attestation manifest says what it is about
// (BuildKit, docs/attestations/attestation-storage.md).
const (
	referenceTypeKey    = "vnd.docker.reference.type"
	referenceDigestKey  = "vnd.docker.reference.digest"
	attestationManifest = "attestation-manifest"
)

// family is a pair of media types that go together.
type family struct{ index, image string }

var (
	oci = family{index: ocispecs.MediaTypeImageIndex, image: ocispecs.MediaTypeImageManifest}
	// docker is what oci-mediatypes=false gives.
	docker = family{
		index: "application/vnd.docker.distribution.manifest.list.v2+json",
		image: "application/vnd.docker.distribution.manifest.v2+json",
	}
	families = [...]family{oci, docker}
)

// contents is what an index holds, checked. Every image has a Platform.
type contents struct {
	family       family
	images       []ocispecs.Descriptor
	attestations []ocispecs.Descriptor
}

// Validate says whether blob is a sound index of one build: at most MaxBlob
// bytes of well-formed JSON, schemaVersion 2, one family of media types, at least
// one image manifest, each for a platform of its own, nothing nested, and every
// other entry an attestation of one of these images. It does not follow
// descriptors: that what they refer to exists is for the reader of a registry.
func Validate(blob []byte) error {
	if _, err := readIndex(blob); err != nil {
		return fmt.Errorf("the index is not sound: %w", err)
	}
	return nil
}

// readIndex decodes and checks an index.
func readIndex(blob []byte) (contents, error) {
	if len(blob) > MaxBlob {
		return contents{}, fmt.Errorf("%d bytes, at most %d are read", len(blob), MaxBlob)
	}
	// A document that is an index to one reader and a manifest to another is
	// an attack (GHSA-77vh-xpmg-72qh), so what a manifest has must be absent.
	var idx struct {
		ocispecs.Index
		Config json.RawMessage `json:"config"`
		Layers json.RawMessage `json:"layers"`
	}
	if err := json.Unmarshal(blob, &idx); err != nil {
		return contents{}, fmt.Errorf("malformed: %w", err)
	}
	switch {
	case idx.SchemaVersion != 2:
		return contents{}, fmt.Errorf("schemaVersion is %d, not 2", idx.SchemaVersion)
	case idx.Config != nil || idx.Layers != nil:
		return contents{}, errors.New("has config or layers as an image manifest does")
	case idx.Subject != nil || idx.ArtifactType != "":
		return contents{}, errors.New("is about a subject or an artifact, not a build")
	}
	for _, f := range families {
		if idx.MediaType == f.index {
			return sortEntries(idx.Manifests, f)
		}
	}
	return contents{}, fmt.Errorf("media type is %q, which is no index", idx.MediaType)
}

// sortEntries tells images from attestations and checks how they relate.
func sortEntries(entries []ocispecs.Descriptor, f family) (contents, error) {
	c := contents{family: f}
	known := make(map[digest.Digest]bool, len(entries))
	for _, d := range entries {
		if err := checkEntry(d, f); err != nil {
			return contents{}, err
		}
		switch kind, refers := d.Annotations[referenceTypeKey]; {
		case !refers:
			if d.Platform.OS == "unknown" || d.Platform.Architecture == "unknown" {
				return contents{}, fmt.Errorf("manifest %s is for no platform and does not say what it is about", d.Digest)
			}
			known[d.Digest] = true
			c.images = append(c.images, d)
		case kind == attestationManifest:
			c.attestations = append(c.attestations, d)
		default:
			return contents{}, fmt.Errorf("manifest %s refers to another as %q: only %s is known", d.Digest, kind, attestationManifest)
		}
	}
	if len(c.images) == 0 {
		return contents{}, errors.New("holds no image manifest")
	}
	for _, d := range c.attestations {
		if about := d.Annotations[referenceDigestKey]; !known[digest.Digest(about)] {
			return contents{}, fmt.Errorf("attestation manifest %s is about %q, which is no image manifest here", d.Digest, about)
		}
		if d.Platform.OS != "unknown" || d.Platform.Architecture != "unknown" {
			return contents{}, fmt.Errorf("attestation manifest %s is for %s: clients would run it as an image", d.Digest, name(*d.Platform))
		}
	}
	return c, distinctPlatforms(c.images)
}

// checkEntry says whether d is a descriptor of an image manifest of family f.
func checkEntry(d ocispecs.Descriptor, f family) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("manifest %q: %w", d.Digest, err)
	}
	for _, other := range families {
		if d.MediaType == other.index {
			return fmt.Errorf("manifest %s is an index: indexes do not nest", d.Digest)
		}
	}
	switch {
	case d.MediaType != f.image:
		return fmt.Errorf("manifest %s is of type %q, not %s", d.Digest, d.MediaType, f.image)
	case d.Size <= 0:
		return fmt.Errorf("manifest %s has a size of %d bytes", d.Digest, d.Size)
	case d.Platform == nil || d.Platform.OS == "" || d.Platform.Architecture == "":
		return fmt.Errorf("manifest %s has no platform", d.Digest)
	case d.Data != nil:
		return checkBlob(d, d.Data)
	}
	return nil
}

// checkBlob says whether blob is what d describes.
func checkBlob(d ocispecs.Descriptor, blob []byte) error {
	if err := d.Digest.Validate(); err != nil {
		return fmt.Errorf("descriptor digest %q: %w", d.Digest, err)
	}
	if len(blob) > MaxBlob {
		return fmt.Errorf("%s has %d bytes, at most %d are read", d.Digest, len(blob), MaxBlob)
	}
	if d.Size != int64(len(blob)) {
		return fmt.Errorf("%s has %d bytes, its descriptor says %d", d.Digest, len(blob), d.Size)
	}
	if got := d.Digest.Algorithm().FromBytes(blob); got != d.Digest {
		return fmt.Errorf("the content of %s has the digest %s: it was damaged or exchanged", d.Digest, got)
	}
	return nil
}

func distinctPlatforms(images []ocispecs.Descriptor) error {
	seen := make(map[string]bool, len(images))
	for _, d := range images {
		n := name(*d.Platform)
		if seen[n] {
			return fmt.Errorf("two image manifests are for %s", n)
		}
		seen[n] = true
	}
	return nil
}
