package contextpack

import (
	"archive/tar"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

const (
	defaultDockerfile = "Dockerfile"
	ignoreFile        = ".dockerignore"
	// addedDockerfile is the name of a Dockerfile that is not in the context.
	addedDockerfile = ".archfarm.Dockerfile"
)

// dockerfile is where a folder's Dockerfile is and what follows from that.
type dockerfile struct {
	name  string  // within the context
	added []entry // that are not in the folder
	rules *rules
}

// findDockerfile finds it as buildx does: DIR/Dockerfile, which may be written in
// lower case, or the file that is named.
func findDockerfile(dir, root, named string) (dockerfile, error) {
	file := cmp.Or(named, filepath.Join(dir, defaultDockerfile))
	info, err := os.Stat(file)
	if named == "" && errors.Is(err, fs.ErrNotExist) {
		file = filepath.Join(dir, strings.ToLower(defaultDockerfile))
		info, err = os.Stat(file)
	}
	switch {
	case named == "" && errors.Is(err, fs.ErrNotExist):
		return dockerfile{}, fmt.Errorf("the context %s has no Dockerfile: name it with --file, or another folder", dir)
	case err != nil:
		return dockerfile{}, fmt.Errorf("the Dockerfile: %w", err)
	case !info.Mode().IsRegular():
		return dockerfile{}, fmt.Errorf("the Dockerfile %s is not a file", file)
	}
	own, err := readIgnore(file + ignoreFile)
	if err != nil {
		return dockerfile{}, err
	}
	if own == nil {
		if own, err = readIgnore(filepath.Join(root, ignoreFile)); err != nil {
			return dockerfile{}, err
		}
	}
	rules, err := newRules(own)
	if err != nil {
		return dockerfile{}, err
	}
	rules.keep(ignoreFile)
	if name, ok := within(dir, root, file); ok {
		rules.keep(name)
		rules.keep(name + ignoreFile)
		return dockerfile{name: name, rules: rules}, nil
	}
	added, err := addDockerfile(file, own)
	if err != nil {
		return dockerfile{}, err
	}
	rules.leaveOut(addedDockerfile) // a real file of this name
	rules.leaveOut(addedDockerfile + ignoreFile)
	return dockerfile{name: addedDockerfile, added: added, rules: rules}, nil
}

// within returns the file's path within the folder, if it is there and no link is on
// the way.
func within(dir, root, file string) (string, bool) {
	real, err := realPath(file)
	if err != nil {
		return "", false
	}
	name, err := filepath.Rel(root, real)
	if err != nil || !filepath.IsLocal(name) {
		return "", false
	}
	absDir, err1 := filepath.Abs(dir)
	absFile, err2 := filepath.Abs(file)
	named, err3 := filepath.Rel(absDir, absFile)
	if errors.Join(err1, err2, err3) == nil && filepath.IsLocal(named) && named != name {
		return "", false
	}
	if info, err := os.Lstat(file); err != nil || !info.Mode().IsRegular() {
		return "", false
	}
	return filepath.ToSlash(name), true
}

// addDockerfile makes entries of a Dockerfile from elsewhere and of the rules that
// BuildKit's frontend then takes for it: those that there were, and that neither of
// the two is copied into images.
func addDockerfile(file string, ignore []byte) ([]entry, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("the Dockerfile: %w", err)
	}
	if info.Size() > MaxChunk {
		return nil, fmt.Errorf("the Dockerfile %s has %d bytes: at most %d are possible", file, info.Size(), MaxChunk)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("the Dockerfile: %w", err)
	}
	rules := slices.Concat(ignore, []byte("\n"+addedDockerfile+"\n"+addedDockerfile+ignoreFile+"\n"))
	add := func(name string, b []byte) entry {
		return entry{name: name, kind: tar.TypeReg, mode: 0o644, size: int64(len(b)), mtime: info.ModTime().Unix(), content: inMemory(b)}
	}
	return []entry{add(addedDockerfile, text), add(addedDockerfile+ignoreFile, rules)}, nil
}

// readIgnore returns nil when the file does not exist.
func readIgnore(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the rules of what not to send: %w", err)
	}
	return append([]byte{}, b...), nil
}

// rules say what of a folder is left out, as BuildKit understands .dockerignore.
type rules struct {
	matcher *patternmatcher.PatternMatcher
	// exceptions are what "!" patterns begin with, up to their first wildcard;
	// anywhere when one begins with a wildcard.
	exceptions []string
	anywhere   bool
	kept, gone map[string]bool
	parents    map[string]bool // of what is kept
}

// decision is what the rules say of a path, and what they need to know for those in it.
type decision struct {
	out  bool
	info patternmatcher.MatchInfo
}

var undecided decision

func newRules(ignore []byte) (*rules, error) {
	patterns, err := ignorefile.ReadAll(bytes.NewReader(ignore))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ignoreFile, err)
	}
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", ignoreFile, err)
	}
	r := &rules{matcher: m, kept: map[string]bool{}, gone: map[string]bool{}, parents: map[string]bool{}}
	for _, p := range m.Patterns() {
		if !p.Exclusion() {
			continue
		}
		text := filepath.ToSlash(p.String())
		if i := strings.IndexAny(text, `*?[\^`); i >= 0 {
			text = text[:strings.LastIndex(text[:i], "/")+1]
		}
		r.exceptions = append(r.exceptions, strings.TrimSuffix(text, "/"))
		r.anywhere = r.anywhere || text == ""
	}
	return r, nil
}

// keep a file whatever the patterns say.
func (r *rules) keep(name string) {
	r.kept[name] = true
	for i, c := range name {
		if c == '/' {
			r.parents[name[:i]] = true
		}
	}
}

func (r *rules) leaveOut(name string) { r.gone[name] = true }

func (r *rules) decide(name string, parent decision) (decision, error) {
	out, info, err := r.matcher.MatchesUsingParentResults(filepath.FromSlash(name), parent.info)
	if err != nil {
		return decision{}, fmt.Errorf("%s: %w", ignoreFile, err)
	}
	return decision{out: out && !r.kept[name] || r.gone[name], info: info}, nil
}

// mayHoldExceptions tells whether something in a folder that is left out might not be.
func (r *rules) mayHoldExceptions(dir string) bool {
	if r.anywhere || r.parents[dir] {
		return true
	}
	return slices.ContainsFunc(r.exceptions, func(e string) bool {
		return e == dir || strings.HasPrefix(e, dir+"/") || strings.HasPrefix(dir, e+"/")
	})
}
