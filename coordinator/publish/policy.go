package publish

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Mode is what happens to a publication that a tag's rule forbids.
type Mode string

// Off does not look: the ledger is neither asked nor written, which is fastest.
// Warn records the tag, and tells the client what Enforce would have refused.
const (
	Off     Mode = "off"
	Warn    Mode = "warn"
	Enforce Mode = "enforce"
)

// ParseMode reads a mode.
func ParseMode(s string) (Mode, error) {
	if m := Mode(s); slices.Contains([]Mode{Off, Warn, Enforce}, m) {
		return m, nil
	}
	return "", fmt.Errorf("reading the mode %q: off, warn and enforce are possible", shorten(s))
}

// Semver is, among the patterns of mutable tags, the one for the aliases of a
// semantic version: 1, v1, 1.2 and v1.2. No tag can be called that.
const Semver = "@semver"

// DefaultMutable are the tags that move when nothing else is said.
var DefaultMutable = []string{"latest", "main", "master", "edge", "nightly", "dev", Semver}

const (
	// maxPattern bounds a pattern in bytes, maxPatterns how many a rule has.
	maxPattern  = 512
	maxPatterns = 256
)

// Rule is the policy of some repositories. Empty fields are the Policy's defaults.
type Rule struct {
	// Repository is a pattern of whole names, as they are with host:
	// "docker.io/library/alpine". In a component, "*" is any run of characters
	// without "/"; a component "**" is any number of components, none included.
	Repository string
	// Push is for the builds of the endpoint, Jobs for submitted jobs.
	Push, Jobs Mode
	// Mutable are the patterns of tags that may move, in which "*" is any run of
	// characters; nil: the default. Others, once published, mean one digest for good.
	Mutable []string
}

