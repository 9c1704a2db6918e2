package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// configDigestKey is an annotation by which BuildKit's image writer tells its
// exporter the digest of a bare manifest's config. It is no part of an index.
const configDigestKey = "config.digest"

// readLeg checks a leg and returns the one image and the attestations it holds.
func readLeg(leg Leg) (contents, error) {
	if len(leg.Further) > 0 && slices.ContainsFunc([]string{oci.image, docker.image}, func(t string) bool { return t == leg.Descriptor.MediaType }) {
		return contents{}, fmt.Errorf("%s is one image manifest, the leg has %d", leg.Descriptor.Digest, len(leg.Further)+1)
	}
	if leg.Platform.OS == "" || leg.Platform.Architecture == "" {
		return contents{}, fmt.Errorf("the platform asked for, %+v, is not complete", leg.Platform)
	}
	if err := checkBlob(leg.Descriptor, leg.Blob); err != nil {
		return contents{}, err
	}
	for _, f := range families {
		switch leg.Descriptor.MediaType {
		case f.image:
			return readBareLeg(leg, f)
		case f.index:
			return readIndexLeg(leg, f)
		}
	}
	return contents{}, fmt.Errorf("%s is of type %q, which is neither an index nor an image manifest",
		leg.Descriptor.Digest, leg.Descriptor.MediaType)
}

func readIndexLeg(leg Leg, f family) (contents, error) {
	c, err := readIndex(leg.Blob)
	if err != nil {
		return contents{}, fmt.Errorf("index %s: %w", leg.Descriptor.Digest, err)
	}
	if c.family != f {
		return contents{}, fmt.Errorf("index %s says that it is of type %s, its descriptor says %s",
			leg.Descriptor.Digest, c.family.index, f.index)
	}
	asked := append([]ocispecs.Platform{leg.Platform}, leg.Further...)
	if len(c.images) != len(asked) {
		return contents{}, fmt.Errorf("index %s holds %d image manifests, the leg has %d", leg.Descriptor.Digest, len(c.images), len(asked))
	}
	if leg.Positions != nil && len(leg.Positions) != len(asked) {
		return contents{}, fmt.Errorf("%d positions for %d images", len(leg.Positions), len(asked))
	}
	for i, p := range asked {
		if err := checkPlatform(p, c.images[i]); err != nil {
			return contents{}, err
		}
	}
	return c, nil
}

func readBareLeg(leg Leg, f family) (contents, error) {
	d := leg.Descriptor
	if err := checkManifest(leg.Blob, f); err != nil {
		return contents{}, fmt.Errorf("image manifest %s: %w", d.Digest, err)
	}
	if d.Platform == nil {
		p := platforms.Normalize(leg.Platform)
		d.Platform = &p
	}
	d.Annotations = maps.Clone(d.Annotations)
	delete(d.Annotations, configDigestKey)
	c, err := sortEntries([]ocispecs.Descriptor{d}, f)
	if err != nil {
		return contents{}, err
	}
	return c, checkPlatform(leg.Platform, d)
}

// checkManifest says whether blob is an image manifest of family f. It does not
// follow what the manifest refers to.
func checkManifest(blob []byte, f family) error {
	var m struct {
		ocispecs.Manifest
		Manifests json.RawMessage `json:"manifests"`
	}
	if err := json.Unmarshal(blob, &m); err != nil {
		return fmt.Errorf("malformed: %w", err)
	}
	switch {
	case m.SchemaVersion != 2:
		return fmt.Errorf("schemaVersion is %d, not 2", m.SchemaVersion)
	case m.MediaType != f.image:
		return fmt.Errorf("says that it is of type %q, its descriptor says %s", m.MediaType, f.image)
	case m.Manifests != nil:
		return errors.New("has manifests as an index does")
	}
	if err := m.Config.Digest.Validate(); err != nil {
		return fmt.Errorf("config digest %q: %w", m.Config.Digest, err)
	}
	return nil
}

// checkPlatform says whether the image is for the platform that was asked for.
// A version or features of the operating system count only when they were asked
// for: BuildKit takes them over from a Windows base image.
func checkPlatform(asked ocispecs.Platform, image ocispecs.Descriptor) error {
	want, got := platforms.Normalize(asked), platforms.Normalize(*image.Platform)
	same := want.OS == got.OS && want.Architecture == got.Architecture && want.Variant == got.Variant &&
		(want.OSVersion == "" || want.OSVersion == got.OSVersion) &&
		(len(want.OSFeatures) == 0 || slices.Equal(want.OSFeatures, got.OSFeatures))
	if !same {
		return fmt.Errorf("image manifest %s is for %s", image.Digest, name(*image.Platform))
	}
	return nil
}
