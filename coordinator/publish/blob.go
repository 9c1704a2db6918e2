package publish

import (
	"bytes"
	"context"
	"fmt"
	"io"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	cerrdefs "github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/manifest"
)

// errNoBlob: the registry says that there is no such blob.
var errNoBlob = fmt.Errorf("the registry has no such blob: %w", cerrdefs.ErrNotFound)

// FetchManifest reads a manifest or index whose size is not known, of at most
// manifest.MaxBlob bytes, and checks its digest. Errors are Fetch's.
func (r Registry) FetchManifest(ctx context.Context, repository string, d digest.Digest) ([]byte, error) {
	t, e, err := r.blobs(repository, d, false)
	if err != nil {
		return nil, err
	}
	name := t.repository() + "@" + d.String()
	blob, _, err := e.get(ctx, d.String())
	if err != nil {
		return nil, r.refused("fetching", name, err)
	}
	if got := d.Algorithm().FromBytes(blob); got != d {
		return nil, status.Errorf(codes.DataLoss, "fetching %s: the registry answers %s", name, got)
	}
	return blob, nil
}

// FetchBlob reads a blob, of at most manifest.MaxBlob bytes, from a repository, and
// checks its size and digest. NotFound when it is not there.
func (r Registry) FetchBlob(ctx context.Context, repository string, d ocispecs.Descriptor) ([]byte, error) {
	t, e, err := r.blobs(repository, d.Digest, false)
	if err != nil {
		return nil, err
	}
	name := t.repository() + "@" + d.Digest.String()
	if d.Size < 0 || d.Size > manifest.MaxBlob {
		return nil, status.Errorf(codes.InvalidArgument, "fetching %s: its size is %d, from 0 to %d are possible", name, d.Size, manifest.MaxBlob)
	}
	ctx, done := context.WithTimeoutCause(ctx, maxAnswer, errSlow)
	defer done()
	fetcher, err := e.resolver().Fetcher(ctx, name)
	if err != nil {
		return nil, r.refused("fetching", name, slow(ctx, err))
	}
	body, err := fetcher.Fetch(ctx, d)
	if err != nil {
		return nil, r.refused("fetching", name, slow(ctx, missing(err)))
	}
	defer body.Close()
	blob, err := io.ReadAll(io.LimitReader(body, d.Size+1)) // the first read asks for it
	if err != nil {
		return nil, r.refused("fetching", name, slow(ctx, missing(err)))
	}
	if got := d.Digest.Algorithm().FromBytes(blob); got != d.Digest || int64(len(blob)) != d.Size {
		return nil, status.Errorf(codes.DataLoss, "fetching %s: the registry answers something else", name)
	}
	return blob, nil
}

// PushBlob writes a blob into a repository, if it is not there yet. Errors are Push's.
func (r Registry) PushBlob(ctx context.Context, repository string, d ocispecs.Descriptor, blob []byte) error {
	t, e, err := r.blobs(repository, d.Digest, true)
	if err != nil {
		return err
	}
	name := t.repository() + "@" + d.Digest.String()
	ctx, done := context.WithTimeoutCause(ctx, maxAnswer, errSlow)
	defer done()
	pusher, err := e.resolver().Pusher(ctx, name)
	if err != nil {
		return r.refused("failed to push", name, slow(ctx, err))
	}
	w, err := pusher.Push(ctx, d)
	if cerrdefs.IsAlreadyExists(err) {
		return nil
	}
	if err == nil {
		err = content.Copy(ctx, w, bytes.NewReader(blob), d.Size, d.Digest)
		w.Close()
	}
	return r.refused("failed to push", name, slow(ctx, err))
}

// blobs finds the registry of a repository.
func (r Registry) blobs(repository string, d digest.Digest, push bool) (target, endpoint, error) {
	t, err := readTarget(repository, false, "")
	if err != nil {
		return t, endpoint{}, err
	}
	if err := d.Validate(); err != nil {
		return t, endpoint{}, status.Errorf(codes.InvalidArgument, "in %s: %q: %v", t.repository(), shorten(d.String()), err)
	}
	t.named = reference.TrimNamed(t.named)
	e, err := r.endpoint(t.named, push)
	return t, e, r.refused("reaching the registry of", t.repository(), err)
}

// resolver is BuildKit's way to the endpoint, for what is no manifest.
func (e endpoint) resolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: e.hosts})
}

func missing(err error) error {
	if cerrdefs.IsNotFound(err) {
		return errNoBlob
	}
	return err
}
