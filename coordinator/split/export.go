package split

import (
	"maps"
	"slices"
	"strconv"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Attributes of exporters (BuildKit, exporter/oci and exporter/local).
const (
	attrTar           = "tar"
	attrMode          = "mode"
	attrName          = "name"
	attrPlatformSplit = "platform-split"
)

// Kind is how the shares of a build's legs in one export become what a single
// buildkitd would have written.
type Kind int

const (
	// KindForward needs no merging: what each leg sends is the client's as it is,
	// or the leg itself refuses it, in buildkitd's words.
	KindForward Kind = iota
	// KindImage is pushed by the legs, by digest only, and gets an index.
	KindImage
	// KindArchive is an OCI layout that holds an index and what all legs wrote.
	KindArchive
	// KindTar is one archive of the legs' files, leg after leg.
	KindTar
	// KindTree is one tree of files, made of those of the legs.
	KindTree
	// KindPushed is pushed by the only leg, tags and all; then the farm is told.
	KindPushed
)

// Export is one of the client's exporters, as far as several legs matter to it, or the
// farm's part in an image's tags.
type Export struct {
	// Exporter is its place among the client's exporters: its id in sessions.
	Exporter int
	Kind     Kind
	// Index and IndexDescriptor are the client's annotations of an image's merged index.
	Index, IndexDescriptor map[string]string
	// Store puts a KindArchive into the client's content store, not into a file.
	Store bool
	// Apart gives each platform of a KindTree a folder of its own.
	Apart bool
	// Sole: the only leg's image is the whole, of which nothing but its tags is missing.
	Sole bool
	// Naming: the build is answered with this image's name.
	Naming bool

	attrs map[string]string
	image imageAttrs
}

// Captured tells whether what the legs send to the client must be held up.
func (e Export) Captured() bool {
	return e.Kind == KindArchive || e.Kind == KindTar || e.Kind == KindTree
}

// Indexed tells whether the export has an index over the legs' images.
func (e Export) Indexed() bool { return e.Kind == KindImage || e.Kind == KindArchive }

// ExportPlan is how a build of several legs is exported, or one whose only leg does not
// do everything by itself.
type ExportPlan struct {
	exporters []*controlapi.Exporter
	exports   []Export
}

// Exporters returns the exporters of a request in today's form.
func Exporters(req *controlapi.SolveRequest) []*controlapi.Exporter {
	if len(req.GetExporters()) > 0 || req.GetExporterDeprecated() == "" { // clients before BuildKit 0.13 send it
		return req.GetExporters()
	}
	return []*controlapi.Exporter{{Type: req.GetExporterDeprecated(), Attrs: req.GetExporterAttrsDeprecated()}}
}

// PlanExports decides how several legs export what the client asked for. Errors
// are InvalidArgument.
func PlanExports(exporters []*controlapi.Exporter, legs []Leg) (*ExportPlan, error) {
	plan := &ExportPlan{exporters: exporters}
	for i, e := range exporters {
		export := Export{Exporter: i, attrs: e.GetAttrs()}
		var err error
		switch e.GetType() {
		case client.ExporterImage:
			export.Kind = KindImage
			err = export.readImage(legs)
		case client.ExporterOCI:
			export.Kind = KindArchive
			err = export.readImage(legs)
			if whole, flagErr := strconv.ParseBool(export.attrs[attrTar]); flagErr == nil { // what is no flag, each leg refuses
				export.Store = !whole
			}
		case client.ExporterTar:
			export.Kind = KindTar
		case client.ExporterLocal:
			export.readLocal()
		}
		if err != nil {
			return nil, err
		}
		plan.exports = append(plan.exports, export)
	}
	return plan, nil
}

// readLocal finds out whether the legs' folders must be written as one. Values
// that are none are refused by each leg.
func (e *Export) readLocal() {
	apart, err := strconv.ParseBool(e.attrs[attrPlatformSplit])
	e.Apart = apart || err != nil
	mode, err := client.ParseLocalExporterMode(e.attrs[attrMode])
	if (err == nil && mode == client.LocalExporterModeDelete) || !e.Apart {
		e.Kind = KindTree
	}
}

// readImage reads what names an image and what is about its index.
func (e *Export) readImage(legs []Leg) error {
	e.Index, e.IndexDescriptor = map[string]string{}, map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(e.attrs)) { // the same error each time
		annotation, ok, err := exptypes.ParseAnnotationKey(k)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "reading the exporter's annotation %q: %v", k, err)
		}
		if p := annotation.PlatformString(); p != "" && !slices.ContainsFunc(legs, func(l Leg) bool { return l.String() == p }) {
			// No leg would get it, and nobody would notice. BuildKit's words.
			return status.Errorf(codes.InvalidArgument, "invalid annotation: no platform %s found in source", p)
		}
		switch {
		case ok && annotation.Type == exptypes.AnnotationIndex:
			e.Index[annotation.Key] = e.attrs[k]
		case ok && annotation.Type == exptypes.AnnotationIndexDescriptor:
			e.IndexDescriptor[annotation.Key] = e.attrs[k]
		case !ok:
			e.image.readName(k, e.attrs[k])
			if e.Kind == KindImage {
				err = e.image.readPush(k, e.attrs[k])
			}
		}
		if err != nil {
			return err
		}
	}
	if name := e.image.chosen(nil); e.Pushes() && name != anyName {
		_, err := e.image.publication(name)
		return err
	}
	return nil
}

