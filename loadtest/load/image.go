package load

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// NewImage makes the image of a platform.
func NewImage(t farmtest.T, platform string) Image {
	t.Helper()
	system, architecture, _ := strings.Cut(platform, "/")
	config := encode(t, ocispecs.Image{Platform: ocispecs.Platform{OS: system, Architecture: architecture}, RootFS: ocispecs.RootFS{Type: "layers"}})
	manifest := encode(t, ocispecs.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispecs.MediaTypeImageManifest,
		Config: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
		Layers: []ocispecs.Descriptor{},
	})
	return Image{
		Descriptor: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))},
		Manifest:   manifest, Config: config,
	}
}

func encode(t farmtest.T, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatalf("making an image: %v", err)
	}
	return raw
}

// Push puts the image into a repository of a registry that is served at http://host, by digest.
func (i Image) Push(t farmtest.T, host, repository string) {
	t.Helper()
	base := "http://" + host + "/v2/" + repository
	location := request(t, http.MethodPost, base+"/blobs/uploads/", "", nil)
	if strings.HasPrefix(location, "/") {
		location = "http://" + host + location
	}
	mark := "?"
	if strings.Contains(location, "?") {
		mark = "&"
	}
	request(t, http.MethodPut, location+mark+"digest="+digest.FromBytes(i.Config).String(), "application/octet-stream", i.Config)
	request(t, http.MethodPut, base+"/manifests/"+i.Descriptor.Digest.String(), i.Descriptor.MediaType, i.Manifest)
}

// request returns the Location of the answer.
func request(t farmtest.T, method, url, contentType string, body []byte) string {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatalf("pushing an image: %v", err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatalf("pushing an image: %v", err)
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode >= 300 {
		t.Fatalf("pushing an image: %s %s: %s: %s", method, url, resp.Status, fmt.Sprint(string(text), err))
	}
	return resp.Header.Get("Location")
}
