package contexts

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/coordinator/store"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestBoundsAreOne(t *testing.T) {
	t.Parallel()
	if contextpack.MaxChunk != store.MaxBlob {
		t.Errorf("chunks have up to %d bytes, blobs %d", contextpack.MaxChunk, store.MaxBlob)
	}
}

func TestUpload_SendsWhatIsMissingAndNoMore(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	dir := project(t, 1)
	var last, total int64
	s := source(t, dir)
	d, first, err := contextpack.Upload(as(t, "acme"), r.client(t), s, func(n, all int64) { last, total = n, all })
	if err != nil {
		t.Fatal(err)
	}
	if first.Sent != s.Size() || first.SentChunks != first.Chunks || last != total || total != s.Size() {
		t.Errorf("%+v of %d bytes, progress %d of %d", first, s.Size(), last, total)
	}
	if again, stats := r.upload(t, "acme", dir); again != d || stats.Sent != 0 {
		t.Errorf("the same again: %s, %+v; was %s", again, stats, d)
	}
	write(t, dir, "src7/file", []byte("changed"))
	if other, stats := r.upload(t, "acme", dir); other == d || stats.SentChunks > 3 || stats.Sent > 5<<20 {
		t.Errorf("one file changed: %+v of %d", stats, stats.Chunks)
	}
	out, release, err := r.Open(t.Context(), "acme", d)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	if b, _ := os.ReadFile(filepath.Join(out, "big")); !bytes.Equal(b, bytesOf(1, 9<<20)) {
		t.Error("the big file is not what was sent")
	}
	if b, _ := os.ReadFile(filepath.Join(out, "src7/file")); !bytes.Equal(b, bytesOf(9, 50_000)) {
		t.Error("the file is not what was sent first")
	}
}

func TestUpload_GoesOnWhereTheConnectionBroke(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	r.breakAfter.Store(5 << 20)
	s := source(t, project(t, 2))
	d, stats, err := contextpack.Upload(as(t, "acme"), r.client(t), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := r.connections.Load(); n < 3 {
		t.Errorf("%d connections: none broke", n)
	}
	if stats.Sent > 2*s.Size() {
		t.Errorf("%d bytes were sent for %d", stats.Sent, s.Size())
	}
	if err := r.Exists(t.Context(), "acme", d); err != nil {
		t.Error(err)
	}
}

func TestUpload_GivesUpWhenNothingArrives(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	r.breakAfter.Store(200) // less than a question for what is missing
	_, stats, err := contextpack.Upload(as(t, "acme"), r.client(t), source(t, project(t, 2)), nil)
	if status.Code(err) != codes.Unavailable || stats.Sent != 0 {
		t.Errorf("%v, %+v, want Unavailable", err, stats)
	}
}

func TestUpload_OfAFileThatChanges(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	dir := project(t, 3)
	s := source(t, dir)
	if _, err := s.Manifest(t.Context()); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "big", []byte("shorter"))
	_, _, err := contextpack.Upload(as(t, "acme"), r.client(t), s, nil)
	var changed *contextpack.ChangedError
	if !errors.As(err, &changed) || changed.Name != "big" {
		t.Errorf("%v, want that big changed", err)
	}
}

func TestContexts_AreTheirTenantsOnly(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	dir := project(t, 4)
	d, first := r.upload(t, "acme", dir)
	for _, tenant := range []string{"other", "acme/contexts", "default"} {
		if err := r.Exists(t.Context(), tenant, d); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s: exists: %v", tenant, err)
		}
		if _, _, err := r.Open(t.Context(), tenant, d); !errors.Is(err, store.ErrNotFound) {
			t.Errorf("%s: opened: %v", tenant, err)
		}
	}
	// Neither are chunks, nor may another tenant's be named without having them.
	m, err := source(t, dir).Manifest(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.send(t, "other", &archfarmv1.UploadContextRequest{Part: &archfarmv1.UploadContextRequest_Whole{Whole: m}})
	if status.Code(err) != codes.Aborted {
		t.Errorf("a context of another tenant's chunks: %v", err)
	}
	if _, stats := r.upload(t, "other", dir); stats.Sent != first.Sent {
		t.Errorf("another tenant sent %d bytes, want %d", stats.Sent, first.Sent)
	}
	// A manifest is not a chunk.
	found, err := r.client(t).FindMissing(as(t, "acme"), &archfarmv1.FindMissingRequest{Digests: []string{d}})
	if err != nil || len(found.GetDigests()) != 1 {
		t.Errorf("%v, %v", found, err)
	}
}

// send sends messages as they are.
func (r *rig) send(t *testing.T, tenant string, parts ...*archfarmv1.UploadContextRequest) (*archfarmv1.UploadContextResponse, error) {
	t.Helper()
	stream, err := r.client(t).UploadContext(as(t, tenant))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range parts {
		if stream.Send(p) != nil {
			break // the answer says why
		}
	}
	return stream.CloseAndRecv()
}

