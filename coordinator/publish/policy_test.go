package publish

import (
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
)

func TestMatchRepository(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		pattern, name string
		want          bool
	}{
		{"registry.example/app", "registry.example/app", true},
		{"registry.example/app", "registry.example/app/web", false},
		{"registry.example/app", "registry.example/apple", false},
		{"registry.example/*", "registry.example/app", true},
		{"registry.example/*", "registry.example/app/web", false},
		{"registry.example/app-*/web", "registry.example/app-1/web", true},
		{"registry.example/*-*", "registry.example/app", false},
		{"registry.example/**", "registry.example/a/b/c", true},
		{"registry.example/app/**", "registry.example/app", true},
		{"registry.example/app/**", "registry.example/apple", false},
		{"**/web", "registry.example/a/b/web", true},
		{"**/a/**/web", "r/a/a/x/web", true},
		{"**/a/*/web", "r/a/x/y/a/z/web", true},
		{"**", "anything/at/all", true},
		{"*.example:5000/**", "registry.example:5000/x", true},
		{"*", "registry.example/x", false},
	} {
		if got := MatchRepository(test.pattern, test.name); got != test.want {
			t.Errorf("%s matches %s: %t", test.pattern, test.name, got)
		}
	}
}

func TestMayMove(t *testing.T) {
	t.Parallel()
	for _, tag := range []string{"latest", "main", "master", "edge", "nightly", "dev", "v1", "1", "v1.2", "1.2", "0.1", "v10.20"} {
		if !MayMove(DefaultMutable, tag) {
			t.Errorf("%s does not move by default", tag)
		}
	}
	for _, tag := range []string{"v1.2.3", "1.2.3", "v1-rc", "release", "lates", "latest2", "01", "v", "V1", "2024.01.02", "1.02", "3f5a9c"} {
		if MayMove(DefaultMutable, tag) {
			t.Errorf("%s moves by default", tag)
		}
	}
	if !MayMove([]string{"pr-*"}, "pr-12") || MayMove([]string{"pr-*"}, "pr12") || MayMove(nil, "latest") || MayMove([]string{}, "1") {
		t.Error("patterns of tags")
	}
}

func TestParseRule(t *testing.T) {
	t.Parallel()
	got, err := ParseRule("repository=registry.example.com/app/**, push=enforce,mutable=latest;main;v*,jobs=warn")
	if err != nil || got.String() != "repository=registry.example.com/app/**,push=enforce,jobs=warn,mutable=latest;main;v*" {
		t.Errorf("%s, %v", got, err)
	}
	if none, err := ParseRule("mutable=,repository=a"); err != nil || none.Mutable == nil || len(none.Mutable) != 0 {
		t.Errorf("without mutable tags: %#v, %v", none, err)
	}
	for text, word := range map[string]string{
		"":                                "KEY=VALUE",
		"push=warn":                       "names no repository",
		"repository=":                     "component",
		"repository=a//b":                 "component",
		"repository=a/b**":                "component",
		"repository=a b":                  "component",
		"repository=a,repository=b":       "twice",
		"repository=a,push=maybe":         `"maybe"`,
		"repository=a,jobs=":              `""`,
		"repository=a,colour=red":         `"colour"`,
		"repository=a,mutable=x y":        `"x y"`,
		"repository=a,mutable=x;;y":       `""`,
		"repository=a,mutable=@semantics": Semver,
		"repository=a,enforce":            `"enforce"`,
		"repository=" + strings.Repeat("a", maxPattern+1):                 "512",
		"repository=a,mutable=" + strings.Repeat("a;", maxPatterns) + "b": "256",
	} {
		if _, err := ParseRule(text); err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%.60q: %v, want %s", text, err, word)
		}
	}
}

