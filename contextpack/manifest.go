package contextpack

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// manifestHead begins a manifest's encoding.
const manifestHead = "archfarm context v1\n"

// Encode writes a manifest as it is stored: a line that names the format, then for
// each chunk a line with its digest, a space, and its size in decimal digits.
func Encode(m *archfarmv1.ContextManifest) []byte {
	b := []byte(manifestHead)
	for _, c := range m.GetChunks() {
		b = append(b, c.GetDigest()...)
		b = append(b, ' ')
		b = strconv.AppendInt(b, c.GetSize(), 10)
		b = append(b, '\n')
	}
	return b
}

// Digest names a context: the SHA-256 of its manifest's encoding.
func Digest(m *archfarmv1.ContextManifest) string { return digest.FromBytes(Encode(m)).String() }

// Decode reads what Encode wrote, and nothing else.
func Decode(b []byte) (*archfarmv1.ContextManifest, error) {
	lines, ok := strings.CutPrefix(string(b), manifestHead)
	if !ok {
		return nil, fmt.Errorf("a context's manifest begins with %q", strings.TrimSpace(manifestHead))
	}
	m := &archfarmv1.ContextManifest{}
	for line := range strings.Lines(lines) {
		name, size, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("chunk %d of a context's manifest: %w", len(m.Chunks), err)
		}
		m.Chunks = append(m.Chunks, &archfarmv1.ContextChunk{Digest: name, Size: n})
	}
	if !bytes.Equal(Encode(m), b) {
		return nil, fmt.Errorf("the context's manifest is not in its canonical form")
	}
	return m, nil
}

// Check says what is wrong with a manifest by itself, of a context of at most
// maxBytes, and returns its size in bytes.
func Check(m *archfarmv1.ContextManifest, maxBytes int64) (size int64, err error) {
	if len(m.GetChunks()) == 0 {
		return 0, fmt.Errorf("the context has no chunks")
	}
	for i, c := range m.GetChunks() {
		if err := CheckDigest(c.GetDigest()); err != nil {
			return 0, fmt.Errorf("chunk %d: %w", i, err)
		}
		if c.GetSize() < 1 || c.GetSize() > MaxChunk {
			return 0, fmt.Errorf("chunk %d has %d bytes: 1 to %d are possible", i, c.GetSize(), MaxChunk)
		}
		if size += c.GetSize(); size > maxBytes {
			return 0, fmt.Errorf("the context is bigger than the %d MiB that are allowed: leave out by .dockerignore what the build does not need", maxBytes>>20)
		}
	}
	if n := len(Encode(m)); n > MaxChunk {
		return 0, fmt.Errorf("the list of the context's %d chunks has %d bytes: at most %d are possible", len(m.GetChunks()), n, MaxChunk)
	}
	return size, nil
}

// CheckDigest tells whether a digest is a SHA-256 in its canonical form.
func CheckDigest(s string) error {
	if d := digest.Digest(s); d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%.100q is not a digest: use sha256: and 64 hexadecimal digits", s)
	}
	return nil
}
