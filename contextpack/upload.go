package contextpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// findBatch is what FindMissing takes at a time (job.proto).
	findBatch = 10_000
	// attempts without a new chunk having arrived, after which Upload gives up, and
	// the longest pause between them: half a minute in all.
	attempts = 6
	maxPause = 10 * time.Second
)

// Stats are what an upload was.
type Stats struct {
	Size   int64 // of the archive, in bytes
	Chunks int   // of the archive, equal ones counted once
	Sent   int64 // bytes, those that a broken connection lost included
	// SentChunks are how many chunks that were.
	SentChunks int
}

// Upload sends a context, as much of it as the farm has not got, and returns its
// digest, by which jobs name it. A connection that breaks is taken up again where it
// broke, for as long as chunks arrive. Progress, unless nil, is told how many bytes
// have been sent and how many there are to send. Errors are *ChangedError, or have
// the coordinator's gRPC code.
func Upload(ctx context.Context, c archfarmv1.JobServiceClient, s *Source, progress func(sent, total int64)) (string, Stats, error) {
	m, err := s.Manifest(ctx)
	if err != nil {
		return "", Stats{}, err
	}
	if progress == nil {
		progress = func(int64, int64) {}
	}
	u := &upload{client: c, source: s, manifest: m, index: map[string]int{}, progress: progress}
	for i, chunk := range m.GetChunks() {
		u.index[chunk.GetDigest()] = i
	}
	u.stats = Stats{Size: s.size, Chunks: len(u.index)}
	d, err := u.untilDone(ctx)
	if err != nil {
		return "", u.stats, fmt.Errorf("uploading the context: %w", err)
	}
	return d, u.stats, nil
}

type upload struct {
	client   archfarmv1.JobServiceClient
	source   *Source
	manifest *archfarmv1.ContextManifest
	index    map[string]int // of a chunk of that digest
	progress func(sent, total int64)
	stats    Stats
	buf      []byte
}

func (u *upload) untilDone(ctx context.Context) (string, error) {
	least := len(u.index) + 1 // missing so far
	for failed := 0; ; {
		missing, d, err := u.once(ctx)
		if err == nil {
			return d, nil
		}
		if missing >= 0 && missing < least {
			least, failed = missing, 0
		}
		if failed++; !again(err) || failed >= attempts {
			return "", err
		}
		if err := pause(ctx, failed); err != nil {
			return "", err
		}
	}
}

// again tells whether an error may have gone when the upload is tried again:
// connections that broke, a coordinator that stops or is busy, and chunks that were
// swept in between, which it calls Aborted.
func again(err error) bool {
	if changed := (*ChangedError)(nil); errors.As(err, &changed) {
		return false
	}
	switch status.Code(err) {
	case codes.Unavailable, codes.Aborted, codes.ResourceExhausted, codes.Internal:
		return true
	}
	return false
}

func pause(ctx context.Context, failed int) error {
	d := min(200*time.Millisecond<<failed, maxPause)
	t := time.NewTimer(d/2 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// once returns the context's digest when all has arrived, and how many chunks were
// missing when it began, -1 when it could not be found out.
func (u *upload) once(ctx context.Context) (int, string, error) {
	missing, err := u.missing(ctx)
	if err != nil {
		return -1, "", err
	}
	ctx, cancel := context.WithCancel(ctx) // ends the stream after an error
	defer cancel()
	stream, err := u.client.UploadContext(ctx)
	if err != nil {
		return len(missing), "", err
	}
	if err := u.send(stream, missing); err != nil {
		return len(missing), "", err
	}
	answer, err := stream.CloseAndRecv()
	if err != nil {
		return len(missing), "", err
	}
	if want := Digest(u.manifest); answer.GetDigest() != want {
		return len(missing), "", fmt.Errorf("the coordinator has stored %q, and %s was sent", answer.GetDigest(), want)
	}
	return len(missing), answer.GetDigest(), nil
}

// missing returns the indexes of chunks that the farm has not got, in order.
func (u *upload) missing(ctx context.Context) ([]int, error) {
	all := make([]string, 0, len(u.index))
	for d := range u.index {
		all = append(all, d)
	}
	var missing []int
	for batch := range slices.Chunk(all, findBatch) {
		answer, err := u.client.FindMissing(ctx, &archfarmv1.FindMissingRequest{Digests: batch})
		if err != nil {
			return nil, err
		}
		for _, d := range answer.GetDigests() {
			i, ok := u.index[d]
			if !ok {
				return nil, fmt.Errorf("the coordinator misses %.80q, which it was not asked for", d)
			}
			missing = append(missing, i)
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing), nil
}

func (u *upload) send(stream grpc.ClientStreamingClient[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse], missing []int) error {
	sent, total := int64(0), int64(0)
	for _, i := range missing {
		total += u.manifest.GetChunks()[i].GetSize()
	}
	u.progress(0, total)
	for _, i := range missing {
		var err error
		if u.buf, err = u.source.chunk(u.buf, i); err != nil {
			return err
		}
		if err := stream.Send(&archfarmv1.UploadContextRequest{Part: &archfarmv1.UploadContextRequest_Chunk{Chunk: u.buf}}); err != nil {
			return cause(stream, err)
		}
		sent += int64(len(u.buf))
		u.stats.Sent += int64(len(u.buf))
		u.stats.SentChunks++
		u.progress(sent, total)
	}
	err := stream.Send(&archfarmv1.UploadContextRequest{Part: &archfarmv1.UploadContextRequest_Whole{Whole: u.manifest}})
	return cause(stream, err)
}

// cause is why sending failed: Send says io.EOF, and the answer has the status.
func cause(stream grpc.ClientStreamingClient[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse], err error) error {
	if !errors.Is(err, io.EOF) {
		return err
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		return err
	}
	return status.Error(codes.Unavailable, "the coordinator ended the upload early")
}
