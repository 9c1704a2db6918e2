package manifest_test

import (
	"strings"
	"testing"

	"github.com/archfarm/archfarm/manifest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestValidate_RefusesAndSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	amd, arm := image("amd", "linux/amd64"), image("arm", "linux/arm64")
	changed := func(d ocispecs.Descriptor, change func(*ocispecs.Descriptor)) ocispecs.Descriptor {
		change(&d)
		return d
	}
	whole := func(change func(*ocispecs.Index)) []byte { return index(t, change, amd, arm) }
	and := func(d ocispecs.Descriptor) []byte { return index(t, nil, amd, d) }
	for _, tc := range []struct {
		scenario string
		blob     []byte
		want     string
	}{
		{"nothing", nil, "malformed"},
		{"no object", []byte(`null`), "schemaVersion is 0"},
		{"cut off", whole(nil)[:50], "malformed"},
		{"something behind it", append(whole(nil), '{'), "malformed"},
		{"schema 1", whole(func(i *ocispecs.Index) { i.SchemaVersion = 1 }), "schemaVersion is 1"},
		{"an image manifest", bare(ocispecs.MediaTypeImageManifest), "as an image manifest does"},
		{"an image manifest too", []byte(strings.Replace(string(whole(nil)), "{", `{"layers":[],`, 1)), "as an image manifest does"},
		{"of no type", whole(func(i *ocispecs.Index) { i.MediaType = "" }), `media type is ""`},
		{"about a subject", whole(func(i *ocispecs.Index) { i.Subject = &amd }), "subject"},
		{"empty", index(t, nil), "no image manifest"},
		{"only an attestation", index(t, nil, attestation("x", amd.Digest)), "no image manifest"},
		{"platform twice", and(image("other", "linux/amd64")), "two image manifests are for linux/amd64"},
		{"nested", and(changed(arm, func(d *ocispecs.Descriptor) { d.MediaType = ocispecs.MediaTypeImageIndex })), "do not nest"},
		{"docker's list nested", and(changed(arm, func(d *ocispecs.Descriptor) { d.MediaType = dockerIndex })), "do not nest"},
		{"types mixed", and(changed(arm, func(d *ocispecs.Descriptor) { d.MediaType = dockerManifest })), "of type"},
		{"digest malformed", and(changed(arm, func(d *ocispecs.Descriptor) { d.Digest = "sha256:../x" })), "digest"},
		{"size negative", and(changed(arm, func(d *ocispecs.Descriptor) { d.Size = -1 })), "-1 bytes"},
		{"no platform", and(changed(arm, func(d *ocispecs.Descriptor) { d.Platform = nil })), "no platform"},
		{"platform unknown", and(changed(arm, func(d *ocispecs.Descriptor) {
			d.Platform = &ocispecs.Platform{OS: "unknown", Architecture: "unknown"}
		})), "does not say what it is about"},
		{"embedded content differs", and(changed(arm, func(d *ocispecs.Descriptor) { d.Data = []byte("mra") })), "damaged or exchanged"},
		{"attestation of something else", and(attestation("x", arm.Digest)), "no image manifest here"},
		{"attestation of an attestation", index(t, nil, amd, attestation("x", amd.Digest), attestation("y", attestation("x", amd.Digest).Digest)),
			"no image manifest here"},
		{"attestation that runs", and(changed(attestation("x", amd.Digest), func(d *ocispecs.Descriptor) { d.Platform = arm.Platform })),
			"run it as an image"},
		{"unknown reference", and(changed(arm, func(d *ocispecs.Descriptor) {
			d.Annotations = map[string]string{"vnd.docker.reference.type": "signature"}
		})), `as "signature"`},
	} {
		t.Run(tc.scenario, func(t *testing.T) {
			t.Parallel()
			requireError(t, manifest.Validate(tc.blob), "the index is not sound", tc.want)
		})
	}
}

func TestValidate_TakesEmbeddedContentThatFits(t *testing.T) {
	t.Parallel()
	d := image("amd", "linux/amd64")
	d.Data = []byte("amd")
	if err := manifest.Validate(index(t, nil, d)); err != nil {
		t.Error(err)
	}
}
