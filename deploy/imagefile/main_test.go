package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// registry serves blobs and manifests by digest, and one index by tag.
type registry map[string][]byte

func (r registry) put(t *testing.T, mediaType string, value any) ocispec.Descriptor {
	t.Helper()
	content, ok := value.([]byte)
	if !ok {
		var err error
		if content, err = json.Marshal(value); err != nil {
			t.Fatal(err)
		}
	}
	descriptor := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
	r[descriptor.Digest.String()] = content
	return descriptor
}

func (r registry) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	content, ok := r[request.URL.Path[strings.LastIndexByte(request.URL.Path, '/')+1:]]
	if !ok {
		http.NotFound(w, request)
		return
	}
	_, _ = w.Write(content)
}

func layer(t *testing.T, name, content string) []byte {
	t.Helper()
	var buffer bytes.Buffer
	zip := gzip.NewWriter(&buffer)
	archive := tar.NewWriter(zip)
	if err := archive.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := archive.Write([]byte(content)); err != nil {
		t.Fatal(err)
	}
	if err := archive.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zip.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.Bytes()
}

func (r registry) image(t *testing.T, platform ocispec.Platform, layers ...[]byte) ocispec.Descriptor {
	t.Helper()
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, content := range layers {
		manifest.Layers = append(manifest.Layers, r.put(t, ocispec.MediaTypeImageLayerGzip, content))
	}
	descriptor := r.put(t, ocispec.MediaTypeImageManifest, manifest)
	descriptor.Platform = &platform
	return descriptor
}

func TestRun_PrintsUppermostFileOfEachPlatformAndSkipsAttestations(t *testing.T) {
	t.Parallel()
	images := registry{}
	index, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{
		images.image(t, ocispec.Platform{OS: "linux", Architecture: "amd64"}, layer(t, "uname", "old\n"), layer(t, "uname", "x86_64\n6.1\n"), layer(t, "other", "")),
		images.image(t, ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, layer(t, "./uname", "armv7l\n")),
		images.image(t, ocispec.Platform{OS: "unknown", Architecture: "unknown"}),
	}})
	if err != nil {
		t.Fatal(err)
	}
	images["latest"] = index
	server := httptest.NewServer(images)
	defer server.Close()

	var out strings.Builder
	if err := run(t.Context(), &out, strings.TrimPrefix(server.URL, "http://")+"/hello", "/uname"); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "linux/amd64\tx86_64 6.1\nlinux/arm/v7\tarmv7l\n"; got != want {
		t.Errorf("printed %q, want %q", got, want)
	}
}

func TestRun_SaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	images := registry{}
	index, err := json.Marshal(ocispec.Index{Manifests: []ocispec.Descriptor{
		images.image(t, ocispec.Platform{OS: "linux", Architecture: "amd64"}, layer(t, "other", "")),
	}})
	if err != nil {
		t.Fatal(err)
	}
	images["latest"] = index
	images["empty"] = []byte("{}")
	server := httptest.NewServer(images)
	defer server.Close()
	host := strings.TrimPrefix(server.URL, "http://")

	for reference, want := range map[string]string{
		"hello":                 "lacks the registry",
		host + "/hello":         "linux/amd64: no layer holds /uname",
		host + "/hello:missing": "404",
		host + "/hello:empty":   "no index",
	} {
		var out strings.Builder
		if err := run(t.Context(), &out, reference, "/uname"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one that says %q", reference, err, want)
		}
	}
}
