package gitref

import (
	"bufio"
	"bytes"
	"cmp"
	"maps"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/edit"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// peeled ends the name of what an annotated tag is of.
	peeled = "^{}"
	// minDigits of an abbreviated commit, as many as git shows at least.
	minDigits = 7
	// maxSimilar refs are named in an error.
	maxSimilar = 8
)

var digits = regexp.MustCompile(`^[0-9a-f]{7,63}$`)

// refs is what a repository has.
type refs struct {
	head string            // that HEAD stands for; empty when it is detached
	ids  map[string]string // by full name
}

// parseRefs reads the output of git ls-remote, as far as it is well-formed.
func parseRefs(out []byte) refs {
	r := refs{ids: map[string]string{}}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		id, name, ok := strings.Cut(lines.Text(), "\t")
		if !ok || CheckRef(strings.TrimSuffix(name, peeled)) != nil {
			continue
		}
		if target, symbolic := strings.CutPrefix(id, "ref: "); symbolic {
			if name == "HEAD" && strings.HasPrefix(target, "refs/heads/") && CheckRef(target) == nil {
				r.head = target
			}
			continue
		}
		if objectID.MatchString(id) {
			r.ids[name] = strings.ToLower(id)
		}
	}
	return r
}

// id is the commit of a ref, or of what an annotated tag is of.
func (r refs) id(name string) string { return cmp.Or(r.ids[name+peeled], r.ids[name]) }

// choose returns what a ref stands for, nil for nothing. A branch and a tag of one
// name, of different commits, are an error: git and BuildKit prefer different ones.
func (r refs) choose(ref string) (*archfarmv1.Source, error) {
	if strings.HasPrefix(ref, "refs/") {
		return r.named(ref), nil
	}
	branch, tag := r.named("refs/heads/"+ref), r.named("refs/tags/"+ref)
	switch {
	case branch != nil && tag != nil && branch.GetCommit() != tag.GetCommit():
		return nil, status.Errorf(codes.InvalidArgument, "%q is a branch and a tag, of different commits: say refs/heads/%s or refs/tags/%s", ref, ref, ref)
	case branch != nil && tag != nil:
		branch.Tag = tag.GetTag()
		return branch, nil
	}
	return cmp.Or(branch, tag, r.named("refs/"+ref)), nil
}

// named is the ref of this full name, nil for none.
func (r refs) named(name string) *archfarmv1.Source {
	id := r.id(name)
	if id == "" {
		return nil
	}
	source := &archfarmv1.Source{Commit: id}
	if branch, ok := strings.CutPrefix(name, "refs/heads/"); ok {
		source.Branch = branch
	} else if tag, ok := strings.CutPrefix(name, "refs/tags/"); ok {
		source.Tag = tag
	}
	return source
}

// abbreviated returns the only commit at a ref that begins with these digits.
func (r refs) abbreviated(ref string) (*archfarmv1.Source, error) {
	short := strings.ToLower(ref)
	if len(short) < minDigits || !digits.MatchString(short) {
		return nil, unknown(ref, r.similar(ref))
	}
	found := map[string]bool{}
	for name := range r.ids {
		if id := r.id(strings.TrimSuffix(name, peeled)); strings.HasPrefix(id, short) {
			found[id] = true
		}
	}
	switch list := slices.Sorted(maps.Keys(found)); len(list) {
	case 0:
		return nil, unknown(ref, r.similar(ref))
	case 1:
		return &archfarmv1.Source{Commit: list[0]}, nil
	default:
		return nil, status.Errorf(codes.InvalidArgument, "%d commits begin with %s, as %s and %s: give more digits", len(list), ref, list[0], list[1])
	}
}

// similar names branches and tags of which the ref may be a misspelling, or else
// some that there are.
func (r refs) similar(ref string) []string {
	type near struct {
		name     string
		distance int
	}
	var all []near
	for full := range r.ids {
		name, ok := strings.CutPrefix(full, "refs/heads/")
		if !ok {
			name, ok = strings.CutPrefix(full, "refs/tags/")
		}
		if ok && !strings.HasSuffix(name, peeled) && len(name) <= 128 && len(all) < 5000 {
			all = append(all, near{name, distance(name, ref)})
		}
	}
	slices.SortFunc(all, func(a, b near) int { return cmp.Or(a.distance-b.distance, cmp.Compare(a.name, b.name)) })
	var names []string
	for _, n := range all {
		if !slices.Contains(names, n.name) && len(names) < maxSimilar {
			names = append(names, n.name)
		}
	}
	return names
}

// distance is that of at most 128 bytes of each; 0 also where one holds the other.
func distance(a, b string) int {
	a, b = a[:min(len(a), 128)], b[:min(len(b), 128)]
	if strings.Contains(a, b) || strings.Contains(b, a) {
		return 0
	}
	return edit.Distance(a, b)
}
