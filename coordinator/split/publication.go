package split

import (
	"slices"
	"strconv"
	"strings"

	"github.com/distribution/reference"
	"github.com/moby/buildkit/exporter/containerimage/exptypes"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// maxNames bounds the references of one image.
	maxNames = 1000
	// maxReference bounds a reference in bytes: a host, a repository of at most
	// 255, a tag of at most 128, a digest.
	maxReference = 1 << 10
	// anyName leaves an image's name to the frontend.
	anyName = "*"
)

// Publication is what remains to be done once every leg has exported its part
// of an image: the index, under the names that the client gave.
type Publication struct {
	// Name is what the exporter calls the image: the names, separated by commas.
	Name string
	// Names are the references to publish, none when nothing is pushed.
	Names []string
	// ByDigest publishes under the digest only: Names are repositories then.
	ByDigest bool
	// Insecure allows plain HTTP and unknown certificates.
	Insecure bool
}

// imageAttrs are the attributes that name an image.
type imageAttrs struct {
	name               string
	own                string // by which the exporter overrides the frontend's choice
	push               bool
	byDigest, insecure bool
	dangling           string // prefix of a further name, which ends in the digest
	danglingEmptyOnly  bool
}

// readName reads what names the image of an archive, too.
func (i *imageAttrs) readName(k, v string) {
	switch exptypes.ImageExporterOptKey(k) {
	case exptypes.OptKeyName:
		i.name = v
	case exptypes.ExporterImageNameKey:
		i.own = v
	}
}

// readPush reads how an image is pushed.
func (i *imageAttrs) readPush(k, v string) (err error) {
	switch exptypes.ImageExporterOptKey(k) {
	case exptypes.OptKeyPush:
		i.push, err = flag(k, v)
	case exptypes.OptKeyPushByDigest:
		i.byDigest, err = flag(k, v)
	case exptypes.OptKeyInsecure:
		i.insecure, err = flag(k, v)
	case exptypes.OptKeyDanglingPrefix:
		i.dangling = v
	case exptypes.OptKeyDanglingEmptyOnly:
		i.danglingEmptyOnly, err = flag(k, v)
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

// chosen is the image's name once the frontend has returned.
func (i *imageAttrs) chosen(metadata map[string][]byte) string {
	switch n, ok := metadata[exptypes.ExporterImageNameKey]; {
	case i.name != anyName:
		return i.name
	case i.own != "":
		return i.own
	case ok:
		return string(n)
	}
	return i.name
}

// dangles tells whether the image gets a name that ends in its digest.
func (i *imageAttrs) dangles(name string) bool {
	return i.dangling != "" && (!i.danglingEmptyOnly || name == "")
}

// publication reads the references to publish, but for one that ends in the digest.
func (i *imageAttrs) publication(name string) (Publication, error) {
	out := Publication{Name: name, ByDigest: i.byDigest, Insecure: i.insecure}
	if !i.push || name == "" {
		return out, nil
	}
	if n := strings.Count(name, ",") + 1; n > maxNames {
		return out, status.Errorf(codes.InvalidArgument, "reading the image's names: %d names, at most %d are possible", n, maxNames)
	}
	for name := range strings.SplitSeq(name, ",") {
		if len(name) > maxReference {
			return out, status.Errorf(codes.InvalidArgument, "reading the image's name %q: %d bytes, at most %d are possible", shorten(name, maxName), len(name), maxReference)
		}
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return out, status.Errorf(codes.InvalidArgument, "reading the image's name %q: %v", name, err)
		}
		if i.byDigest && !reference.IsNameOnly(named) {
			return out, status.Errorf(codes.InvalidArgument, "can't push tagged ref %s by digest", named)
		}
		out.Names = append(out.Names, name)
	}
	return out, nil
}

// repositories are the names without tags, as the client spells them: its
// spelling ends up in the attestations' subjects.
func (p Publication) repositories() string {
	var repos []string
	for _, name := range p.Names {
		named, err := reference.ParseNormalizedNamed(name)
		if err != nil { // publication has read it
			continue
		}
		repo := named.Name()
		if familiar := reference.FamiliarName(named); strings.HasPrefix(name, familiar) {
			repo = familiar
		}
		if !slices.Contains(repos, repo) {
			repos = append(repos, repo)
		}
	}
	return strings.Join(repos, ",")
}

// byDigestOnly makes the attributes those of a leg, which pushes to repositories.
func (i *imageAttrs) byDigestOnly(attrs map[string]string) {
	name := i.chosen(nil)
	if name != anyName {
		p, err := i.publication(name)
		if err != nil { // the plan has read it
			return
		}
		if i.dangles(name) {
			p.Names = append(p.Names, i.dangling)
		}
		if len(p.Names) == 0 {
			return
		}
		name = p.repositories()
	}
	attrs[string(exptypes.OptKeyName)] = name
	attrs[string(exptypes.OptKeyPushByDigest)] = "true"
	delete(attrs, string(exptypes.OptKeyDanglingPrefix))
	delete(attrs, string(exptypes.OptKeyDanglingEmptyOnly))
}

// Publication returns how the merged index of an image is published, given the
// metadata of the frontend's result. Errors are InvalidArgument.
func (e Export) Publication(metadata map[string][]byte, index digest.Digest) (Publication, error) {
	p, err := e.image.publication(e.image.chosen(metadata))
	if err != nil || e.Kind != KindImage || !e.image.dangles(p.Name) {
		return p, err
	}
	name := e.image.dangling + "@" + index.String()
	if e.image.push {
		p.Names = append(p.Names, name)
	}
	if p.Name != "" {
		name = p.Name + "," + name
	}
	p.Name = name
	return p, nil
}

// ArchiveNames returns the references that an archive's index is listed under,
// none for an image without a name. Errors are Unknown, and BuildKit's.
func (e Export) ArchiveNames(metadata map[string][]byte) ([]string, error) {
	name := e.image.chosen(metadata)
	if name == "" {
		return nil, nil
	}
	var names []string
	for n := range strings.SplitSeq(name, ",") {
		named, err := reference.ParseNormalizedNamed(n)
		if err != nil {
			return nil, status.Errorf(codes.Unknown, "failed to parse %s: %v", shorten(n, maxReference), err)
		}
		names = append(names, reference.TagNameOnly(named).String())
	}
	return names, nil
}
