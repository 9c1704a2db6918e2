// Package manifest turns what the legs of a build exported into one image
// index, byte for byte the one that a single buildkitd building every platform
// would have written (BuildKit, exporter/containerimage/writer.go, Commit).
//
// It is pure: values in, values out, no I/O. What comes in was written by a
// worker or read back from a registry, so all of it is checked, and an error
// names the platform and the thing that is wrong.
package manifest

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxBlob is the largest manifest or index, in bytes, that this package reads
// or writes. Registries refuse larger ones: 4 MiB is what the distribution
// specification asks of them and what distribution/distribution enforces.
const MaxBlob = 4 << 20

// Leg is what one platform's share of a build exported.
type Leg struct {
	// Platform is the platform that was asked for.
	Platform ocispecs.Platform
	// Descriptor is the one that the leg's exporter reported.
	Descriptor ocispecs.Descriptor
	// Blob is the content behind Descriptor: an index that holds one image
	// manifest and its attestation manifests, or a bare image manifest.
	Blob []byte
	// Further are the platforms of further images, in the order of the leg's index:
	// a client that runs the frontend itself may have several built by one leg.
	Further []ocispecs.Platform
	// Positions tell where the leg's images stand in the whole, one each; nil for the
	// order of the legs.
	Positions []int
}

// Annotations are the ones that belong to the index as a whole, which no leg
// can carry. Those on manifests and on their descriptors come with the legs.
type Annotations struct {
	// Index is written into the index.
	Index map[string]string
	// IndexDescriptor goes on the descriptor that refers to the index.
	IndexDescriptor map[string]string
}

// Index is an assembled index and the descriptor that refers to it.
type Index struct {
	Descriptor ocispecs.Descriptor
	Blob       []byte
}

// Assemble joins the legs into one index: the image manifests in the order of
// legs, then the attestation manifests in the same order. A leg that is an index
// contributes its manifests; a bare manifest is referred to by the leg's own
// descriptor, with Platform set.
//
// Annotations of the legs' own indexes are not carried over: those of the whole
// build are in a. As in BuildKit, an index of Docker's media types has none.
//
// It fails when a leg's blob does not match its descriptor, is malformed or
// larger than MaxBlob, is for another platform than asked, nests an index, holds
// an attestation of something else, or when two legs are for one platform or
// differ in their media types. One leg is fine, and gives an index of one image.
func Assemble(legs []Leg, a Annotations) (Index, error) {
	if len(legs) == 0 {
		return Index{}, errors.New("assembling the index: there are no legs")
	}
	parts := make([]contents, len(legs))
	for i, leg := range legs {
		part, err := readLeg(leg)
		if err != nil {
			return Index{}, fmt.Errorf("assembling the index: leg %s: %w", name(leg.Platform), err)
		}
		parts[i] = part
	}
	whole, err := join(legs, parts)
	if err != nil {
		return Index{}, fmt.Errorf("assembling the index: %w", err)
	}
	return encode(whole, a)
}

// placed is a manifest, and where it or the image that it is about stands.
type placed struct {
	at         int
	descriptor ocispecs.Descriptor
}

// join puts the legs' manifests in the order of the index.
func join(legs []Leg, parts []contents) (contents, error) {
	whole := contents{family: parts[0].family}
	var images, attestations []placed
	for i, part := range parts {
		if part.family != whole.family {
			return contents{}, fmt.Errorf("leg %s has manifests of type %s, leg %s of type %s: export all with the same oci-mediatypes",
				name(legs[0].Platform), whole.family.image, name(legs[i].Platform), part.family.image)
		}
		position := map[digest.Digest]int{}
		for j, d := range part.images {
			at := len(images)
			if legs[i].Positions != nil {
				at = legs[i].Positions[j]
			}
			position[d.Digest] = at
			images = append(images, placed{at, d})
		}
		for _, d := range part.attestations {
			attestations = append(attestations, placed{position[digest.Digest(d.Annotations[referenceDigestKey])], d})
		}
	}
	whole.images, whole.attestations = inOrder(images), inOrder(attestations)
	return whole, distinctPlatforms(whole.images)
}

func inOrder(list []placed) []ocispecs.Descriptor {
	slices.SortStableFunc(list, func(a, b placed) int { return cmp.Compare(a.at, b.at) })
	var out []ocispecs.Descriptor
	for _, p := range list {
		out = append(out, p.descriptor)
	}
	return out
}

// encode writes the index as BuildKit does: two spaces of indentation, HTML
// characters escaped, no newline at the end, empty annotations left out.
func encode(c contents, a Annotations) (Index, error) {
	if c.family == docker && len(a.Index)+len(a.IndexDescriptor) > 0 {
		return Index{}, errors.New("assembling the index: a Docker manifest list has no annotations: export with oci-mediatypes=true")
	}
	blob, err := json.MarshalIndent(ocispecs.Index{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   c.family.index,
		Manifests:   append(c.images, c.attestations...),
		Annotations: a.Index,
	}, "", "  ")
	if err != nil {
		return Index{}, fmt.Errorf("assembling the index: %w", err)
	}
	if len(blob) > MaxBlob {
		return Index{}, fmt.Errorf("assembling the index: it has %d bytes, registries take %d", len(blob), MaxBlob)
	}
	return Index{
		Descriptor: ocispecs.Descriptor{
			MediaType:   c.family.index,
			Digest:      digest.FromBytes(blob),
			Size:        int64(len(blob)),
			Annotations: maps.Clone(a.IndexDescriptor),
		},
		Blob: blob,
	}, nil
}

// name is how a platform is written in errors, and what makes two platforms one.
func name(p ocispecs.Platform) string {
	return platforms.FormatAll(platforms.Normalize(p))
}