func TestPolicy_FirstRuleCountsAndDefaultsFillIn(t *testing.T) {
	t.Parallel()
	p := Policy{Rules: []Rule{
		{Repository: "r/strict/**", Push: Enforce, Mutable: []string{}},
		{Repository: "r/**", Push: Off, Jobs: Warn},
	}}
	for _, test := range []struct {
		policy     Policy
		door       Door
		repository string
		mode       Mode
		mutable    []string
	}{
		{p, Endpoint, "r/strict/a", Enforce, nil},
		{p, Jobs, "r/strict/a", Enforce, nil},
		{p, Endpoint, "r/loose", Off, DefaultMutable},
		{p, Jobs, "r/loose", Warn, DefaultMutable},
		{p, Endpoint, "other/a", Warn, DefaultMutable},
		{p, Jobs, "other/a", Enforce, DefaultMutable},
		{Policy{Push: Off, Jobs: Warn, Mutable: []string{"x"}}, Endpoint, "a", Off, []string{"x"}},
		{Policy{Push: Off, Jobs: Warn, Mutable: []string{"x"}}, Jobs, "a", Warn, []string{"x"}},
	} {
		if mode, mutable := test.policy.For(test.door, test.repository); mode != test.mode || !slices.Equal(mutable, test.mutable) {
			t.Errorf("%s at %s: %s, %v", test.repository, test.door, mode, mutable)
		}
	}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	at := func(hour int) time.Time { return time.Date(2026, 1, 2, hour, 0, 0, 0, time.UTC) }
	source := func(url, commit string, hour int) store.Source {
		s := store.Source{URL: url, Commit: commit}
		if hour > 0 {
			s.CommitTime = at(hour)
		}
		return s
	}
	const one, two = "sha256:1", "sha256:2"
	for name, test := range map[string]struct {
		wanted  store.Binding
		current *store.Binding
		anyway  bool
		words   []string // of the refusal; none: allowed
	}{
		"a new tag":          {wanted: store.Binding{Digest: one, Immutable: true}},
		"the same again":     {wanted: store.Binding{Digest: one, Immutable: true}, current: &store.Binding{Digest: one}},
		"an immutable tag":   {wanted: store.Binding{Digest: one, Immutable: true}, current: &store.Binding{Digest: two, Job: "j7", Bound: at(3)}, anyway: true, words: []string{"immutable", one, two, "job j7", "2026-01-02T03:00:00Z"}},
		"by a build":         {wanted: store.Binding{Digest: one, Immutable: true}, current: &store.Binding{Digest: two, Build: "b7"}, words: []string{"build b7"}},
		"by another tenant":  {wanted: store.Binding{Digest: one, Immutable: true, Tenant: "a"}, current: &store.Binding{Digest: two, Build: "b7", Tenant: "b"}, words: []string{"another tenant's build"}},
		"a newer commit":     {wanted: store.Binding{Digest: one, Source: source("u", "c2", 2)}, current: &store.Binding{Digest: two, Source: source("u", "c1", 1)}},
		"an older commit":    {wanted: store.Binding{Digest: one, Source: source("u", "c1", 1)}, current: &store.Binding{Digest: two, Source: source("u", "c2", 2)}, words: []string{"c1", "c2", "2026-01-02T01:00:00Z", "2026-01-02T02:00:00Z"}},
		"older, but asked":   {wanted: store.Binding{Digest: one, Source: source("u", "c1", 1)}, current: &store.Binding{Digest: two, Source: source("u", "c2", 2)}, anyway: true},
		"another repository": {wanted: store.Binding{Digest: one, Source: source("u", "c1", 1)}, current: &store.Binding{Digest: two, Source: source("w", "c2", 2)}},
		"unknown time":       {wanted: store.Binding{Digest: one, Source: source("u", "c1", 0)}, current: &store.Binding{Digest: two, Source: source("u", "c2", 2)}},
		"was unknown":        {wanted: store.Binding{Digest: one, Source: source("", "c1", 1)}, current: &store.Binding{Digest: two, Source: source("", "c2", 0)}},
		"both without URL":   {wanted: store.Binding{Digest: one, Source: source("", "c1", 1)}, current: &store.Binding{Digest: two, Source: source("", "c2", 2)}, words: []string{"c2"}},
	} {
		err := judge(test.wanted, test.current, test.anyway)
		if (err != nil) != (test.words != nil) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if err != nil && status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: %v", name, err)
		}
		for _, word := range test.words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q does not say %q", name, err, word)
			}
		}
		if err != nil && test.current.Tenant != "" && strings.Contains(err.Error(), "b7") {
			t.Errorf("%s: %q tells another tenant's", name, err)
		}
	}
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{"repository=a/**/b*,push=off,jobs=warn,mutable=v*;@semver", "repository=*", "mutable=,repository=[::1]:5000/x", "a=b=c"} {
		f.Add(s, "a/b/c")
	}
	f.Fuzz(func(t *testing.T, s, name string) {
		rule, err := ParseRule(s)
		if err != nil {
			return
		}
		again, err := ParseRule(rule.String())
		if err != nil || again.String() != rule.String() {
			t.Fatalf("%q was read as %q, and that as %q, %v", s, rule, again, err)
		}
		if got, want := MatchRepository(rule.Repository, name), asRegexp(rule.Repository).MatchString("/"+name); got != want {
			t.Fatalf("%q matches %q: %t, want %t", rule.Repository, name, got, want)
		}
	})
}

// asRegexp is the meaning of a pattern, said in another way.
func asRegexp(pattern string) *regexp.Regexp {
	out := ""
	for c := range strings.SplitSeq(pattern, "/") {
		if c == "**" {
			out += "(/[^/]*)*"
			continue
		}
		out += "/" + strings.ReplaceAll(regexp.QuoteMeta(c), `\*`, "[^/]*")
	}
	re := regexp.MustCompile("(?s)^" + out + "$")
	return re
}

func TestPolicy_Strictest(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		policy Policy
		want   Mode
	}{
		"by default":            {Policy{}, Warn},
		"all off":               {Policy{Push: Off}, Off},
		"one rule off":          {Policy{Rules: []Rule{{Repository: "a", Push: Off}}}, Warn},
		"one rule strict":       {Policy{Push: Off, Rules: []Rule{{Repository: "a"}, {Repository: "b", Push: Enforce}}}, Enforce},
		"a rule for jobs alone": {Policy{Push: Off, Rules: []Rule{{Repository: "a", Jobs: Enforce}}}, Off},
	} {
		if got := test.policy.Strictest(Endpoint); got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
}
