package manifest_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	cachetypes "github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/manifest"
)

var madeAt = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

// someCache is a cache of a step that has a result, made of one that has none.
func someCache(platform string, later time.Duration) manifest.Cache {
	base, top := digest.FromString("base of "+platform), digest.FromString("top of "+platform)
	return manifest.Cache{
		Layers: []ocispecs.Descriptor{layerOf(base), layerOf(top)},
		Config: cachetypes.CacheConfig{
			Layers: []cachetypes.CacheLayer{{Blob: top, ParentIndex: 1}, {Blob: base, ParentIndex: -1}},
			Records: []cachetypes.CacheRecord{
				{Digest: "sha256:context", Inputs: nil},
				{
					Digest: digest.Digest("sha256:run " + platform), Inputs: [][]cachetypes.CacheInput{{{LinkIndex: 0, Selector: "/src"}}},
					Results: []cachetypes.CacheResult{{LayerIndex: 0, CreatedAt: madeAt.Add(later)}},
				},
			},
		},
	}
}

func layerOf(d digest.Digest) ocispecs.Descriptor {
	return ocispecs.Descriptor{MediaType: ocispecs.MediaTypeImageLayerGzip, Digest: d, Size: 7}
}

// unfolded writes each record of a cache with all that it is made of, and the layers of
// its latest result: what matters of a cache, whatever its places.
func unfolded(c manifest.Cache) map[string]string {
	present := map[digest.Digest]bool{}
	for _, d := range c.Layers {
		present[d.Digest] = true
	}
	var layers func(i int) string
	layers = func(i int) string {
		if i == -1 {
			return ""
		}
		l := c.Config.Layers[i]
		if !present[l.Blob] {
			return "?"
		}
		return layers(l.ParentIndex) + " " + l.Blob.Encoded()
	}
	var key func(i int) string
	key = func(i int) string {
		r := c.Config.Records[i]
		out := r.Digest.String()
		for _, alternatives := range r.Inputs {
			var links []string
			for _, in := range alternatives {
				links = append(links, fmt.Sprintf("%q %s", in.Selector, key(in.LinkIndex)))
			}
			slices.Sort(links)
			out += "(" + strings.Join(slices.Compact(links), " | ") + ")"
		}
		return out
	}
	out := map[string]string{}
	for i, r := range c.Config.Records {
		best := out[key(i)]
		for _, res := range r.Results {
			if chain := layers(res.LayerIndex); !strings.Contains(chain, "?") {
				best = max(best, res.CreatedAt.UTC().Format("2006-01-02T15:04:05.000000000")+chain)
			}
		}
		out[key(i)] = best
	}
	return out
}

func TestMergeCaches_HoldsWhatEachOfThemDoes(t *testing.T) {
	t.Parallel()
	amd64, arm64 := someCache("linux/amd64", 0), someCache("linux/arm64", time.Second)
	merged, err := manifest.MergeCaches([]manifest.Cache{amd64, arm64})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(merged.Config.Records); n != 3 {
		t.Errorf("%d records, want 3: the context's is the same for both", n)
	}
	if n := len(merged.Layers); n != 4 {
		t.Errorf("%d layers, want 4", n)
	}
	all := unfolded(merged)
	for _, c := range []manifest.Cache{amd64, arm64} {
		for key, result := range unfolded(c) {
			if all[key] != result {
				t.Errorf("%s has %q in the merged cache, want %q", key, all[key], result)
			}
		}
	}
}

func TestMergeCaches_TakesTheLatestResult(t *testing.T) {
	t.Parallel()
	older, newer := someCache("x", 0), someCache("x", time.Second)
	newer.Layers[1] = layerOf(digest.FromString("made anew"))
	newer.Config.Layers[0].Blob = newer.Layers[1].Digest
	merged, err := manifest.MergeCaches([]manifest.Cache{newer, older})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(merged.Layers); n != 2 || merged.Config.Records[1].Results[0].CreatedAt != madeAt.Add(time.Second) {
		t.Errorf("%d layers, want the 2 of the newer one; results %v", n, merged.Config.Records[1].Results)
	}
}

func TestMergeCaches_OfOneOrNone(t *testing.T) {
	t.Parallel()
	one := someCache("x", 0)
	one.Layers = one.Layers[1:] // the layer below is nowhere
	merged, err := manifest.MergeCaches([]manifest.Cache{one})
	if err != nil || len(merged.Layers) != 0 || len(merged.Config.Records) != 2 {
		t.Errorf("got %+v, %v; want the records without a result", merged, err)
	}
	if merged, err := manifest.MergeCaches(nil); err != nil || len(merged.Config.Records) != 0 {
		t.Errorf("of none: %+v, %v", merged, err)
	}
}

