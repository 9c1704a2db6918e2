package endpoint

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxFilters bounds what a client may filter by, in bytes.
const maxFilters = 64 << 10

func checkFilterSize(list []string) error {
	n := len(list)
	for _, f := range list {
		n += len(f)
	}
	if n > maxFilters {
		return status.Errorf(codes.InvalidArgument, "the filters have %d bytes, at most %d are possible", n, maxFilters)
	}
	return nil
}

// recordFilter is a client's filter of cache records, as containerd's package
// filters defines them: of the strings one must match, of a string all selectors.
// Selectors of the field "worker", which no buildkitd knows, choose workers.
type recordFilter []conjunction

type conjunction []selector

// selector is one of the selectors of a string.
type selector struct {
	text   string
	field  string         // its first part
	worker filters.Filter // set when it chooses workers
}

// parseRecordFilter reads a filter. The error is worded as buildkitd's; what names
// the call as buildkitd does, "diskusage" or "prune".
func parseRecordFilter(what string, list []string) (recordFilter, error) {
	if err := checkFilterSize(list); err != nil {
		return nil, err
	}
	out := make(recordFilter, 0, len(list))
	for _, text := range list {
		parts := cut(text)
		for i, part := range parts {
			parts[i] = singleEquals.ReplaceAllString(part, "$1==$2")
		}
		if _, err := filters.ParseAll(strings.Join(parts, ",")); err != nil {
			return nil, fmt.Errorf("failed to parse %s filters %v: %w", what, list, err)
		}
		c, err := parseSelectors(parts)
		if err != nil {
			return nil, fmt.Errorf("failed to parse %s filters %v: %w", what, list, err)
		}
		out = append(out, c)
	}
	return out, nil
}

// singleEquals is a mistake that is easily made between "docker buildx du
// --filter worker=NAME", which sends two, and buildctl, which sends what it is given.
var singleEquals = regexp.MustCompile(`^(\s*worker\s*)=([^=!~]|$)`)

func parseSelectors(parts []string) (conjunction, error) {
	if len(parts) == 1 && parts[0] == "" { // matches everything
		return nil, nil
	}
	out := make(conjunction, 0, len(parts))
	for _, part := range parts {
		path, err := fieldOf(part)
		if err != nil {
			return nil, err
		}
		s := selector{text: part, field: path[0]}
		if len(path) == 1 && path[0] == "worker" {
			if s.worker, err = filters.Parse(part); err != nil {
				return nil, err
			}
		}
		out = append(out, s)
	}
	return out, nil
}

// fieldOf returns the field that a selector is about: a filter asks for it.
func fieldOf(part string) (path []string, err error) {
	end := 0
	for end < len(part) && !isOperator(part[end]) {
		if isQuote(part[end]) {
			end = afterQuoted(part, end)
		} else {
			end++
		}
	}
	present, err := filters.Parse(strings.TrimSpace(part[:end]))
	if err != nil {
		return nil, err
	}
	present.Match(filters.AdapterFunc(func(asked []string) (string, bool) {
		path = asked
		return "", false
	}))
	if len(path) == 0 {
		return nil, fmt.Errorf("%q names no field: %w", part, errdefs.ErrInvalidArgument)
	}
	return path, nil
}

// of returns what the daemon of that worker is to filter by; ok is false when
// none of its records can match. Ids may be written as the farm shows them.
func (f recordFilter) of(worker string) (list []string, ok bool) {
	if len(f) == 0 {
		return nil, true
	}
	name := filters.AdapterFunc(func([]string) (string, bool) { return worker, true })
	for _, c := range f {
		if slices.ContainsFunc(c, func(s selector) bool { return s.worker != nil && !s.worker.Match(name) }) {
			continue
		}
		var texts []string
		for _, s := range c {
			switch {
			case s.worker != nil:
			case s.field == "id" || s.field == "parents":
				texts = append(texts, untag(s.text, worker))
			default:
				texts = append(texts, s.text)
			}
		}
		list = append(list, strings.Join(texts, ","))
	}
	return list, len(list) > 0
}

// tag is what follows the id of a record in a farm of several workers.
func tag(worker string) string { return "@" + worker }

// untag removes a worker's tag from a selector of ids. What is not that worker's
// tag stays, and matches none of its ids.
func untag(text, worker string) string {
	var out strings.Builder
	for {
		before, after, found := strings.Cut(text, tag(worker))
		out.WriteString(before)
		if !found {
			return out.String()
		}
		if next, _ := utf8.DecodeRuneInString(after); after != "" && inName(next) { // a longer name
			out.WriteString(tag(worker))
		}
		text = after
	}
}

func inName(r rune) bool {
	return r == '.' || r == '_' || r == '-' || unicode.IsLetter(r) || unicode.IsDigit(r)
}

// cut divides a filter into its selectors at the commas, quoted ones excepted. What
// is no filter comes out in some other pieces; joined, they are the same again.
func cut(text string) (parts []string) {
	begin := 0
	for i := 0; i < len(text); {
		switch c := text[i]; {
		case c == ',':
			parts = append(parts, text[begin:i])
			i++
			begin = i
		case isQuote(c):
			i = afterQuoted(text, i)
		case isOperator(c):
			i = afterValue(text, i)
		default:
			i++
		}
	}
	return append(parts, text[begin:])
}

func isQuote(c byte) bool    { return c == '/' || c == '|' || c == '"' }
func isOperator(c byte) bool { return c == '=' || c == '!' || c == '~' }

// afterQuoted returns where the quoted text that begins at i ends.
func afterQuoted(text string, i int) int {
	for j := i + 1; j < len(text); j++ {
		switch text[j] {
		case '\\':
			j++
		case text[i]:
			return j + 1
		}
	}
	return len(text)
}

// afterValue returns where the operator at i and an unquoted value after it end;
// quotes mean nothing within such a value.
func afterValue(text string, i int) int {
	rest := strings.TrimLeft(text[i:], "=!~")
	rest = strings.TrimLeftFunc(rest, unicode.IsSpace)
	if rest == "" || isQuote(rest[0]) {
		return len(text) - len(rest)
	}
	end := strings.IndexFunc(rest, func(r rune) bool { return r == ',' || unicode.IsSpace(r) })
	if end < 0 {
		return len(text)
	}
	return len(text) - len(rest) + end
}
