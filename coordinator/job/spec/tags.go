package spec

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"text/template/parse"
	"time"

	"github.com/distribution/reference"

	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// shortSHA is how many digits {{.ShortSHA}} has: as many as git shows at least.
	// In a large repository two commits may share them; GitSHA never does.
	shortSHA = 7
	// maxTagPart is the length of the longest tag that registries take.
	maxTagPart = 128
)

// semver is https://semver.org, section 2, 9 and 10, after an optional "v".
var semver = regexp.MustCompile(`^v?((0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?)$`)

// fields are what templates may ask for, by name: the value, or why there is none.
var fields = map[string]func(*archfarmv1.Source, time.Time) (string, error){
	"GitSHA":   func(s *archfarmv1.Source, _ time.Time) (string, error) { return commit(s, len(s.GetCommit())) },
	"ShortSHA": func(s *archfarmv1.Source, _ time.Time) (string, error) { return commit(s, shortSHA) },
	"Branch":   func(s *archfarmv1.Source, _ time.Time) (string, error) { return branch(s) },
	"Tag":      func(s *archfarmv1.Source, _ time.Time) (string, error) { return gitTag(s) },
	"Date":     func(_ *archfarmv1.Source, now time.Time) (string, error) { return now.UTC().Format("20060102"), nil },
	"Version":  func(s *archfarmv1.Source, _ time.Time) (string, error) { return version(s) },
	"Major":    func(s *archfarmv1.Source, _ time.Time) (string, error) { return part(s, 2) },
	"Minor":    func(s *archfarmv1.Source, _ time.Time) (string, error) { return part(s, 3) },
	"Patch":    func(s *archfarmv1.Source, _ time.Time) (string, error) { return part(s, 4) },
}

// sample is a source that has everything, for trying templates.
var sample = &archfarmv1.Source{Commit: strings.Repeat("0123456789", 4), Branch: "main", Tag: "v1.2.3"}

// Tags fills in the tags of a job and returns them in full, each once, in the order
// given: "app" is docker.io/library/app:latest. What templates may name:
//
//	GitSHA                 the commit, in full
//	ShortSHA               its first 7 digits
//	Branch, Tag            of git, each character that a tag cannot have as '-'
//	Date                   now, in UTC, as 20060102
//	Version                the git tag's semantic version, without "v", '+' as '_'
//	Major, Minor, Patch    its parts, unless it is a pre-release's
//
// A tag that cannot be filled in is a fault which says what is missing; errors are
// as those of Validate.
func Tags(spec *archfarmv1.JobSpec, source *archfarmv1.Source, now time.Time) ([]string, error) {
	f := &faults{}
	var out []string
	for i, text := range spec.GetTags() {
		tag, err := fill(text, source, now)
		if err != nil {
			f.err(at("spec.tags", i), err)
			continue
		}
		if !slices.Contains(out, tag) {
			out = append(out, tag)
		}
	}
	if err := f.status("filling in the job's tags"); err != nil {
		return nil, err
	}
	return out, nil
}

func checkTags(f *faults, list []string) {
	if len(list) > MaxTags {
		f.add("spec.tags", "%d tags, at most %d are possible", len(list), MaxTags)
		return
	}
	for i, text := range list {
		_, err := fill(text, sample, time.Unix(0, 0))
		f.err(at("spec.tags", i), err)
	}
}

// fill returns a tag in full.
func fill(text string, source *archfarmv1.Source, now time.Time) (string, error) {
	nodes, err := parseTag(text)
	if err != nil {
		return "", err
	}
	var out strings.Builder
	for _, node := range nodes {
		if field, ok := strings.CutPrefix(node, "."); ok {
			value, err := fields[field](source, now)
			if err != nil {
				return "", fmt.Errorf("%s needs %w", "{{."+field+"}}", err)
			}
			out.WriteString(value)
			continue
		}
		out.WriteString(node[1:])
	}
	return normalise(out.String())
}

