// Command imagefile prints one file of an image for each of its platforms, straight from the
// layers in a registry on this machine that speaks plain HTTP: what a builder pushed, not what it said.
//
//	imagefile localhost:5000/hello@sha256:… /uname
//
// Each line is the platform, a tab, and the file's content with its lines joined by spaces.
package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxManifest = 4 << 20 // bytes, as registries themselves limit it
	maxFile     = 1 << 20 // bytes of the file that is asked for
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: imagefile HOST:PORT/REPOSITORY:TAG|@DIGEST /PATH")
		os.Exit(2)
	}
	if err := run(ctx, os.Stdout, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "imagefile:", err)
		os.Exit(1)
	}
}

// run writes one line to w for each platform of the index that reference names.
func run(ctx context.Context, w io.Writer, reference, file string) error {
	repo, err := parseReference(reference)
	if err != nil {
		return err
	}
	var index ocispec.Index
	if err := repo.manifest(ctx, repo.version, &index); err != nil {
		return err
	}
	if len(index.Manifests) == 0 {
		return fmt.Errorf("%s is no index of several platforms", reference)
	}
	for _, descriptor := range index.Manifests {
		if descriptor.Platform == nil || descriptor.Platform.OS == "unknown" { // an attestation
			continue
		}
		content, err := repo.file(ctx, descriptor, file)
		if err != nil {
			return fmt.Errorf("%s/%s: %w", descriptor.Platform.OS, descriptor.Platform.Architecture, err)
		}
		platform := path.Join(descriptor.Platform.OS, descriptor.Platform.Architecture, descriptor.Platform.Variant)
		if _, err := fmt.Fprintf(w, "%s\t%s\n", platform, strings.Join(strings.Fields(content), " ")); err != nil {
			return err
		}
	}
	return nil
}

// A repository is one image name in one registry.
type repository struct {
	base    string // of its URLs, without a slash at the end
	version string // tag or digest
}

func parseReference(reference string) (repository, error) {
	host, rest, ok := strings.Cut(reference, "/")
	if !ok {
		return repository{}, fmt.Errorf("reference %q lacks the registry: write HOST:PORT/REPOSITORY:TAG", reference)
	}
	name, version, ok := strings.Cut(rest, "@")
	if !ok {
		if name, version, ok = strings.Cut(rest, ":"); !ok {
			version = "latest"
		}
	}
	return repository{base: "http://" + host + "/v2/" + name, version: version}, nil
}

// file returns the content of a file in the image that the manifest at descriptor describes.
// The uppermost layer that holds it counts; whiteouts are not considered.
func (r repository) file(ctx context.Context, descriptor ocispec.Descriptor, file string) (string, error) {
	var manifest ocispec.Manifest
	if err := r.manifest(ctx, descriptor.Digest.String(), &manifest); err != nil {
		return "", err
	}
	for _, layer := range slices.Backward(manifest.Layers) {
		content, err := r.fileInLayer(ctx, layer, strings.TrimPrefix(path.Clean(file), "/"))
		if !errors.Is(err, os.ErrNotExist) {
			return content, err
		}
	}
	return "", fmt.Errorf("no layer holds %s", file)
}

// fileInLayer returns an error that is os.ErrNotExist when the layer does not hold the file.
func (r repository) fileInLayer(ctx context.Context, layer ocispec.Descriptor, file string) (string, error) {
	body, err := r.get(ctx, "/blobs/"+layer.Digest.String(), "")
	if err != nil {
		return "", err
	}
	defer body.Close()
	var stream io.Reader = bufio.NewReader(body)
	if strings.HasSuffix(layer.MediaType, "gzip") {
		if stream, err = gzip.NewReader(stream); err != nil {
			return "", fmt.Errorf("layer %s: %w", layer.Digest, err)
		}
	}
	for archive := tar.NewReader(stream); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return "", os.ErrNotExist
		}
		if err != nil {
			return "", fmt.Errorf("layer %s: %w", layer.Digest, err)
		}
		if header.Typeflag == tar.TypeReg && path.Clean(header.Name) == file {
			content, err := io.ReadAll(io.LimitReader(archive, maxFile))
			return string(content), err
		}
	}
}

// manifest decodes an index or a manifest into value.
func (r repository) manifest(ctx context.Context, version string, value any) error {
	body, err := r.get(ctx, "/manifests/"+version, strings.Join([]string{
		ocispec.MediaTypeImageIndex,
		ocispec.MediaTypeImageManifest,
		"application/vnd.docker.distribution.manifest.list.v2+json",
		"application/vnd.docker.distribution.manifest.v2+json",
	}, ", "))
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(io.LimitReader(body, maxManifest)).Decode(value); err != nil {
		return fmt.Errorf("manifest %s: %w", version, err)
	}
	return nil
}

func (r repository) get(ctx context.Context, suffix, accept string) (io.ReadCloser, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, r.base+suffix, nil)
	if err != nil {
		return nil, err
	}
	if accept != "" {
		request.Header.Set("Accept", accept)
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		_ = response.Body.Close()
		return nil, fmt.Errorf("GET %s: the registry answers %s", request.URL, response.Status)
	}
	return response.Body, nil
}