func chunkOf(b []byte) *archfarmv1.UploadContextRequest {
	return &archfarmv1.UploadContextRequest{Part: &archfarmv1.UploadContextRequest_Chunk{Chunk: b}}
}

func wholeOf(chunks ...*archfarmv1.ContextChunk) *archfarmv1.UploadContextRequest {
	return &archfarmv1.UploadContextRequest{Part: &archfarmv1.UploadContextRequest_Whole{Whole: &archfarmv1.ContextManifest{Chunks: chunks}}}
}

const (
	hello      = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	unuploaded = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
)

func TestUploadContext_RefusesWhatIsWrong(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{MaxContext: 1 << 20})
	for name, c := range map[string]struct {
		parts []*archfarmv1.UploadContextRequest
		code  codes.Code
		want  string
	}{
		"nothing":        {nil, codes.InvalidArgument, "ended without the list"},
		"no list":        {[]*archfarmv1.UploadContextRequest{chunkOf([]byte("hello"))}, codes.InvalidArgument, "ended without the list"},
		"empty message":  {[]*archfarmv1.UploadContextRequest{{}}, codes.InvalidArgument, "without a chunk"},
		"empty chunk":    {[]*archfarmv1.UploadContextRequest{chunkOf(nil)}, codes.InvalidArgument, "a chunk of 0 bytes"},
		"big chunk":      {[]*archfarmv1.UploadContextRequest{chunkOf(make([]byte, 8<<20+1))}, codes.InvalidArgument, "1 to 8388608"},
		"too much":       {[]*archfarmv1.UploadContextRequest{chunkOf(make([]byte, 1<<20+1))}, codes.InvalidArgument, "bigger than the 1 MiB"},
		"empty list":     {[]*archfarmv1.UploadContextRequest{wholeOf()}, codes.InvalidArgument, "no chunks"},
		"no digest":      {[]*archfarmv1.UploadContextRequest{wholeOf(&archfarmv1.ContextChunk{Digest: "../../x", Size: 5})}, codes.InvalidArgument, "not a digest"},
		"not there":      {[]*archfarmv1.UploadContextRequest{wholeOf(&archfarmv1.ContextChunk{Digest: unuploaded, Size: 5})}, codes.Aborted, unuploaded},
		"wrong size":     {[]*archfarmv1.UploadContextRequest{chunkOf([]byte("hello")), wholeOf(&archfarmv1.ContextChunk{Digest: hello, Size: 6})}, codes.InvalidArgument, "has 5 bytes, not 6"},
		"too big a list": {[]*archfarmv1.UploadContextRequest{wholeOf(&archfarmv1.ContextChunk{Digest: hello, Size: 1 << 20}, &archfarmv1.ContextChunk{Digest: hello, Size: 1})}, codes.InvalidArgument, "bigger than the 1 MiB"},
	} {
		if answer, err := r.send(t, "acme", c.parts...); status.Code(err) != c.code || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v; want %s, %q", name, answer, err, c.code, c.want)
		}
	}
	for name, digests := range map[string][]string{"bad": {"sha256:x"}, "many": make([]string, 10_001)} {
		if _, err := r.client(t).FindMissing(t.Context(), &archfarmv1.FindMissingRequest{Digests: digests}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s digests: %v", name, err)
		}
	}
}

func TestOpen_OfAContextThatLiesAboutAChunk(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{})
	if _, err := r.send(t, "acme", chunkOf([]byte("hello"))); err == nil {
		t.Fatal("no list was sent")
	}
	answer, err := r.send(t, "acme", wholeOf(&archfarmv1.ContextChunk{Digest: hello, Size: 4}))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Open(t.Context(), "acme", answer.GetDigest()); err == nil || !strings.Contains(err.Error(), "does not have the 4 bytes") {
		t.Errorf("%v", err)
	}
	answer, err = r.send(t, "acme", wholeOf(&archfarmv1.ContextChunk{Digest: hello, Size: 5}))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Open(t.Context(), "acme", answer.GetDigest()); err == nil || !strings.Contains(err.Error(), "the archive") {
		t.Errorf("no archive is unpacked: %v", err)
	}
}

func TestUploadContext_EndsWhenNothingComes(t *testing.T) {
	t.Parallel()
	r := newRig(t, Options{Idle: time.Millisecond, MaxUploads: 1})
	for range 3 { // and leaves its turn to the next
		stream, err := r.client(t).UploadContext(as(t, "acme"))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.RecvMsg(&archfarmv1.UploadContextResponse{}); status.Code(err) != codes.Aborted {
			t.Errorf("%v, want Aborted", err)
		}
	}
}