// normalise returns a reference in full.
func normalise(text string) (string, error) {
	named, err := reference.ParseNormalizedNamed(text)
	if err != nil {
		return "", fmt.Errorf("%s: %w", quote(text), err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", fmt.Errorf("%s names a digest: tags are names, and what they mean is known after the build", quote(text))
	}
	return reference.TagNameOnly(named).String(), nil
}

// parseTag takes a template apart: "." and a field's name, or "=" and text.
func parseTag(text string) ([]string, error) {
	switch {
	case strings.TrimSpace(text) == "":
		return nil, errors.New("it is empty (want registry.example.com/app:TAG)")
	case len(text) > MaxTag:
		return nil, fmt.Errorf("%d bytes long, at most %d are possible", len(text), MaxTag)
	}
	trees := map[string]*parse.Tree{}
	tree, err := parse.New("tag").Parse(text, "", "", trees)
	if err != nil {
		return nil, fmt.Errorf("%s: %s; %s", quote(text), tidy(err), known())
	}
	if len(trees) != 1 || trees["tag"] != tree || tree.Root == nil { // it defines others
		return nil, fmt.Errorf("%s: %s", quote(text), known())
	}
	var out []string
	for _, node := range tree.Root.Nodes {
		switch node := node.(type) {
		case *parse.TextNode:
			out = append(out, "="+string(node.Text))
		case *parse.ActionNode:
			field, err := fieldOf(node)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", quote(text), err)
			}
			out = append(out, "."+field)
		default:
			return nil, fmt.Errorf("%s: %s is not possible; %s", quote(text), quote(node.String()), known())
		}
	}
	return out, nil
}

// fieldOf is the field that an action names; it may do nothing else.
func fieldOf(node *parse.ActionNode) (string, error) {
	pipe := node.Pipe
	if pipe == nil || len(pipe.Decl) > 0 || len(pipe.Cmds) != 1 || len(pipe.Cmds[0].Args) != 1 {
		return "", fmt.Errorf("%s is not possible; %s", quote(node.String()), known())
	}
	field, ok := pipe.Cmds[0].Args[0].(*parse.FieldNode)
	if !ok || len(field.Ident) != 1 || fields[field.Ident[0]] == nil {
		return "", fmt.Errorf("%s is unknown; %s", quote(node.String()), known())
	}
	return field.Ident[0], nil
}

func known() string {
	names := slices.Sorted(maps.Keys(fields))
	return "there are {{." + strings.Join(names, "}}, {{.") + "}}"
}

// tidy is an error of the parser without its "template: tag:1: ".
func tidy(err error) string {
	text := strings.TrimPrefix(err.Error(), "template: tag:")
	if _, rest, ok := strings.Cut(text, ": "); ok {
		text = rest
	}
	return shorten(text, 2*maxQuoted)
}

func commit(s *archfarmv1.Source, digits int) (string, error) {
	if len(s.GetCommit()) < max(digits, shortSHA) {
		return "", errors.New("a commit, and the context comes with none: submit a git repository, or a folder in a work tree")
	}
	return s.GetCommit()[:digits], nil
}

func branch(s *archfarmv1.Source) (string, error) {
	if s.GetBranch() == "" {
		return "", errors.New("a branch, and the context is not of one (a git tag, a commit by its digits, or no repository)")
	}
	return fitted(s.GetBranch(), "branch")
}

func gitTag(s *archfarmv1.Source) (string, error) {
	if s.GetTag() == "" {
		return "", errors.New("a git tag, and the context is not of one: submit it with the tag as its ref")
	}
	return fitted(s.GetTag(), "git tag")
}

// fitted makes a name of git's fit for a tag.
func fitted(name, what string) (string, error) {
	out := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_' || r == '.' || r == '-' {
			return r
		}
		return '-'
	}, name)
	out = strings.TrimLeft(out, ".-")
	if out == "" {
		return "", fmt.Errorf("a %s of which a tag can be made: %s has no letter or digit", what, quote(name))
	}
	return out[:min(len(out), maxTagPart)], nil
}

// semantic is a git tag's semantic version, as matched. What is before a slash is a
// part of a repository ("api/v1.2.3").
func semantic(s *archfarmv1.Source) ([]string, error) {
	if s.GetTag() == "" {
		return nil, errors.New("a git tag that is a version, and the context is not of a git tag: submit it with the tag as its ref")
	}
	found := semver.FindStringSubmatch(s.GetTag()[strings.LastIndex(s.GetTag(), "/")+1:])
	if found == nil || len(found[1]) > maxTagPart {
		return nil, fmt.Errorf("a git tag that is a semantic version, as v1.2.3, and this is %s", quote(s.GetTag()))
	}
	return found, nil
}

func version(s *archfarmv1.Source) (string, error) {
	found, err := semantic(s)
	if err != nil {
		return "", err
	}
	return strings.ReplaceAll(found[1], "+", "_"), nil
}

// part is one of a release's numbers. A pre-release has none: app:1 would be given
// to those who wait for releases.
func part(s *archfarmv1.Source, i int) (string, error) {
	found, err := semantic(s)
	if err != nil {
		return "", err
	}
	if found[5] != "" {
		return "", fmt.Errorf("a release's git tag, and %s is a pre-release: tag it with {{.Version}} only", quote(s.GetTag()))
	}
	return found[i], nil
}
