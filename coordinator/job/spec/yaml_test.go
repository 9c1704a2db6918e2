package spec_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/archfarm/archfarm/coordinator/job/spec"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestParseContext(t *testing.T) {
	t.Parallel()
	const full = "0123456789abcdef0123456789abcdef01234567"
	for text, want := range map[string]*archfarmv1.GitContext{
		"https://github.com/org/app.git":                            {Url: "https://github.com/org/app.git"},
		"https://github.com/org/app.git#main":                       {Url: "https://github.com/org/app.git", Ref: "main"},
		"https://github.com/org/app.git#:sub/dir":                   {Url: "https://github.com/org/app.git", Subdir: "sub/dir"},
		"https://github.com/org/app.git#feature/x:sub":              {Url: "https://github.com/org/app.git", Ref: "feature/x", Subdir: "sub"},
		"https://github.com/org/app#main":                           {Url: "https://github.com/org/app", Ref: "main"},
		"https://github.com/org/app?ref=main":                       {Url: "https://github.com/org/app", Ref: "main"},
		"http://localhost:8080/app.git?branch=main&subdir=/a/b":     {Url: "http://localhost:8080/app.git", Ref: "refs/heads/main", Subdir: "a/b"},
		"https://example.com/app.git?tag=v1":                        {Url: "https://example.com/app.git", Ref: "refs/tags/v1"},
		"https://example.com/app.git?commit=" + full:                {Url: "https://example.com/app.git", Ref: full},
		"https://example.com/app.git?checksum=" + full + "#" + full: {Url: "https://example.com/app.git", Ref: full},
		"git://example.com/app.git":                                 {Url: "git://example.com/app.git"},
		"github.com/org/app":                                        {Url: "https://github.com/org/app.git"},
		"github.com/org/app.git#main:sub":                           {Url: "https://github.com/org/app.git", Ref: "main", Subdir: "sub"},
		".":                                                         nil, "./a": nil, "../github.com/x": nil, "/abs/path": nil, "app.tar.gz": nil, "": nil, "a@b": nil, "C:\\x": nil, "a:b": nil, "-": nil,
	} {
		git, local, err := spec.ParseContext(text)
		if err != nil || !proto.Equal(git, want) || (want == nil) != (local == text && (text != "" || git == nil)) {
			t.Errorf("%q: %v, %q, %v, want %v", text, git, local, err, want)
		}
	}
	for text, says := range map[string]string{
		"git@github.com:org/app.git":                   "https://github.com/org/app.git",
		"ssh://git@github.com/org/app.git#main":        "https://github.com/org/app.git",
		"https://ci:hunter2@github.com/org/app.git":    "GIT_AUTH_TOKEN",
		"https://github.com/org/app":                   ".git",
		"https://example.com/app.tar.gz":               "download",
		"https://example.com/app.git?submodules=false": "submodules",
		"https://example.com/app.git?hunter2=hunter2":  "not taken",
		"https://example.com/app.git?ref=a#b":          "two",
		"https://example.com/app.git?ref=":             "value",
		"https://example.com/app.git#-x":               "begins with",
		"ftp://example.com/app.git":                    "https://HOST",
		"file:///srv/app.git":                          "local path",
		"https://a:hunter2@%zz/app.git":                "malformed",
	} {
		git, local, err := spec.ParseContext(text)
		if err == nil || !strings.Contains(err.Error(), says) || text != "https://example.com/app.git?hunter2=hunter2" && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v, %q, %v, want it to say %q", text, git, local, err, says)
		}
	}
}

