// Package cache makes one build cache of those that the legs of a build exported, at the
// place where the client wants it: a repository of a registry, or the content store of
// its session. Their layers are at that place already.
package cache

import (
	"context"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/archfarm/archfarm/manifest"
)

// Place is where caches are. It is used concurrently.
type Place interface {
	// Manifest reads the manifest of a cache, of at most manifest.MaxBlob bytes.
	Manifest(ctx context.Context, d digest.Digest) ([]byte, error)
	// Blob reads a blob of at most manifest.MaxBlob bytes.
	Blob(ctx context.Context, d ocispecs.Descriptor) ([]byte, error)
	// WriteBlob writes a blob, unless it is there.
	WriteBlob(ctx context.Context, d ocispecs.Descriptor, blob []byte) error
	// Publish writes a manifest, and makes the cache's name mean it.
	Publish(ctx context.Context, d ocispecs.Descriptor, blob []byte) error
}

// Share is the cache that one leg exported.
type Share struct {
	// Platform is the leg's, as people read it.
	Platform string
	Manifest digest.Digest
}

// Observer is told how a merging goes on.
type Observer interface {
	// Status tells what is being done.
	Status(text string)
	// Warn tells what does not become as the client may expect it.
	Warn(text string)
}

// Merge makes one cache of the legs' (manifest.MergeCaches), and returns the descriptor of
// its manifest. BuildKit imports no configuration longer than manifest.MaxCacheConfig: of
// caches that are longer together, the last legs' are left out, and the client is warned.
// Errors are the place's, or tell whose cache is broken.
func Merge(ctx context.Context, at Place, shares []Share, f manifest.CacheFormat, tell Observer) (ocispecs.Descriptor, error) {
	caches := make([]manifest.Cache, len(shares))
	group, groupCtx := errgroup.WithContext(ctx)
	for i, s := range shares {
		group.Go(func() (err error) {
			caches[i], err = read(groupCtx, at, s)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return ocispecs.Descriptor{}, err
	}
	merged, left, err := fitting(caches, f)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	for _, s := range shares[len(shares)-left:] {
		tell.Warn(fmt.Sprintf("the cache has no part of %s: BuildKit imports none with a configuration of more than %d bytes", s.Platform, manifest.MaxCacheConfig))
	}
	tell.Status(fmt.Sprintf("writing config %s", merged.Config.Digest))
	if err := at.WriteBlob(ctx, merged.Config, merged.ConfigBlob); err != nil {
		return ocispecs.Descriptor{}, fmt.Errorf("error writing config blob: %w", err)
	}
	kind := "cache manifest"
	if f.Image {
		kind = "cache image manifest"
	}
	tell.Status(fmt.Sprintf("writing %s %s", kind, merged.Manifest.Digest))
	if err := at.Publish(ctx, merged.Manifest, merged.ManifestBlob); err != nil {
		return ocispecs.Descriptor{}, fmt.Errorf("error writing manifest blob: %w", err)
	}
	return merged.Manifest, nil
}

func read(ctx context.Context, at Place, s Share) (manifest.Cache, error) {
	blob, err := at.Manifest(ctx, s.Manifest)
	if err != nil {
		return manifest.Cache{}, fmt.Errorf("reading the cache of %s: %w", s.Platform, err)
	}
	config, layers, err := manifest.ReadCacheManifest(blob)
	if err != nil {
		return manifest.Cache{}, fmt.Errorf("%s: %w", s.Platform, err)
	}
	if blob, err = at.Blob(ctx, config); err != nil {
		return manifest.Cache{}, fmt.Errorf("reading the cache of %s: %w", s.Platform, err)
	}
	out, err := manifest.ReadCache(blob, layers)
	if err != nil {
		return out, fmt.Errorf("%s: %w", s.Platform, err)
	}
	return out, nil
}

// fitting merges as many of the caches, from the first on, as can be imported; one in any
// case, as its exporter does. Left tells how many are not in it.
func fitting(caches []manifest.Cache, f manifest.CacheFormat) (out manifest.EncodedCache, left int, err error) {
	for n := range slices.Backward(caches) {
		merged, err := manifest.MergeCaches(caches[:n+1])
		if err != nil {
			return out, 0, err
		}
		if out, err = merged.Encode(f); err != nil {
			return out, 0, err
		}
		if n == 0 || out.Config.Size <= manifest.MaxCacheConfig && out.Manifest.Size <= manifest.MaxCacheConfig {
			return out, len(caches) - n - 1, nil
		}
	}
	return out, 0, fmt.Errorf("merging caches: there are none")
}