// ParseRule reads a rule as flags have it, in any order:
// "repository=registry.example.com/app/**,push=enforce,jobs=enforce,mutable=latest;main;v*".
// Only the repository is required. "mutable=" without a pattern lets no tag move.
func ParseRule(s string) (Rule, error) {
	var r Rule
	seen := map[string]bool{}
	for field := range strings.SplitSeq(s, ",") {
		key, value, ok := strings.Cut(field, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok || seen[key] {
			return Rule{}, fmt.Errorf("reading the tag policy %q: %q is no KEY=VALUE, or its key comes twice", shorten(s), shorten(field))
		}
		seen[key] = true
		if err := r.read(key, value); err != nil {
			return Rule{}, fmt.Errorf("reading the tag policy %q: %w", shorten(s), err)
		}
	}
	if r.Repository == "" {
		return Rule{}, fmt.Errorf("reading the tag policy %q: it names no repository: start it with repository=PATTERN", shorten(s))
	}
	return r, nil
}

func (r *Rule) read(key, value string) (err error) {
	switch key {
	case "repository":
		r.Repository = value
		return checkRepository(value)
	case "push":
		r.Push, err = ParseMode(value)
	case "jobs":
		r.Jobs, err = ParseMode(value)
	case "mutable":
		r.Mutable, err = parseMutable(value)
	default:
		err = fmt.Errorf("the key %q is none of repository, push, jobs, mutable", shorten(key))
	}
	return err
}

// String is what ParseRule reads.
func (r Rule) String() string {
	out := "repository=" + r.Repository
	if r.Push != "" {
		out += ",push=" + string(r.Push)
	}
	if r.Jobs != "" {
		out += ",jobs=" + string(r.Jobs)
	}
	if r.Mutable != nil {
		out += ",mutable=" + strings.Join(r.Mutable, ";")
	}
	return out
}

var (
	component  = regexp.MustCompile(`^(\*\*|[A-Za-z0-9._:\-*\[\]]+)$`)
	tagPattern = regexp.MustCompile(`^(@semver|[A-Za-z0-9_*][A-Za-z0-9_.\-*]{0,127})$`)
)

func checkRepository(pattern string) error {
	if len(pattern) > maxPattern {
		return fmt.Errorf("the repository pattern has %d bytes, at most %d are possible", len(pattern), maxPattern)
	}
	for c := range strings.SplitSeq(pattern, "/") {
		if !component.MatchString(c) || c != "**" && strings.Contains(c, "**") {
			return fmt.Errorf(`the repository pattern %q has the component %q: names, * within them, and ** alone are possible`, pattern, c)
		}
	}
	return nil
}

func parseMutable(list string) ([]string, error) {
	patterns := []string{}
	if list == "" {
		return patterns, nil
	}
	for p := range strings.SplitSeq(list, ";") {
		p = strings.TrimSpace(p)
		if !tagPattern.MatchString(p) {
			return nil, fmt.Errorf("the mutable tag %q is no tag, pattern with * or %s", shorten(p), Semver)
		}
		patterns = append(patterns, p)
	}
	if len(patterns) > maxPatterns {
		return nil, fmt.Errorf("%d mutable tags, at most %d are possible", len(patterns), maxPatterns)
	}
	return patterns, nil
}

// Policy says which tags may move. Its zero value is the default: jobs obey,
// builds are warned, and DefaultMutable may move.
type Policy struct {
	// Rules in order: the first one whose Repository matches counts.
	Rules []Rule
	// Push and Jobs are the modes where no rule says another; empty: Warn and Enforce.
	Push, Jobs Mode
	// Mutable, where no rule says another; nil: DefaultMutable.
	Mutable []string
}

// Door is where a publication comes from.
type Door string

// The doors of the farm.
const (
	Endpoint Door = "endpoint"
	Jobs     Door = "job"
)

// For returns what counts for a repository, by its whole name, at a door: the mode,
// and the patterns of its mutable tags.
func (p Policy) For(door Door, repository string) (Mode, []string) {
	rule := Rule{}
	for _, r := range p.Rules {
		if MatchRepository(r.Repository, repository) {
			rule = r
			break
		}
	}
	mode := or(rule.Push, p.Push, Warn)
	if door == Jobs {
		mode = or(rule.Jobs, p.Jobs, Enforce)
	}
	switch {
	case rule.Mutable != nil:
		return mode, rule.Mutable
	case p.Mutable != nil:
		return mode, p.Mutable
	}
	return mode, DefaultMutable
}

// Strictest is the strictest mode that any repository may have at a door.
func (p Policy) Strictest(door Door) Mode {
	order := []Mode{Off, Warn, Enforce}
	mode, _ := Policy{Push: p.Push, Jobs: p.Jobs}.For(door, "")
	strictest := slices.Index(order, mode)
	for _, r := range p.Rules {
		mode, _ := Policy{Rules: []Rule{{Repository: "**", Push: r.Push, Jobs: r.Jobs}}, Push: p.Push, Jobs: p.Jobs}.For(door, "")
		strictest = max(strictest, slices.Index(order, mode))
	}
	return order[strictest]
}

func or(modes ...Mode) Mode {
	return modes[slices.IndexFunc(modes, func(m Mode) bool { return m != "" })]
}

// MayMove tells whether one of the patterns makes a tag mutable.
func MayMove(patterns []string, tag string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		return p == Semver && alias.MatchString(tag) || matchRun(p, tag)
	})
}

var alias = regexp.MustCompile(`^v?(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8}))?$`)

// MatchRepository tells whether a pattern, as Rule has it, is for a name.
func MatchRepository(pattern, name string) bool {
	return matchComponents(strings.Split(pattern, "/"), strings.Split(name, "/"))
}

// matchComponents remembers the last "**" and lets it take one component more
// whenever what follows does not match: earlier ones need never be tried again.
func matchComponents(pattern, name []string) bool {
	p, n, star, from := 0, 0, -1, 0
	for n < len(name) {
		switch {
		case p < len(pattern) && pattern[p] == "**":
			star, from = p, n
			p++
		case p < len(pattern) && matchRun(pattern[p], name[n]):
			p++
			n++
		case star >= 0:
			from++
			p, n = star+1, from
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == "**" {
		p++
	}
	return p == len(pattern)
}

// matchRun matches "*" against any run of bytes, in the same way.
func matchRun(pattern, s string) bool {
	p, n, star, from := 0, 0, -1, 0
	for n < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, from = p, n
			p++
		case p < len(pattern) && pattern[p] == s[n]:
			p++
			n++
		case star >= 0:
			from++
			p, n = star+1, from
		default:
			return false
		}
	}
	return strings.Trim(pattern[p:], "*") == ""
}

// shorten keeps what came from outside readable in an error.
func shorten(s string) string {
	if len(s) <= maxPattern {
		return s
	}
	return s[:maxPattern] + "…"
}
