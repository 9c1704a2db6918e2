package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
)

// outcome of a test, in test2json's words.
type outcome string

const (
	pass outcome = "pass"
	fail outcome = "fail"
	skip outcome = "skip"
	// unfinished is a test that the run ended in, by a time limit or a panic.
	unfinished outcome = "unfinished"
)

// read returns the outcome of each test that has no tests below it.
func read(events io.Reader) (map[string]outcome, error) {
	results := map[string]outcome{}
	lines := bufio.NewReader(events)
	for {
		line, err := lines.ReadBytes('\n')
		var event struct{ Action, Test string }
		if len(line) > 0 && json.Unmarshal(line, &event) == nil && event.Test != "" {
			switch o := outcome(event.Action); o {
			case pass, fail, skip:
				results[event.Test] = o
			case "run":
				results[event.Test] = unfinished
			}
		}
		if err == io.EOF {
			return leaves(results), nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the tests' events: %w", err)
		}
	}
}

func leaves(results map[string]outcome) map[string]outcome {
	out := maps.Clone(results)
	for name := range results {
		for i, c := range name {
			if c == '/' {
				delete(out, name[:i])
			}
		}
	}
	return out
}

func report(w io.Writer, backend string, results map[string]outcome) {
	count := map[outcome]int{}
	for _, o := range results {
		count[o]++
	}
	fmt.Fprintf(w, "%-6s %d passed, %d failed, %d skipped, %d unfinished\n", backend, count[pass], count[fail], count[skip], count[unfinished])
}

// difference is one that is known: a debt, with its reason.
type difference struct {
	test   *regexp.Regexp
	reason string
}

// readKnown reads lines of a regular expression, a tab, and a reason. Empty lines and comments (#) are left out.
func readKnown(path string) ([]difference, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the known differences: %w", err)
	}
	var out []difference
	for i, line := range strings.Split(string(raw), "\n") {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		pattern, reason, ok := strings.Cut(line, "\t")
		if !ok {
			return nil, fmt.Errorf("reading %s: line %d has no reason after a tab", path, i+1)
		}
		test, err := regexp.Compile("^" + pattern + "$")
		if err != nil {
			return nil, fmt.Errorf("reading %s: line %d: %w", path, i+1, err)
		}
		out = append(out, difference{test, strings.TrimSpace(reason)})
	}
	return out, nil
}

// regressions are the tests that pass on a plain buildkitd only, and are not known to.
func regressions(plain, farm map[string]outcome, known []difference) []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(plain)) {
		if plain[name] == pass && farm[name] != pass && !listed(known, name) {
			out = append(out, name)
		}
	}
	return out
}

func listed(known []difference, name string) bool {
	return slices.ContainsFunc(known, func(d difference) bool { return d.test.MatchString(name) })
}

// pattern makes go test run the tests of these names. Of a name's parts it takes the first three: the test,
// the test case and its worker.
func pattern(names []string) string {
	var parts [3][]string
	for _, name := range names {
		for i, part := range strings.SplitN(name, "/", 4) {
			if i < len(parts) && !slices.Contains(parts[i], regexp.QuoteMeta(part)) {
				parts[i] = append(parts[i], regexp.QuoteMeta(part))
			}
		}
	}
	var out []string
	for _, alternatives := range parts {
		if len(alternatives) > 0 {
			out = append(out, "^("+strings.Join(alternatives, "|")+")$")
		}
	}
	return strings.Join(out, "/")
}

// compare lists what passes on the one and not on the other, unless it is known; and what is known and
// passes all the same, which has no place in the list.
func compare(plain, farm map[string]outcome, known []difference) []string {
	var out []string
	for _, name := range regressions(plain, farm, known) {
		got, ran := farm[name]
		if !ran {
			got = "not run"
		}
		out = append(out, fmt.Sprintf("%s: pass on a plain buildkitd, %s on the farm", name, got))
	}
	for _, name := range slices.Sorted(maps.Keys(plain)) {
		if plain[name] == pass && farm[name] == pass && listed(known, name) {
			out = append(out, name+": listed as a known difference, but there is none: remove it from the list")
		}
	}
	return out
}