// Pushes tells whether the export puts anything into a registry.
func (e Export) Pushes() bool { return e.Kind == KindImage && e.image.push }

// Exports lists the plan's exports, in the order of the exporters.
func (p *ExportPlan) Exports() []Export {
	if p == nil {
		return nil
	}
	return p.exports
}

// Describing is the exporter whose image the answer of a leg describes: of
// several, the last. It is -1 when no exporter makes an image.
func (p *ExportPlan) Describing() int {
	for i, e := range slices.Backward(p.exporters) {
		switch e.GetType() {
		case client.ExporterImage, client.ExporterOCI, client.ExporterDocker:
			return i
		}
	}
	return -1
}

// Captures tells whether anything that the legs send to the client must be held up.
func (p *ExportPlan) Captures() bool {
	return slices.ContainsFunc(p.Exports(), Export.Captured)
}

// Leg returns the exporters of one leg. An image is pushed by its digest only,
// so that no tag moves before every leg has succeeded.
func (p *ExportPlan) Leg(leg Leg) []*controlapi.Exporter {
	out := slices.Clone(p.exporters)
	for i, e := range p.exports {
		if !e.Indexed() {
			continue
		}
		attrs := maps.Clone(e.attrs)
		for k := range attrs { // annotations of other platforms are other legs'
			a, ok, err := exptypes.ParseAnnotationKey(k)
			if ok && err == nil && !e.Sole && a.Platform != nil && a.PlatformString() != platforms.FormatAll(leg.Platform) {
				delete(attrs, k)
			}
		}
		if e.Kind == KindArchive && e.Store {
			delete(attrs, attrTar)
		}
		if e.Pushes() {
			e.image.byDigestOnly(attrs)
		}
		out[i] = &controlapi.Exporter{Type: p.exporters[i].GetType(), Attrs: attrs}
	}
	return out
}

// Metadata returns a result's metadata as the legs get it: without tags in the
// name that the frontend chose, where images are to be pushed under that name.
// Errors are InvalidArgument.
func (p *ExportPlan) Metadata(metadata map[string][]byte) (map[string][]byte, error) {
	for _, e := range p.Exports() {
		if !e.Pushes() || e.image.name != anyName || len(metadata[exptypes.ExporterImageNameKey]) == 0 {
			continue
		}
		chosen, err := e.image.publication(string(metadata[exptypes.ExporterImageNameKey]))
		if err != nil {
			return nil, err
		}
		metadata = maps.Clone(metadata)
		metadata[exptypes.ExporterImageNameKey] = []byte(chosen.repositories())
		return metadata, nil
	}
	return metadata, nil
}
