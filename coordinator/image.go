package coordinator

import (
	"encoding/base64"
	"encoding/json"
	"maps"
	"strings"

	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/export"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/manifest"
)

// image is what one exporter's image became.
type image struct {
	split.Export
	publish.Content
	publication split.Publication
	names       []string // that an archive lists
	response    map[string]string
}

// assemble makes one of the legs' images, given the metadata of the build's result.
func assemble(made dispatch.Image, metadata map[string][]byte) (i image, err error) {
	i.Export = made.Export
	if i.Content, err = content(made); err != nil {
		return i, err
	}
	var name string
	switch made.Kind {
	case split.KindArchive:
		if i.names, err = made.ArchiveNames(metadata); err != nil {
			return i, err
		}
		name = strings.Join(i.names, ",")
	default:
		if i.publication, err = made.Publication(metadata, i.Descriptor.Digest); err != nil {
			return i, err
		}
		name = i.publication.Name
	}
	switch {
	case !made.Sole:
		i.response, err = respond(i.Descriptor, name, made.Config)
	case made.Kind == split.KindImage && made.Naming: // the rest the leg has answered
		i.response = map[string]string{exptypes.ExporterImageNameKey: name}
	}
	return i, err
}

// content is the index over the legs' images, or the one image that there is.
func content(made dispatch.Image) (publish.Content, error) {
	if made.Plain && len(made.Legs) == 1 {
		return publish.Content{Descriptor: made.Legs[0].Descriptor, Blob: made.Legs[0].Blob}, nil
	}
	index, err := manifest.Assemble(made.Legs, made.Annotations)
	if err != nil {
		return publish.Content{}, err
	}
	if created := made.Created(); created != "" && made.Kind == split.KindArchive {
		annotations := map[string]string{ocispecs.AnnotationCreated: created}
		maps.Copy(annotations, index.Descriptor.Annotations)
		index.Descriptor.Annotations = annotations
	}
	return publish.Content{Descriptor: index.Descriptor, Blob: index.Blob}, nil
}

// respond is what BuildKit's exporters answer of an image. Config is of one that
// is no index, which has none.
func respond(desc ocispecs.Descriptor, name, config string) (map[string]string, error) {
	raw, err := json.Marshal(desc)
	if err != nil {
		return nil, err
	}
	out := map[string]string{
		exptypes.ExporterImageDigestKey:     desc.Digest.String(),
		exptypes.ExporterImageDescriptorKey: base64.StdEncoding.EncodeToString(raw),
	}
	if name != "" {
		out[exptypes.ExporterImageNameKey] = name
	}
	if config != "" {
		out[exptypes.ExporterImageConfigDigestKey] = config
	}
	return out, nil
}

// archive is the image on its way to the client.
func (i image) archive() export.Archive {
	return export.Archive{
		Exporter: i.Exporter, Descriptor: i.Descriptor, Blob: i.Blob, Names: i.names, Response: i.response, Store: i.Store,
	}
}

// step is how sending the image shows in the build's progress.
func (i image) step() string {
	if i.Store {
		return "copying content"
	}
	return "sending tarball"
}
