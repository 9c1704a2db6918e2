package coordinator

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/progress"
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

// made is what legs made for an exporter.
func made(t *testing.T, kind string, attrs map[string]string, legs ...manifest.Leg) dispatch.Image {
	t.Helper()
	var platforms []split.Leg
	for _, l := range legs {
		platforms = append(platforms, split.Leg{Platform: l.Platform})
	}
	plan, err := split.PlanExports([]*controlapi.Exporter{{Type: kind, Attrs: attrs}}, platforms)
	if err != nil {
		t.Fatal(err)
	}
	e := plan.Exports()[0]
	return dispatch.Image{Export: e, Legs: legs, Annotations: manifest.Annotations{Index: e.Index, IndexDescriptor: e.IndexDescriptor}}
}

func assembled(t *testing.T, images ...dispatch.Image) ([]image, error) {
	t.Helper()
	b := &dispatch.Build{Progress: progress.NewStream(0)}
	defer b.Progress.Close()
	return (&coordinator{}).assemble(b, &dispatch.Exported{Images: images})
}

func TestAssemble_TheLegsOfABuildBecomeOneIndexForEachExporter(t *testing.T) {
	t.Parallel()
	arm, amd := legOf("arm64"), legOf("amd64")
	got, err := assembled(t,
		made(t, "image", map[string]string{"annotation-index.a": "b", "annotation-index-descriptor.c": "d", "name": "r/a:1", "push": "true"}, arm, amd),
		made(t, "oci", map[string]string{"name": "r/b:2", "tar": "false"}, amd, arm))
	if err != nil || len(got) != 2 {
		t.Fatal(got, err)
	}
	for i, want := range []string{"arm64", "amd64"} {
		var index ocispecs.Index
		if err := json.Unmarshal(got[i].Blob, &index); err != nil {
			t.Fatal(err)
		}
		if got[i].Descriptor.Digest != digest.FromBytes(got[i].Blob) || got[i].Descriptor.MediaType != ocispecs.MediaTypeImageIndex {
			t.Errorf("descriptor %+v", got[i].Descriptor)
		}
		if len(index.Manifests) != 2 || index.Manifests[0].Platform.Architecture != want || len(index.Annotations) != 1-i {
			t.Errorf("index %s", got[i].Blob)
		}
	}
	if got[0].Descriptor.Annotations["c"] != "d" || !reflect.DeepEqual(got[0].publication.Names, []string{"r/a:1"}) {
		t.Errorf("descriptor %+v, names %v", got[0].Descriptor, got[0].publication)
	}
	archive := got[1].archive()
	if !archive.Store || !reflect.DeepEqual(archive.Names, []string{"docker.io/r/b:2"}) || archive.Response["image.name"] != "docker.io/r/b:2" {
		t.Errorf("archive %+v", archive)
	}
}

func TestAssemble_AnArchiveTellsWhenItWasMade(t *testing.T) {
	t.Parallel()
	arm, amd := legOf("arm64"), legOf("amd64")
	arm.Descriptor.Annotations = map[string]string{ocispecs.AnnotationCreated: "2026-01-02T03:04:05Z"}
	amd.Descriptor.Annotations = map[string]string{ocispecs.AnnotationCreated: "2026-01-02T03:04:06Z"}
	for name, test := range map[string]struct {
		image dispatch.Image
		want  map[string]string
	}{
		"the last leg's time":             {made(t, "oci", nil, arm, amd), map[string]string{ocispecs.AnnotationCreated: "2026-01-02T03:04:06Z"}},
		"the client's word":               {made(t, "oci", map[string]string{"annotation-index-descriptor." + ocispecs.AnnotationCreated: "long ago"}, arm, amd), map[string]string{ocispecs.AnnotationCreated: "long ago"}},
		"an image in a registry does not": {made(t, "image", nil, arm, amd), nil},
	} {
		got, err := assembled(t, test.image)
		if err != nil {
			t.Fatal(err)
		}
		if annotations := got[0].Descriptor.Annotations; len(annotations) != len(test.want) || annotations[ocispecs.AnnotationCreated] != test.want[ocispecs.AnnotationCreated] {
			t.Errorf("%s: %v", name, annotations)
		}
	}
}

func TestAssemble_AnImageOfNoPlatformStaysWhatItIs(t *testing.T) {
	t.Parallel()
	leg := legOf("amd64")
	plain := made(t, "image", nil, leg)
	plain.Plain, plain.Config = true, "sha256:config"
	got, err := assembled(t, plain)
	if err != nil || got[0].Descriptor.Digest != leg.Descriptor.Digest || got[0].response["containerimage.config.digest"] != "sha256:config" {
		t.Errorf("became %+v, %v", got, err)
	}
}

func TestAssemble_WhatAWorkerGarbledIsRefused(t *testing.T) {
	t.Parallel()
	bad := legOf("arm64")
	bad.Blob = append(bad.Blob, ' ')
	_, err := assembled(t, made(t, "image", nil, legOf("amd64"), bad))
	if err == nil || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("got %v", err)
	}
	if _, err := assembled(t, made(t, "oci", map[string]string{"name": "App"}, legOf("amd64"))); err == nil || !strings.Contains(err.Error(), "failed to parse App") {
		t.Errorf("of a name that is none: %v", err)
	}
}

func TestAnswer_TellsTheClientOfTheLastImage(t *testing.T) {
	t.Parallel()
	exported := &dispatch.Exported{Response: map[string]string{"something.else": "kept"}}
	images, err := assembled(t, made(t, "image", map[string]string{"name": "app:v1,app:v2"}, legOf("amd64")), made(t, "oci", nil, legOf("amd64"), legOf("arm64")))
	if err != nil {
		t.Fatal(err)
	}
	response := answer(exported, images).GetExporterResponse()
	last := images[1].Descriptor
	raw, err := base64.StdEncoding.DecodeString(response["containerimage.descriptor"])
	if err != nil {
		t.Fatal(err)
	}
	var descriptor ocispecs.Descriptor
	if err := json.Unmarshal(raw, &descriptor); err != nil || descriptor.Digest != last.Digest || descriptor.Size != last.Size {
		t.Errorf("descriptor %s, %v", raw, err)
	}
	delete(response, "containerimage.descriptor")
	want := map[string]string{"containerimage.digest": last.Digest.String(), "image.name": "app:v1,app:v2", "something.else": "kept"}
	if !reflect.DeepEqual(response, want) {
		t.Errorf("got %v, want %v", response, want)
	}
	if len(exported.Response) != 1 {
		t.Error("the legs' own answer was changed")
	}
}