func TestFromYAML(t *testing.T) {
	t.Parallel()
	got, err := spec.FromYAML([]byte(`
request_id: pipeline-17
context: https://github.com/org/app.git#main:api
dockerfile: build/Dockerfile
platforms: [linux/amd64, linux/arm64]
tags: r.io/app:{{.GitSHA}}
buildArgs: &args
  VERSION: 1.10
  DEBUG: true
  EMPTY: ""
labels: *args
secrets:
  - {id: npm, src: token.txt}
  - {id: key, env: KEY}
  - id: plain
  - {id: stored, name: release-key}
cache_from: [app:cache, "type=gha,scope=x"]
cache_to:
  - type: registry
    attrs: {ref: app:cache, mode: max}
provenance: true
noCache: true
priority: -3
timeout: 1h30m
max_attempts: null
`))
	if err != nil {
		t.Fatal(err)
	}
	args := map[string]string{"VERSION": "1.10", "DEBUG": "true", "EMPTY": ""}
	want := &archfarmv1.SubmitRequest{RequestId: "pipeline-17", Spec: &archfarmv1.JobSpec{
		Context: gitContext("https://github.com/org/app.git", "main", "api"), Dockerfile: "build/Dockerfile",
		Platforms: []string{"linux/amd64", "linux/arm64"}, Tags: []string{"r.io/app:{{.GitSHA}}"}, BuildArgs: args, Labels: args,
		Secrets:    []*archfarmv1.SecretRef{{Id: "npm"}, {Id: "key"}, {Id: "plain"}, {Id: "stored", Name: "release-key"}},
		CacheFrom:  []*archfarmv1.CacheEntry{cache("registry", "ref", "app:cache"), cache("gha", "scope", "x")},
		CacheTo:    []*archfarmv1.CacheEntry{cache("registry", "ref", "app:cache", "mode", "max")},
		Provenance: "true", NoCache: true, Priority: -3, Timeout: durationpb.New(90 * time.Minute),
	}}
	if !proto.Equal(got.Request, want) {
		t.Errorf("%v, want %v", got.Request, want)
	}
	if sources := []spec.SecretSource{{ID: "npm", File: "token.txt"}, {ID: "key", Env: "KEY"}, {ID: "plain"}}; !slices.Equal(got.Secrets, sources) || got.Local != "" {
		t.Errorf("secrets %v, context %q", got.Secrets, got.Local)
	}
	local, err := spec.FromYAML([]byte("context: ./app\nplatforms: linux/amd64\ntimeout: -1500ms\n"))
	if err != nil || local.Local != "./app" || local.Request.GetSpec().GetContext() != nil || local.Request.GetSpec().GetTimeout().AsDuration() != -1500*time.Millisecond {
		t.Errorf("%v, %v", local, err)
	}
	nested, err := spec.FromYAML([]byte(`{"context": {"git": {"url": "https://example.com/a"}, "source": {"commitTime": "2026-01-02T03:04:05Z"}}}`))
	if err != nil || nested.Request.GetSpec().GetContext().GetGit().GetUrl() != "https://example.com/a" || nested.Request.GetSpec().GetContext().GetSource().GetCommitTime().GetSeconds() != 1767323045 {
		t.Errorf("%v, %v", nested, err)
	}
}

func TestFromYAML_TellsEachFaultWithItsLine(t *testing.T) {
	t.Parallel()
	for text, says := range map[string][]string{
		"":                                     {"empty"},
		"- a":                                  {"no mapping"},
		"a: b\n---\nc: d":                      {"several documents"},
		"a: [":                                 {"line 1"},
		"tag: x\nplatform: y\n":                {`line 1: there is no "tag"`, `line 2: there is no "platform"`, "platforms"},
		"tags: a\ntags: b":                     {"line 2", "already, in line 1"},
		"no_cache: true\nnoCache: true":        {"line 2", "already, as no_cache"},
		"pull: yes":                            {"line 1: pull: want true or false"},
		"priority: high\nmax_attempts: 1.5":    {"line 1: priority", "line 2: max_attempts"},
		"timeout: 10":                          {"line 1: timeout", "10m"},
		"build_args: [a]":                      {"line 1: build_args: want a mapping"},
		"build_args:\n  A:\n":                  {"line 2", `"A"`},
		"build_args: {A: {B: c}}":              {`"A"`},
		"target: [a]":                          {"target"},
		"context: {git: x}":                    {"line 1", "url, ref, subdir"},
		"context: https://a:hunter2@b.c/d.git": {"GIT_AUTH_TOKEN"},
		"secrets: [{id: a, value: hunter2}]":   {`there is no "value"`},
		"secrets: [{id: a, src: b, env: c}]":   {"one place"},
		"secrets: [{src: b}]":                  {"no id"},
		"cache_to: \"type=registry,x\"":        {"line 1"},
		"a: &a [*a]":                           {"line 1"},
		"request_id: [a]":                      {"request_id"},
		"? [a]\n: b":                           {"key is no text"},
		"context: {digest: a, git: {url: b}}":  {"oneof"},
	} {
		got, err := spec.FromYAML([]byte(text))
		if err == nil {
			t.Errorf("%q: %v", text, got)
			continue
		}
		for _, want := range says {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: %v does not say %q", text, err, want)
			}
		}
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: it shows a secret: %v", text, err)
		}
	}
}

