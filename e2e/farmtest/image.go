package farmtest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const acceptManifests = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, " +
	"application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json"

// Index is what a tag points at: an index, or the one manifest of an image for one platform.
type Index struct {
	ocispec.Index
	Repo   string
	Digest digest.Digest
	Raw    []byte
}

// Tags lists a repository's tags, in order; none for a repository that does not exist.
func (r *Registry) Tags(t T, repo string) []string {
	t.Helper()
	body, status := r.get(t, "/v2/"+repo+"/tags/list")
	if status == http.StatusNotFound {
		return nil
	}
	var list struct {
		Tags []string `json:"tags"`
	}
	if err := json.Unmarshal(body, &list); status != http.StatusOK || err != nil {
		t.Fatalf("listing the tags of %s: status %d, %v: %s", repo, status, err, body)
	}
	slices.Sort(list.Tags)
	return list.Tags
}

// Index reads what a tag or digest points at, and fails the test when there is nothing.
func (r *Registry) Index(t T, repo, reference string) Index {
	t.Helper()
	raw := r.mustGet(t, "/v2/"+repo+"/manifests/"+reference)
	index := Index{Repo: repo, Digest: digest.FromBytes(raw), Raw: raw}
	if err := json.Unmarshal(raw, &index.Index); err != nil {
		t.Fatalf("reading the index %s:%s: %v: %s", repo, reference, err, raw)
	}
	return index
}

// Manifest reads an image's manifest by its digest.
func (r *Registry) Manifest(t T, repo string, dgst digest.Digest) ocispec.Manifest {
	t.Helper()
	raw := r.mustGet(t, "/v2/"+repo+"/manifests/"+dgst.String())
	if got := digest.FromBytes(raw); got != dgst {
		t.Fatalf("manifest %s of %s has the digest %s", dgst, repo, got)
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(raw, &manifest); err != nil {
		t.Fatalf("reading the manifest %s of %s: %v", dgst, repo, err)
	}
	return manifest
}

// Blob reads a blob and checks its digest and size.
func (r *Registry) Blob(t T, repo string, desc ocispec.Descriptor) []byte {
	t.Helper()
	raw := r.mustGet(t, "/v2/"+repo+"/blobs/"+desc.Digest.String())
	if got := digest.FromBytes(raw); got != desc.Digest || int64(len(raw)) != desc.Size {
		t.Fatalf("blob %s of %s: got %d bytes with digest %s, want %d", desc.Digest, repo, len(raw), got, desc.Size)
	}
	return raw
}

// Image is one platform's image: its manifest, configuration, and files.
type Image struct {
	Descriptor ocispec.Descriptor
	Manifest   ocispec.Manifest
	Config     ocispec.Image
	Files      map[string]string // regular files by their path without the leading slash
}

// Image reads everything about one image of an index.
func (r *Registry) Image(t T, repo string, desc ocispec.Descriptor) Image {
	t.Helper()
	image := Image{Descriptor: desc, Manifest: r.Manifest(t, repo, desc.Digest), Files: map[string]string{}}
	if err := json.Unmarshal(r.Blob(t, repo, image.Manifest.Config), &image.Config); err != nil {
		t.Fatalf("reading the configuration of %s: %v", desc.Digest, err)
	}
	for _, layer := range image.Manifest.Layers {
		if err := readLayer(r.Blob(t, repo, layer), image.Files); err != nil {
			t.Fatalf("reading the layer %s of %s: %v", layer.Digest, desc.Digest, err)
		}
	}
	return image
}

// Platforms names the platforms of an index's images, in its order, without attestations.
func (i Index) Platforms() []string {
	var names []string
	for _, desc := range i.Manifests {
		if !IsAttestation(desc) {
			names = append(names, PlatformName(desc.Platform))
		}
	}
	return names
}

// For returns the descriptor of the image for a platform, and fails the test when the index has none.
func (i Index) For(t T, platform string) ocispec.Descriptor {
	t.Helper()
	for _, desc := range i.Manifests {
		if !IsAttestation(desc) && PlatformName(desc.Platform) == platform {
			return desc
		}
	}
	t.Fatalf("the index %s of %s has no %s:\n%s", i.Digest, i.Repo, platform, i.Raw)
	return ocispec.Descriptor{}
}

// IsAttestation reports whether a descriptor is BuildKit's attestation manifest.
func IsAttestation(desc ocispec.Descriptor) bool {
	return desc.Annotations["vnd.docker.reference.type"] == "attestation-manifest"
}

// PlatformName writes a platform as os/architecture[/variant].
func PlatformName(p *ocispec.Platform) string {
	if p == nil {
		return "(no platform)"
	}
	return path.Join(p.OS, p.Architecture, p.Variant)
}

// readLayer adds a layer's regular files to files and takes away what it whites out.
func readLayer(blob []byte, files map[string]string) error {
	var in io.Reader = bytes.NewReader(blob)
	if bytes.HasPrefix(blob, []byte{0x1f, 0x8b}) {
		unzipped, err := gzip.NewReader(in)
		if err != nil {
			return err
		}
		in = unzipped
	}
	return ReadTar(in, files)
}

// ReadTar adds the regular files of a tar archive to files, and applies a layer's whiteouts.
func ReadTar(in io.Reader, files map[string]string) error {
	for archive := tar.NewReader(in); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading an archive: %w", err)
		}
		name := strings.TrimPrefix(path.Clean(header.Name), "/")
		if hidden, ok := strings.CutPrefix(path.Base(name), ".wh."); ok {
			delete(files, path.Join(path.Dir(name), hidden))
			continue
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			return fmt.Errorf("reading %s from an archive: %w", name, err)
		}
		files[name] = string(content)
	}
}

func (r *Registry) mustGet(t T, target string) []byte {
	t.Helper()
	body, status := r.get(t, target)
	if status != http.StatusOK {
		t.Fatalf("registry: GET %s: status %d: %s", target, status, body)
	}
	return body
}

func (r *Registry) get(t T, target string) ([]byte, int) {
	t.Helper()
	request, err := http.NewRequest(http.MethodGet, "http://"+r.direct+target, nil)
	if err != nil {
		t.Fatalf("registry: GET %s: %v", target, err)
	}
	request.Header.Set("Accept", acceptManifests)
	if r.options.User != "" {
		request.SetBasicAuth(r.options.User, r.options.Password)
	}
	response, err := r.http.Do(request)
	if err != nil {
		t.Fatalf("registry: GET %s: %v", target, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("registry: GET %s: %v", target, err)
	}
	return body, response.StatusCode
}

// Descriptor makes a descriptor of what a tag points at when that is a bare manifest.
func Descriptor(i Index) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: i.MediaType, Digest: i.Digest, Size: int64(len(i.Raw))}
}