func TestReadCache_RefusesWhatIsNone(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]string{
		"no JSON":                 `{`,
		"a layer that loops":      `{"layers":[{"blob":"a","parent":1},{"blob":"b","parent":0},{"blob":"c","parent":-1}]}`,
		"a layer on nothing":      `{"layers":[{"blob":"a","parent":7}]}`,
		"a layer below -1":        `{"layers":[{"blob":"a","parent":-2}]}`,
		"a record that loops":     `{"records":[{"digest":"a","inputs":[[{"link":1}]]},{"digest":"b","inputs":[[{"link":0}]]}]}`,
		"a record of nothing":     `{"records":[{"digest":"a","inputs":[[{"link":1}]]}]}`,
		"a record of another":     `{"records":[{"digest":"a","inputs":[[{"link":-1}]]}]}`,
		"an empty input":          `{"records":[{"digest":"a","inputs":[[]]}]}`,
		"a result that is not":    `{"records":[{"digest":"a","layers":[{"layer":0}]}]}`,
		"a result before the 1st": `{"records":[{"digest":"a","layers":[{"layer":-1}]}]}`,
		"too long":                `{"x":"` + strings.Repeat("x", manifest.MaxBlob) + `"}`,
	} {
		if _, err := manifest.ReadCache([]byte(config), nil); err == nil {
			t.Errorf("%s was taken for a cache", name)
		}
	}
}

func TestReadCacheManifest_ReadsWhatEncodeWrites(t *testing.T) {
	t.Parallel()
	cache := someCache("linux/amd64", 0)
	for kind, format := range map[string]manifest.CacheFormat{
		ocispecs.MediaTypeImageManifest:                             {Image: true},
		ocispecs.MediaTypeImageIndex:                                {},
		"application/vnd.docker.distribution.manifest.list.v2+json": {Docker: true},
	} {
		out, err := cache.Encode(format)
		if err != nil {
			t.Fatal(err)
		}
		if out.Manifest.MediaType != kind || !strings.Contains(string(out.ManifestBlob), `"mediaType":"`+kind+`"`) {
			t.Errorf("%+v gives %s: %s", format, out.Manifest.MediaType, out.ManifestBlob)
		}
		config, layers, err := manifest.ReadCacheManifest(out.ManifestBlob)
		if err != nil || config.Digest != out.Config.Digest || len(layers) != len(cache.Layers) {
			t.Errorf("%s: read %v, %v, %v", kind, config, layers, err)
		}
		again, err := manifest.ReadCache(out.ConfigBlob, layers)
		if err != nil || len(again.Config.Records) != len(cache.Config.Records) {
			t.Errorf("%s: read %+v, %v", kind, again, err)
		}
	}
}

func TestReadCacheManifest_RefusesWhatIsNone(t *testing.T) {
	t.Parallel()
	for name, blob := range map[string]string{
		"no JSON":          `{`,
		"an image":         `{"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + digest.FromString("x").String() + `","size":1}}`,
		"nothing":          `{}`,
		"no digest":        `{"config":{"mediaType":"application/vnd.buildkit.cacheconfig.v0","digest":"x","size":1}}`,
		"a broken layer":   `{"config":{"mediaType":"application/vnd.buildkit.cacheconfig.v0","digest":"` + digest.FromString("x").String() + `"},"layers":[{"digest":"x"}]}`,
		"a negative layer": `{"layers":[{"digest":"` + digest.FromString("x").String() + `","size":-1}]}`,
		"too long":         `{"x":"` + strings.Repeat("x", manifest.MaxBlob) + `"}`,
	} {
		if _, _, err := manifest.ReadCacheManifest([]byte(blob)); err == nil {
			t.Errorf("%s was taken for the manifest of a cache", name)
		}
	}
}