// TestFromYAML_AliasesUnfoldToLittle: a "billion laughs".
func TestFromYAML_AliasesUnfoldToLittle(t *testing.T) {
	t.Parallel()
	text := "tags: &a [" + strings.Repeat("x,", 999) + "x]\n" + "cache_from:\n" + strings.Repeat("- attrs: &m {"+strings.Repeat("a: b, ", 1)+"c: d}\n", 1)
	if _, err := spec.FromYAML([]byte(text)); err != nil {
		t.Fatal(err)
	}
	var bomb strings.Builder
	bomb.WriteString("labels: &m {")
	for i := range 2000 {
		bomb.WriteString("k" + strings.Repeat("x", i%7) + string(rune('a'+i%26)) + strings.Repeat("y", i/26) + ": v, ")
	}
	bomb.WriteString("z: z}\ncache_from:\n" + strings.Repeat("- {type: a, attrs: *m}\n", 1000))
	if _, err := spec.FromYAML([]byte(bomb.String())); err == nil || !strings.Contains(err.Error(), "unfold") {
		t.Errorf("%v", err)
	}
}

func FuzzFromYAML(f *testing.F) {
	for _, seed := range []string{"context: .\nplatforms: [linux/amd64]\n", "secrets: [{id: a, env: b}]\n", "a: &a [*a]", "timeout: 1h\nbuild_args: {A: 1.10}\n", "{\"tags\": [\"a\"]}", "? a\n: b\n", "context: {git: {url: a}}\nlabels: !!binary aGk="} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := spec.FromYAML(data)
		if err != nil {
			return
		}
		if file.Request.GetSpec() == nil {
			t.Fatal("no specification")
		}
		_ = spec.Validate(file.Request) // does not panic
		if _, err := proto.Marshal(file.Request); err != nil {
			t.Error(err)
		}
	})
}

func FuzzParseContext(f *testing.F) {
	for _, seed := range []string{"https://a.b/c.git#d:e", "git@a.b:c/d.git#e", "github.com/a/b?c=d", "ssh://a@b/c", "a://b", "https://u:p@h/p.git?ref=x", "github.com/#", "HTTP://x/.git"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		git, local, err := spec.ParseContext(text)
		switch {
		case err != nil && (git != nil || local != ""):
			t.Errorf("an error, and more: %v, %q, %v", git, local, err)
		case err == nil && git == nil && local != text:
			t.Errorf("a path became another: %q", local)
		case git != nil:
			req := &archfarmv1.SubmitRequest{Spec: &archfarmv1.JobSpec{Context: gitContext(git.GetUrl(), git.GetRef(), ""), Platforms: []string{"linux/amd64"}}}
			for field, told := range violations(t, spec.Validate(req)) {
				if !strings.Contains(strings.Join(told, ""), "UTF-8") {
					t.Errorf("%q became what is refused: %v: %s: %q", text, git, field, told)
				}
			}
		}
	})
}
