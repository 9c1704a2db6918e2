package contexts

import (
	"cmp"
	"context"
	"errors"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// maxFind is how many digests FindMissing takes (job.proto).
const maxFind = 10_000

// FindMissing tells which chunks the caller's tenant has not uploaded. The others
// are kept for a while.
func (c *Contexts) FindMissing(ctx context.Context, r *archfarmv1.FindMissingRequest) (*archfarmv1.FindMissingResponse, error) {
	if n := len(r.GetDigests()); n > maxFind {
		return nil, status.Errorf(codes.InvalidArgument, "%d digests: ask for at most %d at a time", n, maxFind)
	}
	for _, d := range r.GetDigests() {
		if err := contextpack.CheckDigest(d); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	missing, err := c.blobs.MissingBlobs(ctx, tenantOf(ctx), r.GetDigests())
	if err != nil {
		return nil, storing(ctx, "looking for chunks", err)
	}
	return &archfarmv1.FindMissingResponse{Digests: missing}, nil
}

// UploadContext stores chunks as they come, and the context when the list of its
// chunks has come and all are there. ABORTED when some are not: they have been swept
// since FindMissing, or were never sent.
func (c *Contexts) UploadContext(stream grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) error {
	ctx := stream.Context()
	done, err := c.uploads.take(ctx, tenantOf(ctx))
	if err != nil {
		return status.FromContextError(err).Err()
	}
	defer done()
	u := &upload{Contexts: c, tenant: tenantOf(ctx), sizes: map[string]int64{}}
	parts := receive(stream)
	idle := time.NewTimer(c.o.Idle)
	defer idle.Stop()
	for {
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-idle.C:
			return status.Errorf(codes.Aborted, "nothing was received for %s: the upload has ended; chunks that arrived need not be sent again", c.o.Idle)
		case p := <-parts:
			if p.err != nil {
				return p.err
			}
			answer, err := u.part(ctx, p.UploadContextRequest)
			if err != nil {
				return err
			}
			if answer != nil {
				return stream.SendAndClose(answer)
			}
			idle.Reset(c.o.Idle)
		}
	}
}

// received is a message of the stream, or why there are no more.
type received struct {
	*archfarmv1.UploadContextRequest
	err error
}

// receive reads a stream, one message ahead. Its goroutine ends with the stream,
// whose context ends when the call has been answered.
func receive(stream grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) <-chan received {
	parts := make(chan received)
	go func() {
		for {
			r, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				err = status.Error(codes.InvalidArgument, "the upload ended without the list of all chunks (whole), by which the context is made")
			}
			select {
			case parts <- received{r, err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return parts
}

// upload is one call of UploadContext.
type upload struct {
	*Contexts
	tenant string
	sizes  map[string]int64 // of the chunks that it brought
	stored int64
}

// part returns the answer once the last part has come.
func (u *upload) part(ctx context.Context, r *archfarmv1.UploadContextRequest) (*archfarmv1.UploadContextResponse, error) {
	switch p := r.GetPart().(type) {
	case *archfarmv1.UploadContextRequest_Chunk:
		return nil, u.chunk(ctx, p.Chunk)
	case *archfarmv1.UploadContextRequest_Whole:
		return u.whole(ctx, p.Whole)
	}
	return nil, status.Error(codes.InvalidArgument, "a message without a chunk or a list of all chunks")
}

func (u *upload) chunk(ctx context.Context, b []byte) error {
	if len(b) == 0 || len(b) > store.MaxBlob {
		return status.Errorf(codes.InvalidArgument, "a chunk of %d bytes: 1 to %d are possible", len(b), store.MaxBlob)
	}
	if u.stored += int64(len(b)); u.stored > u.o.MaxContext {
		return status.Errorf(codes.InvalidArgument, "the context is bigger than the %d MiB that are allowed: leave out by .dockerignore what the build does not need", u.o.MaxContext>>20)
	}
	d := digest.FromBytes(b).String()
	if err := u.blobs.PutBlob(ctx, u.tenant, d, b); err != nil {
		return storing(ctx, "storing a chunk", err)
	}
	u.sizes[d] = int64(len(b))
	return nil
}

func (u *upload) whole(ctx context.Context, m *archfarmv1.ContextManifest) (*archfarmv1.UploadContextResponse, error) {
	size, err := contextpack.Check(m, u.o.MaxContext)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	for i, chunk := range m.GetChunks() {
		// Those that were there before are compared when they are read.
		if n, ok := u.sizes[chunk.GetDigest()]; ok && n != chunk.GetSize() {
			return nil, status.Errorf(codes.InvalidArgument, "chunk %d, %s, has %d bytes, not %d", i, chunk.GetDigest(), n, chunk.GetSize())
		}
	}
	missing, err := u.missing(ctx, u.tenant, m)
	if err != nil {
		return nil, storing(ctx, "storing the context", err)
	}
	if len(missing) > 0 {
		return nil, status.Errorf(codes.Aborted, "%d chunks of the context have not been uploaded, %s among them: ask FindMissing, and send what it says", len(missing), missing[0])
	}
	d := contextpack.Digest(m)
	// After its chunks (see sweepSlack).
	if err := u.blobs.PutBlob(ctx, manifestsOf(u.tenant), d, contextpack.Encode(m)); err != nil {
		return nil, storing(ctx, "storing the context", err)
	}
	u.fresh.add(name{u.tenant, d}, time.Now().Add(u.o.Keep/4))
	return &archfarmv1.UploadContextResponse{Digest: d, Size: size, Stored: u.stored}, nil
}

// tenantOf is whose contexts a caller uses.
func tenantOf(ctx context.Context) string {
	return cmp.Or(identity.FromContext(ctx).Tenant, identity.DefaultTenant)
}

// storing is what a failure of the store is to a client, which tries again.
func storing(ctx context.Context, doing string, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	return status.Errorf(codes.Unavailable, "%s: %v", doing, err)
}
