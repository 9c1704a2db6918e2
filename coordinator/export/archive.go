package export

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	images "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	bksession "github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/contentutil"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/manifest"
)

const (
	// maxBlobs bounds the blobs of one leg's archive.
	maxBlobs = 1 << 16
	// clientStore is the content store of a client's session that takes exports.
	clientStore = "export"
)

// Written is what a leg wrote into its archive.
type Written struct {
	Descriptor ocispecs.Descriptor
	Blob       []byte
	// Response is what the leg's exporter answered.
	Response map[string]string
}

// archive collects the OCI layouts of the legs.
type archive struct {
	merge *Merge

	mu      sync.Mutex
	client  bksession.Caller
	written map[int]Written // by leg
}

func newArchive(m *Merge) *archive { return &archive{merge: m, written: map[int]Written{}} }

func (a *archive) begin(client bksession.Caller, _ []Part) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.client = client
}

func (a *archive) serve(leg int, stream grpc.ServerStream, md metadata.MD) error {
	in := &messages{stream: stream}
	if err := a.merge.shelf.unpack(in); err != nil {
		return a.merge.blameSpool(fmt.Errorf("reading the image that a worker exported: %w", err))
	}
	if _, err := io.Copy(io.Discard, in); err != nil { // what follows the end of an archive
		return err
	}
	written, err := a.merge.shelf.written(stream.Context(), header(md))
	if err != nil {
		return fmt.Errorf("reading the image that a worker exported: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.written[leg] = written
	return nil
}

// unpack keeps the blobs of an OCI layout in a tar archive.
func (s *shelf) unpack(in io.Reader) error {
	archive := tar.NewReader(in)
	for count := 0; ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		dgst, ok := blobOf(h)
		if !ok {
			continue
		}
		if count++; count > maxBlobs {
			return status.Errorf(codes.ResourceExhausted, "more than %d blobs", maxBlobs)
		}
		if err := s.put(dgst, h.Size, archive); err != nil {
			return err
		}
	}
}

// blobOf is the digest that an entry of a layout is named after.
func blobOf(h *tar.Header) (digest.Digest, bool) {
	name, ok := strings.CutPrefix(h.Name, ocispecs.ImageBlobsDir+"/")
	algorithm, encoded, found := strings.Cut(name, "/")
	dgst := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)
	return dgst, ok && found && h.Typeflag == tar.TypeReg && dgst.Validate() == nil
}

// written reads what a leg's exporter says of its archive.
func (s *shelf) written(ctx context.Context, response map[string]string) (Written, error) {
	desc, err := Descriptor(response)
	if err != nil {
		return Written{}, err
	}
	blob, err := content.ReadBlob(ctx, s, desc)
	return Written{Descriptor: desc, Blob: blob, Response: response}, err
}

// Descriptor reads the image's descriptor from an exporter's response. It fails
// when there is none, or when it is of more than manifest.MaxBlob bytes.
func Descriptor(response map[string]string) (desc ocispecs.Descriptor, err error) {
	raw, err := base64.StdEncoding.DecodeString(response[exptypes.ExporterImageDescriptorKey])
	if err == nil {
		err = json.Unmarshal(raw, &desc)
	}
	if err != nil {
		return desc, fmt.Errorf("reading the image's descriptor: %w", err)
	}
	return desc, CheckDescriptor(desc)
}

// CheckDescriptor refuses descriptors whose content would not be read.
func CheckDescriptor(desc ocispecs.Descriptor) error {
	if desc.Size <= 0 || desc.Size > manifest.MaxBlob {
		return fmt.Errorf("the image's index has %d bytes, at most %d are possible", desc.Size, manifest.MaxBlob)
	}
	return nil
}

// Written returns what a leg wrote into the archive of an exporter.
func (m *Merge) Written(exporter, leg int) (Written, error) {
	a, err := m.archive(exporter)
	if err != nil {
		return Written{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	w, ok := a.written[leg]
	if !ok {
		return Written{}, status.Errorf(codes.Internal, "a worker has exported an image without sending it")
	}
	return w, nil
}

func (m *Merge) archive(exporter int) (*archive, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	a, ok := m.captures[exporter].(*archive)
	if !ok {
		return nil, fmt.Errorf("exporter %d writes no archive", exporter)
	}
	return a, nil
}

// Archive is a merged image on its way to the client.
type Archive struct {
	Exporter   int
	Descriptor ocispecs.Descriptor
	Blob       []byte
	// Names are the references that the layout lists, none for an image without.
	Names []string
	// Response is what the client is told along with the file.
	Response map[string]string
	// Store sends it to the client's content store instead of a file.
	Store bool
}

// Send gives the client an archive, the same that a buildkitd would. That the
// client has the file already is no error.
func (m *Merge) Send(ctx context.Context, out Archive) error {
	a, err := m.archive(out.Exporter)
	if err != nil {
		return err
	}
	if err := m.shelf.put(out.Descriptor.Digest, out.Descriptor.Size, bytes.NewReader(out.Blob)); err != nil {
		return m.blameSpool(err)
	}
	if out.Store {
		return contentutil.CopyChain(ctx, sessioncontent.NewCallerStore(a.client, clientStore), m.shelf, out.Descriptor)
	}
	w, err := filesync.CopyFileWriter(ctx, out.Response, out.Exporter, a.client)
	if err != nil {
		return err
	}
	err = images.Export(ctx, m.shelf, w, images.WithManifest(out.Descriptor, out.Names...), images.WithAllPlatforms(), images.WithSkipDockerManifest())
	if closeErr := w.Close(); err == nil {
		err = closeErr
	}
	if grpcerrors.Code(err) == codes.AlreadyExists {
		return nil
	}
	return err
}

// messages is a stream of BytesMessage as bytes.
type messages struct {
	stream grpc.ServerStream
	buf    filesync.BytesMessage
	rest   []byte
}

func (m *messages) Read(p []byte) (int, error) {
	for len(m.rest) == 0 {
		if err := m.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, m.rest)
	m.rest = m.rest[n:]
	return n, nil
}

// next reads a message; io.EOF after the last.
func (m *messages) next() error {
	m.buf.Data = m.buf.Data[:0] // the codec appends
	if err := m.stream.RecvMsg(&m.buf); err != nil {
		return err
	}
	m.rest = m.buf.Data
	return nil
}

// WriteTo spares io.Copy a buffer.
func (m *messages) WriteTo(w io.Writer) (n int64, err error) {
	for {
		if len(m.rest) > 0 {
			written, err := w.Write(m.rest)
			n += int64(written)
			if err != nil {
				return n, err
			}
			m.rest = nil
		}
		if err := m.next(); errors.Is(err, io.EOF) {
			return n, nil
		} else if err != nil {
			return n, err
		}
	}
}