// drawCache draws a cache whose records and layers are made of earlier ones, in any
// order; few names, so that caches have much in common.
func drawCache(t *rapid.T) manifest.Cache {
	var c manifest.Cache
	n := rapid.IntRange(0, 6).Draw(t, "layers")
	for i := range n {
		blob := digest.FromString(rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "blob"))
		c.Config.Layers = append(c.Config.Layers, cachetypes.CacheLayer{Blob: blob, ParentIndex: rapid.IntRange(-1, i-1).Draw(t, "parent")})
		if rapid.IntRange(0, 9).Draw(t, "present") > 0 {
			d := layerOf(blob)
			d.Annotations = map[string]string{"buildkit/createdat": rapid.SampledFrom([]string{"1", "2"}).Draw(t, "annotation")}
			c.Layers = append(c.Layers, d)
		}
	}
	for i := range rapid.IntRange(0, 8).Draw(t, "records") {
		r := cachetypes.CacheRecord{Digest: digest.Digest("sha256:" + rapid.SampledFrom([]string{"1", "2", "3", "4"}).Draw(t, "key"))}
		inputs := 0
		if i > 0 {
			inputs = rapid.IntRange(0, 2).Draw(t, "inputs")
		}
		for range inputs {
			var alternatives []cachetypes.CacheInput
			for range rapid.IntRange(1, 2).Draw(t, "alternatives") {
				alternatives = append(alternatives, cachetypes.CacheInput{
					LinkIndex: rapid.IntRange(0, i-1).Draw(t, "link"), Selector: rapid.SampledFrom([]string{"", "/x"}).Draw(t, "selector"),
				})
			}
			r.Inputs = append(r.Inputs, alternatives)
		}
		if n > 0 && rapid.Bool().Draw(t, "has a result") {
			at := madeAt.Add(time.Duration(rapid.IntRange(0, 3).Draw(t, "time")))
			r.Results = append(r.Results, cachetypes.CacheResult{LayerIndex: rapid.IntRange(0, n-1).Draw(t, "layer"), CreatedAt: at})
		}
		c.Config.Records = append(c.Config.Records, r)
	}
	return c
}

// TestMergeCaches_IsTheUnion: every chain of every cache is in the merged one, with the
// latest result that any of them has, and nothing else; the order does not matter, nor
// does merging it again.
func TestMergeCaches_IsTheUnion(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		caches := rapid.SliceOfN(rapid.Custom(drawCache), 0, 4).Draw(t, "caches")
		merged, err := manifest.MergeCaches(caches)
		if err != nil {
			t.Fatal(err)
		}
		all := map[string]string{}
		for _, c := range caches {
			for key, result := range unfolded(c) {
				if known, ok := all[key]; !ok || result[:min(29, len(result))] > known[:min(29, len(known))] {
					all[key] = result
				}
			}
		}
		got := unfolded(merged)
		if len(got) != len(all) || len(got) != len(merged.Config.Records) {
			t.Fatalf("%d chains in %d records, want %d", len(got), len(merged.Config.Records), len(all))
		}
		for key, result := range all {
			if len(result) != 0 && got[key][:29] != result[:29] || len(result) == 0 && got[key] != "" {
				t.Fatalf("%s has %q, want %q or another of that time", key, got[key], result)
			}
		}
		seen := map[digest.Digest]bool{}
		for _, d := range merged.Layers {
			if seen[d.Digest] {
				t.Fatalf("layer %s is there twice", d.Digest)
			}
			seen[d.Digest] = true
		}
		once := encode(t, merged)
		for what, again := range map[string][]manifest.Cache{"another order": rapid.Permutation(caches).Draw(t, "order"), "again": {merged, merged}} {
			other, err := manifest.MergeCaches(again)
			if err != nil {
				t.Fatal(err)
			}
			if encode(t, other) != once {
				t.Fatalf("%s gives another cache:\n%s\n%s", what, encode(t, other), once)
			}
		}
	})
}

func encode(t *rapid.T, c manifest.Cache) string {
	out, err := c.Encode(manifest.CacheFormat{Image: true})
	if err != nil {
		t.Fatal(err)
	}
	return string(out.ConfigBlob) + string(out.ManifestBlob)
}

func FuzzReadCache(f *testing.F) {
	for _, c := range []manifest.Cache{someCache("linux/amd64", 0), someCache("linux/arm64", 1)} {
		out, err := c.Encode(manifest.CacheFormat{Image: true})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(out.ConfigBlob, out.ManifestBlob)
	}
	f.Add([]byte(`{"layers":[{"blob":"a","parent":0}]}`), []byte(`{"manifests":[{}]}`))
	f.Fuzz(func(t *testing.T, config, blob []byte) {
		_, layers, err := manifest.ReadCacheManifest(blob)
		if err != nil {
			return
		}
		c, err := manifest.ReadCache(config, layers)
		if err != nil {
			return
		}
		merged, err := manifest.MergeCaches([]manifest.Cache{c, c})
		if err != nil {
			t.Fatalf("what was read cannot be merged: %v", err)
		}
		out, err := merged.Encode(manifest.CacheFormat{})
		if err != nil {
			t.Skip() // a time that JSON cannot write
		}
		_, layers, err = manifest.ReadCacheManifest(out.ManifestBlob)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := manifest.ReadCache(out.ConfigBlob, layers); err != nil {
			t.Fatal(err)
		}
	})
}
