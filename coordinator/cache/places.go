package cache

import (
	"bytes"
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/manifest"
)

// InRegistry is the place of a cache in a registry, behind a tag.
func InRegistry(r publish.Registry, ref string) Place { return registry{r, ref} }

type registry struct {
	publish.Registry
	ref string
}

func (r registry) Manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	return r.FetchManifest(ctx, r.ref, d)
}

func (r registry) Blob(ctx context.Context, d ocispecs.Descriptor) ([]byte, error) {
	return r.FetchBlob(ctx, r.ref, d)
}

func (r registry) WriteBlob(ctx context.Context, d ocispecs.Descriptor, blob []byte) error {
	return r.PushBlob(ctx, r.ref, d, blob)
}

func (r registry) Publish(ctx context.Context, d ocispecs.Descriptor, blob []byte) error {
	return r.Push(ctx, r.ref, false, publish.Content{Descriptor: d, Blob: blob})
}

// AtClient is the place of a cache in a client's folder, by the content store of its
// session. The client lists there the manifest that it is answered with.
func AtClient(store content.Store) Place { return folder{store} }

type folder struct{ content.Store }

func (f folder) Manifest(ctx context.Context, d digest.Digest) ([]byte, error) {
	info, err := f.Info(ctx, d)
	if err != nil {
		return nil, err
	}
	return f.Blob(ctx, ocispecs.Descriptor{Digest: d, Size: info.Size})
}

func (f folder) Blob(ctx context.Context, d ocispecs.Descriptor) ([]byte, error) {
	if d.Size < 0 || d.Size > manifest.MaxBlob {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are possible", d.Digest, d.Size, manifest.MaxBlob)
	}
	blob, err := content.ReadBlob(ctx, f, d)
	if err != nil {
		return nil, err
	}
	if d.Digest.Algorithm().FromBytes(blob) != d.Digest {
		return nil, fmt.Errorf("what the client has as %s is something else", d.Digest)
	}
	return blob, nil
}

func (f folder) WriteBlob(ctx context.Context, d ocispecs.Descriptor, blob []byte) error {
	return content.WriteBlob(ctx, f, d.Digest.String(), bytes.NewReader(blob), d)
}

func (f folder) Publish(ctx context.Context, d ocispecs.Descriptor, blob []byte) error {
	return f.WriteBlob(ctx, d, blob)
}
