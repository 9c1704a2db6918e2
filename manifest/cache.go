package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	cachetypes "github.com/moby/buildkit/cache/remotecache/v1/types"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

// MaxCacheConfig is the longest configuration of a cache, in bytes, that BuildKit
// imports (cache/remotecache/import.go, readBlob).
const MaxCacheConfig = 1 << 20

// Cache is a build cache as BuildKit's exporters describe it: chains of cache keys,
// and the layers that are their results.
type Cache struct {
	// Layers are those that Config refers to, each once.
	Layers []ocispecs.Descriptor
	Config cachetypes.CacheConfig
}

// CacheFormat is how a cache is written down.
type CacheFormat struct {
	// Image is an image manifest with the layers as layers; otherwise an index with the
	// layers as manifests, which not every registry takes.
	Image bool
	// Docker has Docker's media type for that index.
	Docker bool
}

// EncodedCache is a cache as its exporter writes it: the configuration, then the
// manifest, which refers to it and to the layers.
type EncodedCache struct {
	Config, Manifest         ocispecs.Descriptor
	ConfigBlob, ManifestBlob []byte
}

// ReadCacheManifest returns what the manifest of a cache refers to. It fails when that
// is none, such as an image, or longer than MaxBlob.
func ReadCacheManifest(blob []byte) (config ocispecs.Descriptor, layers []ocispecs.Descriptor, err error) {
	if len(blob) > MaxBlob {
		return config, nil, fmt.Errorf("reading the manifest of a cache: it has %d bytes, at most %d are possible", len(blob), MaxBlob)
	}
	var read struct {
		Config    ocispecs.Descriptor   `json:"config"`
		Layers    []ocispecs.Descriptor `json:"layers"`
		Manifests []ocispecs.Descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(blob, &read); err != nil {
		return config, nil, fmt.Errorf("reading the manifest of a cache: %w", err)
	}
	config = read.Config
	for _, d := range slices.Concat(read.Layers, read.Manifests) {
		switch err := d.Digest.Validate(); {
		case err != nil:
			return config, nil, fmt.Errorf("reading the manifest of a cache: %q: %w", d.Digest, err)
		case d.Size < 0:
			return config, nil, fmt.Errorf("reading the manifest of a cache: %s has %d bytes", d.Digest, d.Size)
		case d.MediaType == cachetypes.CacheConfigMediaTypeV0:
			config = d
		default:
			layers = append(layers, d)
		}
	}
	if config.MediaType != cachetypes.CacheConfigMediaTypeV0 || config.Digest.Validate() != nil || config.Size < 0 {
		return config, nil, errors.New("reading the manifest of a cache: it has no configuration of a cache")
	}
	return config, layers, nil
}

// ReadCache reads a cache, given its configuration and the layers of its manifest. It
// fails when the configuration is malformed, longer than MaxBlob, refers to what is not
// there, or has chains that loop.
func ReadCache(config []byte, layers []ocispecs.Descriptor) (Cache, error) {
	if len(config) > MaxBlob {
		return Cache{}, fmt.Errorf("reading the configuration of a cache: it has %d bytes, at most %d are possible", len(config), MaxBlob)
	}
	c := Cache{Layers: layers}
	if err := json.Unmarshal(config, &c.Config); err != nil {
		return Cache{}, fmt.Errorf("reading the configuration of a cache: %w", err)
	}
	if _, err := readChains(c); err != nil {
		return Cache{}, fmt.Errorf("reading the configuration of a cache: %w", err)
	}
	return c, nil
}

// MergeCaches joins caches to their union, as one buildkitd that had built all of it
// would have exported it: each chain of keys of each cache is in it, with a result if one
// of the caches has one, the latest. What it returns is the same for any order of the
// caches. Results whose layers are not there, and layers without a result, are left out.
//
// It fails when a cache refers to what is not there, or has chains that loop.
func MergeCaches(caches []Cache) (Cache, error) {
	union := newCacheUnion()
	for i, c := range caches {
		read, err := readChains(c)
		if err != nil {
			return Cache{}, fmt.Errorf("merging caches: that of leg %d: %w", i+1, err)
		}
		union.add(read)
	}
	return union.cache(), nil
}

// Encode writes a cache down.
func (c Cache) Encode(f CacheFormat) (EncodedCache, error) {
	config, err := json.Marshal(c.Config)
	if err != nil {
		return EncodedCache{}, err
	}
	out := EncodedCache{ConfigBlob: config, Config: ocispecs.Descriptor{
		MediaType: cachetypes.CacheConfigMediaTypeV0, Digest: digest.FromBytes(config), Size: int64(len(config)),
	}}
	version := specs.Versioned{SchemaVersion: 2}
	kind := oci.index
	if f.Image {
		kind = oci.image
		out.ManifestBlob, err = json.Marshal(ocispecs.Manifest{Versioned: version, MediaType: kind, Config: out.Config, Layers: c.Layers})
	} else {
		if f.Docker {
			kind = docker.index
		}
		out.ManifestBlob, err = json.Marshal(ocispecs.Index{Versioned: version, MediaType: kind, Manifests: append(slices.Clone(c.Layers), out.Config)})
	}
	out.Manifest = ocispecs.Descriptor{MediaType: kind, Digest: digest.FromBytes(out.ManifestBlob), Size: int64(len(out.ManifestBlob))}
	return out, err
}

// describedLayers are descriptors by their digest. Where two differ, such as in when
// they were made, the choice does not depend on their order.
type describedLayers map[digest.Digest]ocispecs.Descriptor

func (l describedLayers) add(d ocispecs.Descriptor) {
	known, ok := l[d.Digest]
	if !ok || bytes.Compare(encoded(d), encoded(known)) < 0 {
		d.Annotations = maps.Clone(d.Annotations)
		l[d.Digest] = d
	}
}

func encoded(d ocispecs.Descriptor) []byte {
	raw, _ := json.Marshal(d) // strings and numbers
	return raw
}
