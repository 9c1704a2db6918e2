package spec_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"

	"github.com/archfarm/archfarm/coordinator/job/spec"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestTags_AreFilledIn(t *testing.T) {
	t.Parallel()
	// In New York it is still the year before.
	now := time.Date(2026, 12, 31, 22, 30, 0, 0, time.FixedZone("", -5*3600))
	source := func(branch, tag string) *archfarmv1.Source {
		return &archfarmv1.Source{Commit: commit, Branch: branch, Tag: tag}
	}
	for _, c := range []struct {
		tags   []string
		source *archfarmv1.Source
		want   []string
	}{
		{nil, nil, nil},
		{[]string{"app", "app:latest", "docker.io/library/app"}, nil, []string{"docker.io/library/app:latest"}},
		{[]string{"r.io/b:{{.GitSHA}}", "r.io/a:{{ .ShortSHA }}"}, source("", ""), []string{"r.io/b:" + commit, "r.io/a:0123456"}},
		{[]string{"r.io:5000/a:{{.Date}}"}, nil, []string{"r.io:5000/a:20270101"}},
		{[]string{"r.io/a:{{.Branch}}", "r.io/a:{{- .Branch -}} "}, source("feature/ünï+x", ""), []string{"r.io/a:feature--n--x"}},
		{[]string{"r.io/a:{{.Branch}}"}, source("--.-v", ""), []string{"r.io/a:v"}},
		{[]string{"r.io/a:{{.Branch}}"}, source(strings.Repeat("x", 300), ""), []string{"r.io/a:" + strings.Repeat("x", 128)}},
		{[]string{"r.io/a:{{.Tag}}", "r.io/a:{{.Version}}", "r.io/a:{{.Major}}", "r.io/a:{{.Major}}.{{.Minor}}", "r.io/a:{{.Patch}}"}, source("", "v1.20.3"),
			[]string{"r.io/a:v1.20.3", "r.io/a:1.20.3", "r.io/a:1", "r.io/a:1.20", "r.io/a:3"}},
		{[]string{"r.io/a:{{.Version}}"}, source("", "api/v2.0.0-rc.1+build.5"), []string{"r.io/a:2.0.0-rc.1_build.5"}},
		{[]string{"r.io/{{.Branch}}/a:1"}, source("main", ""), []string{"r.io/main/a:1"}},
	} {
		got, err := spec.Tags(&archfarmv1.JobSpec{Tags: c.tags}, c.source, now)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%q of %v: %q, %v, want %q", c.tags, c.source, got, err, c.want)
		}
	}
}

func TestTags_SayWhatIsMissing(t *testing.T) {
	t.Parallel()
	for template, c := range map[string]struct {
		source *archfarmv1.Source
		says   string
	}{
		"a:{{.GitSHA}}":   {nil, "{{.GitSHA}} needs a commit"},
		"a:{{.ShortSHA}}": {&archfarmv1.Source{Branch: "main"}, "needs a commit"},
		"a:{{.Branch}}":   {&archfarmv1.Source{Commit: commit, Tag: "v1"}, "needs a branch"},
		"a:{{.Tag}}":      {&archfarmv1.Source{Commit: commit, Branch: "main"}, "needs a git tag"},
		"a:{{.Version}}":  {&archfarmv1.Source{Branch: "main"}, "not of a git tag"},
		"a:{{.Minor}}":    {&archfarmv1.Source{Tag: "release-7"}, `"release-7"`},
		"a:{{.Patch}}":    {&archfarmv1.Source{Tag: "v1.02.3"}, `"v1.02.3"`},
		"a:{{.Major}}":    {&archfarmv1.Source{Tag: "v1.2.3-rc.1"}, "pre-release"},
		"{{.Branch}}:1":   {&archfarmv1.Source{Branch: "Main"}, "lowercase"},
		"a:-{{.Branch}}":  {&archfarmv1.Source{Branch: "x"}, "invalid reference"},
		"b:{{.Branch}}":   {&archfarmv1.Source{Branch: "日本"}, "no letter or digit"},
	} {
		got, err := spec.Tags(&archfarmv1.JobSpec{Tags: []string{"a:1", template}}, c.source, time.Now())
		if told := violations(t, err); got != nil || len(told) != 1 || !strings.Contains(strings.Join(told["spec.tags[1]"], ""), c.says) {
			t.Errorf("%s of %v: %q, %v, want it to say %q", template, c.source, got, told, c.says)
		}
	}
}

func TestTags_TemplatesDoNothingButNameFields(t *testing.T) {
	t.Parallel()
	for _, template := range []string{
		"", "  ", "{{", "{{}}", "{{.}}", "{{.X}}", "{{.GitSHA.X}}", `{{"x"}}`, "{{1}}", "{{.Branch | printf}}", `{{printf "%s" .Branch}}`, "{{len .Branch}}",
		"{{range .Branch}}x{{end}}", "{{if .Branch}}x{{end}}", "{{with .Branch}}x{{end}}", `{{define "x"}}y{{end}}a:1`, `{{template "x"}}`, `{{block "x" .}}{{end}}`,
		"{{$x := .Branch}}a", "{{.Branch .Tag}}", "{{(.Branch)}}", "{{break}}", "{{nil}}", "{{$}}", "a:{{.Branch", "{{" + strings.Repeat("(", 900) + "}}",
		strings.Repeat("a", 1025), "a@sha256:" + strings.Repeat("a", 64), "https://r.io/a:1", "a:1:2", "A", "a b", `{{define "tag"}}x{{end}}`,
	} {
		err := spec.Validate(&archfarmv1.SubmitRequest{Spec: &archfarmv1.JobSpec{
			Context: gitContext("https://example.com/a", "", ""), Platforms: []string{"linux/amd64"}, Tags: []string{template}}})
		if told := violations(t, err); len(told["spec.tags[0]"]) != 1 || len(told) != 1 {
			t.Errorf("%q: %v", template, told)
		}
	}
}

func FuzzTags(f *testing.F) {
	for _, seed := range []string{"r.io/a:{{.GitSHA}}", "{{- .Branch -}}", "{{/* a */}}x", "{{range .}}{{end}}", "a:{{.Version}}", `{{define "a"}}{{end}}`} {
		f.Add(seed, "feature/x", "v1.2.3")
	}
	f.Fuzz(func(t *testing.T, template, branch, tag string) {
		got, err := spec.Tags(&archfarmv1.JobSpec{Tags: []string{template}}, &archfarmv1.Source{Commit: commit, Branch: branch, Tag: tag}, time.Unix(0, 0))
		if err != nil {
			violations(t, err)
			return
		}
		for _, one := range got {
			named, err := reference.ParseNamed(one) // which wants it in full
			if _, tagged := named.(reference.Tagged); err != nil || !tagged || named.String() != one {
				t.Errorf("%q of %q: %v", one, template, err)
			}
		}
	})
}
