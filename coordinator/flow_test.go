package coordinator

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

func legOf(arch string) manifest.Leg {
	blob := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":%q,"digest":%q,"size":2},"layers":[]}`,
		ocispecs.MediaTypeImageManifest, ocispecs.MediaTypeImageConfig, digest.FromString(arch))
	return manifest.Leg{
		Platform:   ocispecs.Platform{OS: "linux", Architecture: arch},
		Descriptor: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageManifest, Digest: digest.FromBytes(blob), Size: int64(len(blob))},
		Blob:       blob,
	}
}

func assembled(t *testing.T, exported *dispatch.Exported) (publish.Content, error) {
	t.Helper()
	b := &dispatch.Build{Progress: progress.NewStream(0)}
	defer b.Progress.Close()
	return (&coordinator{}).assemble(b, exported)
}

func TestAssemble_TheLegsOfABuildBecomeOneIndex(t *testing.T) {
	t.Parallel()
	got, err := assembled(t, &dispatch.Exported{
		Legs:        []manifest.Leg{legOf("arm64"), legOf("amd64")},
		Annotations: manifest.Annotations{Index: map[string]string{"a": "b"}, IndexDescriptor: map[string]string{"c": "d"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var index ocispecs.Index
	if err := json.Unmarshal(got.Blob, &index); err != nil {
		t.Fatal(err)
	}
	if got.Descriptor.Digest != digest.FromBytes(got.Blob) || got.Descriptor.MediaType != ocispecs.MediaTypeImageIndex || got.Descriptor.Annotations["c"] != "d" {
		t.Errorf("descriptor %+v", got.Descriptor)
	}
	if len(index.Manifests) != 2 || index.Manifests[0].Platform.Architecture != "arm64" || index.Annotations["a"] != "b" {
		t.Errorf("index %s", got.Blob)
	}
}

func TestAssemble_AnImageOfNoPlatformStaysWhatItIs(t *testing.T) {
	t.Parallel()
	leg := legOf("amd64")
	got, err := assembled(t, &dispatch.Exported{Plain: true, Legs: []manifest.Leg{leg}})
	if err != nil || got.Descriptor.Digest != leg.Descriptor.Digest {
		t.Errorf("became %s, %v", got.Descriptor.Digest, err)
	}
}

func TestAssemble_WhatAWorkerGarbledIsRefused(t *testing.T) {
	t.Parallel()
	bad := legOf("arm64")
	bad.Blob = append(bad.Blob, ' ')
	_, err := assembled(t, &dispatch.Exported{Legs: []manifest.Leg{legOf("amd64"), bad}})
	if err == nil || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("got %v", err)
	}
}

func TestAnswer_TellsTheClientOfTheIndex(t *testing.T) {
	t.Parallel()
	exported := &dispatch.Exported{
		Response: map[string]string{
			"containerimage.digest": "sha256:a-leg", "containerimage.config.digest": "sha256:a-config", "containerimage.descriptor": "a leg's",
			"image.name": "app", "something.else": "kept",
		},
		Publication: split.Publication{Name: "app:v1,app:v2"},
	}
	image := publish.Content{Descriptor: ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: digest.FromString("index"), Size: 5}}
	got, err := answer(exported, image)
	if err != nil {
		t.Fatal(err)
	}
	response := got.GetExporterResponse()
	raw, err := base64.StdEncoding.DecodeString(response["containerimage.descriptor"])
	if err != nil {
		t.Fatal(err)
	}
	var descriptor ocispecs.Descriptor
	if err := json.Unmarshal(raw, &descriptor); err != nil || !reflect.DeepEqual(descriptor, image.Descriptor) {
		t.Errorf("descriptor %s, %v", raw, err)
	}
	delete(response, "containerimage.descriptor")
	want := map[string]string{"containerimage.digest": image.Descriptor.Digest.String(), "image.name": "app:v1,app:v2", "something.else": "kept"}
	if !reflect.DeepEqual(response, want) {
		t.Errorf("got %v, want %v", response, want)
	}
	if exported.Response["containerimage.config.digest"] == "" {
		t.Error("the legs' own answer was changed")
	}
}
