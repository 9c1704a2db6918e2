package split

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxNames bounds the references of one image.
	maxNames = 1000
	// maxReference bounds a reference in bytes: a host, a repository of at most
	// 255, a tag of at most 128, a digest.
	maxReference = 1 << 10
)

// Publication is what remains to be done once every leg has exported its part
// of an image: the index, under the names that the client gave.
type Publication struct {
	// Name is the exporter's name attribute as the client wrote it.
	Name string
	// Names are the references to publish, none when nothing is pushed.
	Names []string
	// ByDigest publishes under the digest only: Names are repositories then.
	ByDigest bool
	// Insecure allows plain HTTP and unknown certificates.
	Insecure bool
	// Index and IndexDescriptor are annotations of the merged index.
	Index, IndexDescriptor map[string]string
}

// ExportPlan is how a build of several legs is exported.
type ExportPlan struct {
	exporters []*controlapi.Exporter
	image     *imageExport
}

// imageExport is the build's one image exporter.
type imageExport struct {
	Publication
	index int // among the exporters
	attrs map[string]string
	repos []string // Names without tags
	push  bool
}

// Exporters returns the exporters of a request in today's form.
func Exporters(req *controlapi.SolveRequest) []*controlapi.Exporter {
	if len(req.GetExporters()) > 0 || req.GetExporterDeprecated() == "" { // clients before BuildKit 0.13 send it
		return req.GetExporters()
	}
	return []*controlapi.Exporter{{Type: req.GetExporterDeprecated(), Attrs: req.GetExporterAttrsDeprecated()}}
}

// PlanExports decides how several legs export what the client asked for. What
// cannot be merged from several legs is refused with Unimplemented: writing one
// platform and calling it done would be worse.
func PlanExports(exporters []*controlapi.Exporter, legs []Leg) (*ExportPlan, error) {
	plan := &ExportPlan{exporters: exporters}
	for i, e := range exporters {
		switch e.GetType() {
		case client.ExporterImage:
			if plan.image != nil {
				return nil, refuse("several image exporters", legs)
			}
			image, err := planImage(i, e.GetAttrs(), legs)
			if err != nil {
				return nil, err
			}
			plan.image = image
		case client.ExporterLocal:
			if e.GetAttrs()["mode"] == "delete" {
				return nil, refuse("the local exporter with mode=delete", legs)
			}
			if split, err := strconv.ParseBool(e.GetAttrs()["platform-split"]); err == nil && !split {
				return nil, refuse("the local exporter with platform-split=false", legs)
			}
		case "cacheonly":
		default:
			return nil, refuse(fmt.Sprintf("the %q exporter", e.GetType()), legs)
		}
	}
	return plan, nil
}

func refuse(what string, legs []Leg) error {
	names := make([]string, len(legs))
	for i, l := range legs {
		names[i] = l.String()
	}
	return status.Errorf(codes.Unimplemented,
		"exporting %s: %s cannot be written from several platforms by this version of archfarm; push an image (--push), use --output type=local, or build one platform at a time",
		strings.Join(names, ", "), what)
}

func planImage(index int, attrs map[string]string, legs []Leg) (*imageExport, error) {
	image := &imageExport{index: index, attrs: map[string]string{}}
	image.Index, image.IndexDescriptor = map[string]string{}, map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(attrs)) { // the same error each time
		if err := image.attr(k, attrs[k], legs); err != nil {
			return nil, err
		}
	}
	if image.Publication.Name == "*" { // the frontend's choice, known only after the build
		return nil, status.Error(codes.Unimplemented, `exporting an image of several platforms: name="*" is not possible with this version of archfarm; name the image`)
	}
	if !image.push || image.Publication.Name == "" {
		return image, nil
	}
	return image, image.names()
}

// names reads the references to publish.
func (i *imageExport) names() error {
	if n := strings.Count(i.Publication.Name, ",") + 1; n > maxNames {
		return status.Errorf(codes.InvalidArgument, "reading the image's names: %d names, at most %d are possible", n, maxNames)
	}
	for name := range strings.SplitSeq(i.Publication.Name, ",") {
		if len(name) > maxReference {
			return status.Errorf(codes.InvalidArgument, "reading the image's name %q: %d bytes, at most %d are possible", shorten(name, maxName), len(name), maxReference)
		}
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return status.Errorf(codes.InvalidArgument, "reading the image's name %q: %v", name, err)
		}
		if i.ByDigest && !reference.IsNameOnly(named) {
			return status.Errorf(codes.InvalidArgument, "can't push tagged ref %s by digest", named)
		}
		i.Names = append(i.Names, name)
		if repo := familiar(name, named); !slices.Contains(i.repos, repo) {
			i.repos = append(i.repos, repo)
		}
	}
	return nil
}

// familiar is the repository as the client spells it: its spelling ends up in
// the attestations' subjects.
func familiar(name string, named reference.Named) string {
	if repo := reference.FamiliarName(named); strings.HasPrefix(name, repo) {
		return repo
	}
	return named.Name()
}

func (i *imageExport) attr(k, v string, legs []Leg) error {
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
		i.Index[annotation.Key] = v
	case ok && annotation.Type == exptypes.AnnotationIndexDescriptor:
		i.IndexDescriptor[annotation.Key] = v
	default:
		i.attrs[k] = v
	}
	switch exptypes.ImageExporterOptKey(k) {
	case exptypes.OptKeyName:
		i.Publication.Name = v
	case exptypes.OptKeyPush:
		i.push, err = flag(k, v)
	case exptypes.OptKeyPushByDigest:
		i.ByDigest, err = flag(k, v)
	case exptypes.OptKeyInsecure:
		i.Insecure, err = flag(k, v)
	}
	return err
}

func flag(k, v string) (bool, error) {
	if v == "" {
		return true, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, status.Errorf(codes.InvalidArgument, "non-bool value %q specified for %s", v, k)
	}
	return b, nil
}

// Leg returns the exporters of one leg: an image is pushed by its digest only,
// so that no tag moves before every leg has succeeded.
func (e *ExportPlan) Leg(leg Leg) []*controlapi.Exporter {
	out := slices.Clone(e.exporters)
	if e.image == nil {
		return out
	}
	attrs := maps.Clone(e.image.attrs)
	for k := range attrs { // annotations of other platforms are other legs'
		a, ok, err := exptypes.ParseAnnotationKey(k)
		if ok && err == nil && a.Platform != nil && a.PlatformString() != platforms.FormatAll(leg.Platform) {
			delete(attrs, k)
		}
	}
	if len(e.image.repos) > 0 {
		attrs[string(exptypes.OptKeyName)] = strings.Join(e.image.repos, ",")
		attrs[string(exptypes.OptKeyPushByDigest)] = "true"
	}
	out[e.image.index] = &controlapi.Exporter{Type: client.ExporterImage, Attrs: attrs}
	return out
}

// Publication returns what is to be published, and whether the build has an image at all.
func (e *ExportPlan) Publication() (Publication, bool) {
	if e == nil || e.image == nil {
		return Publication{}, false
	}
	return e.image.Publication, true
}
