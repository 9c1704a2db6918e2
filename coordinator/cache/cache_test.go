package cache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	cachetypes "github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/manifest"
)

// told is what a merging told.
type told struct {
	mu              sync.Mutex
	lines, warnings []string
}

func (o *told) Status(text string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lines = append(o.lines, text)
}

func (o *told) Warn(text string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.warnings = append(o.warnings, text)
}

func newStore(t *testing.T) content.Store {
	t.Helper()
	store, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// share writes a leg's cache of so many records.
func share(t *testing.T, at Place, platform string, records int) Share {
	t.Helper()
	layer := ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: digest.FromString("layer of " + platform), Size: 7}
	c := manifest.Cache{Layers: []ocispecs.Descriptor{layer}, Config: cachetypes.CacheConfig{Layers: []cachetypes.CacheLayer{{Blob: layer.Digest, ParentIndex: -1}}}}
	for i := range records {
		c.Config.Records = append(c.Config.Records, cachetypes.CacheRecord{
			Digest: digest.FromString(fmt.Sprint(platform, i)), Results: []cachetypes.CacheResult{{LayerIndex: 0}},
		})
	}
	out, err := c.Encode(manifest.CacheFormat{Image: true})
	if err == nil {
		err = at.WriteBlob(t.Context(), out.Config, out.ConfigBlob)
	}
	if err == nil {
		err = at.Publish(t.Context(), out.Manifest, out.ManifestBlob)
	}
	if err != nil {
		t.Fatal(err)
	}
	return Share{Platform: platform, Manifest: out.Manifest.Digest}
}

// read returns the merged cache.
func readBack(t *testing.T, at Place, d ocispecs.Descriptor) manifest.Cache {
	t.Helper()
	c, err := read(t.Context(), at, Share{Platform: "all", Manifest: d.Digest})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestMerge_AtTheClient(t *testing.T) {
	t.Parallel()
	at := AtClient(newStore(t))
	shares := []Share{share(t, at, "linux/amd64", 3), share(t, at, "linux/arm64", 4)}
	for kind, f := range map[string]manifest.CacheFormat{"cache image manifest": {Image: true}, "cache manifest": {}} {
		o := &told{}
		for range 2 { // again over what is there
			d, err := Merge(t.Context(), at, shares, f, o)
			if err != nil {
				t.Fatal(err)
			}
			if c := readBack(t, at, d); len(c.Config.Records) != 7 || len(c.Layers) != 2 {
				t.Errorf("%s: %d records, %d layers", kind, len(c.Config.Records), len(c.Layers))
			}
			if last := o.lines[len(o.lines)-1]; last != "writing "+kind+" "+d.Digest.String() || len(o.warnings) > 0 {
				t.Errorf("%s: %q, %q", kind, o.lines, o.warnings)
			}
		}
	}
}

func TestMerge_OfMoreThanBuildKitImports(t *testing.T) {
	t.Parallel()
	at := AtClient(newStore(t))
	const many = manifest.MaxCacheConfig / 2 / 120 // more than half of what is possible
	shares := []Share{share(t, at, "linux/amd64", many), share(t, at, "linux/arm64", many), share(t, at, "linux/s390x", 1)}
	o := &told{}
	d, err := Merge(t.Context(), at, shares, manifest.CacheFormat{Image: true}, o)
	if err != nil {
		t.Fatal(err)
	}
	if c := readBack(t, at, d); len(c.Config.Records) != many || len(c.Layers) != 1 {
		t.Errorf("%d records, %d layers", len(c.Config.Records), len(c.Layers))
	}
	if len(o.warnings) != 2 || !strings.Contains(o.warnings[0], "linux/arm64") || !strings.Contains(o.warnings[1], "linux/s390x") {
		t.Errorf("warnings %q", o.warnings)
	}
}

// failing is a place that fails at one thing.
type failing struct {
	Place
	at string
}

var errPlace = errors.New("the place is gone")

func (f failing) Manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	if f.at == "manifest" {
		return nil, errPlace
	}
	return f.Place.Manifest(ctx, d)
}

func (f failing) Blob(ctx context.Context, d ocispecs.Descriptor) ([]byte, error) {
	if f.at == "blob" {
		return nil, errPlace
	}
	return f.Place.Blob(ctx, d)
}

func (f failing) WriteBlob(ctx context.Context, d ocispecs.Descriptor, blob []byte) error {
	if f.at == "write" {
		return errPlace
	}
	return f.Place.WriteBlob(ctx, d, blob)
}

func (f failing) Publish(ctx context.Context, d ocispecs.Descriptor, blob []byte) error {
	if f.at == "publish" {
		return errPlace
	}
	return f.Place.Publish(ctx, d, blob)
}

func TestMerge_SaysWhatFailed(t *testing.T) {
	t.Parallel()
	at := AtClient(newStore(t))
	shares := []Share{share(t, at, "linux/amd64", 1), share(t, at, "linux/arm64", 1)}
	for what, text := range map[string]string{
		"manifest": "reading the cache of linux/", "blob": "reading the cache of linux/", "write": "error writing config blob", "publish": "error writing manifest blob",
	} {
		if _, err := Merge(t.Context(), failing{at, what}, shares, manifest.CacheFormat{}, &told{}); !errors.Is(err, errPlace) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", what, err)
		}
	}
	image := []byte(`{"config":{"mediaType":"application/vnd.oci.image.config.v1+json"}}`)
	d := ocispecs.Descriptor{Digest: digest.FromBytes(image), Size: int64(len(image))}
	if err := at.WriteBlob(t.Context(), d, image); err != nil {
		t.Fatal(err)
	}
	if _, err := Merge(t.Context(), at, append(shares, Share{"linux/s390x", d.Digest}), manifest.CacheFormat{}, &told{}); err == nil || !strings.Contains(err.Error(), "linux/s390x") {
		t.Errorf("an image for a cache: %v", err)
	}
	if _, err := Merge(t.Context(), at, nil, manifest.CacheFormat{}, &told{}); err == nil {
		t.Error("a cache of nothing")
	}
}
