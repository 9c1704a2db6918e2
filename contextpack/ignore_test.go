package contextpack

import (
	"bytes"
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/patternmatcher/ignorefile"
	"github.com/tonistiigi/fsutil"
	"pgregory.net/rapid"
)

var ctx = context.Background()

// sentByDocker lists what docker sends: fsutil is what it sends with. The Dockerfile
// and its rules come by another way, so they are added.
func sentByDocker(t fatal, dir, ignore string) []string {
	t.Helper()
	patterns, err := ignorefile.ReadAll(strings.NewReader(ignore))
	if err != nil {
		t.Fatalf("%v", err)
	}
	plain, err := fsutil.NewFS(dir)
	if err != nil {
		t.Fatalf("%v", err)
	}
	filtered, err := fsutil.NewFilterFS(plain, &fsutil.FilterOpt{ExcludePatterns: patterns})
	if err != nil {
		t.Fatalf("%v", err)
	}
	var all []string
	err = filtered.Walk(ctx, "", func(p string, _ fs.DirEntry, err error) error {
		all = append(all, p)
		return err
	})
	if err != nil {
		t.Fatalf("%v", err)
	}
	for _, always := range []string{"Dockerfile", ".dockerignore"} {
		if !slices.Contains(all, always) {
			all = append(all, always)
		}
	}
	slices.SortFunc(all, compareNames)
	return all
}

var tree = map[string]string{
	"Dockerfile": "FROM scratch", "a": "a", "b.go": "b", "c.md": "c", ".hidden": "h", "empty/": "",
	"src/a.go": "a", "src/b.md": "b", "src/deep/x.go": "x", "src/deep/y.md": "y", "src/deep/er/z.go": "z",
	"build/out": "o", "build/keep/k": "k", "node_modules/m/index.js": "m", "docs/README.md": "r", "link": "-> src/a.go",
	"dirlink": "-> src",
}

func TestFolder_IgnoresWhatDockerIgnores(t *testing.T) {
	t.Parallel()
	for name, ignore := range map[string]string{
		"nothing":                        "",
		"comments":                       "# a\n\n  # b\n",
		"a file":                         "a",
		"leading slash":                  "/a\n/src/deep",
		"a name at the top only":         "a.go\nx.go",
		"everything":                     "*",
		"everything, twice":              "**",
		"everything but":                 "*\n!src",
		"everything but deep":            "**\n!src/deep/x.go",
		"all of a kind":                  "*.md",
		"all of a kind everywhere":       "**/*.md",
		"but one of them":                "**/*.md\n!docs/README.md",
		"an exception taken back":        "*\n!src\nsrc/deep",
		"a folder":                       "build",
		"a folder's contents":            "build/*",
		"a folder with slash":            "build/",
		"a folder but what it keeps":     "build\n!build/keep",
		"exception by wildcard":          "build\n!**/k",
		"exception by wildcard in name":  "build\n!build/ke*",
		"double star in the middle":      "src/**/*.go",
		"trailing double star":           "src/**",
		"question mark":                  "src/?.go",
		"character class":                "[ab]*",
		"escaped":                        `\a`,
		"dots":                           "./a\n../b.go\nsrc/../c.md",
		"a link":                         "link",
		"behind a link":                  "dirlink/a.go",
		"the Dockerfile":                 "Dockerfile\n.dockerignore",
		"exceptions first":               "!src\n*",
		"spaces":                         "  a  \n! src",
		"exception of an excepted place": "*\n!*.md\n!src/deep",
		"hidden":                         ".*",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			write(t, dir, tree)
			write(t, dir, map[string]string{".dockerignore": ignore})
			if got, want := names(folder(t, dir, Options{})), sentByDocker(t, dir, ignore); !slices.Equal(got, want) {
				t.Errorf("sent\n%q, docker sends\n%q", got, want)
			}
		})
	}
}

func TestFolder_IgnoresLikeDockerWhateverThePatterns(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, tree)
	element := rapid.SampledFrom([]string{"*", "**", "src", "deep", "er", "a", "*.go", "*.md", "build", "keep", "k", "?", "a.go", "z.go", "node_modules", "[a-c]*"})
	pattern := rapid.Custom(func(t *rapid.T) string {
		p := strings.Join(rapid.SliceOfN(element, 1, 3).Draw(t, "elements"), "/")
		return rapid.SampledFrom([]string{"", "", "!", "/", "!/"}).Draw(t, "prefix") + p + rapid.SampledFrom([]string{"", "", "/"}).Draw(t, "suffix")
	})
	rapid.Check(t, func(t *rapid.T) {
		ignore := strings.Join(rapid.SliceOfN(pattern, 0, 6).Draw(t, "patterns"), "\n")
		if err := os.WriteFile(filepath.Join(dir, ".dockerignore"), []byte(ignore), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, want := names(folder(t, dir, Options{})), sentByDocker(t, dir, ignore); !slices.Equal(got, want) {
			t.Errorf("%q: sent\n%q, docker sends\n%q", ignore, got, want)
		}
	})
}

func TestFolder_TheDockerfilesOwnRulesComeFirst(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{
		".dockerignore": "a", "a": "", "b": "", "docker/prod": "FROM scratch", "docker/prod.dockerignore": "b\ndocker", "docker/other": "",
	})
	s := folder(t, dir, Options{Dockerfile: filepath.Join(dir, "docker/prod")})
	if want := []string{".dockerignore", "a", "docker", "docker/prod", "docker/prod.dockerignore"}; !slices.Equal(names(s), want) || s.Dockerfile() != "docker/prod" {
		t.Errorf("sent %q, the Dockerfile is %s; want %q", names(s), s.Dockerfile(), want)
	}
}

func TestFolder_ADockerfileFromElsewhereIsAddedAndHidden(t *testing.T) {
	t.Parallel()
	dir, other := t.TempDir(), t.TempDir()
	write(t, dir, map[string]string{".dockerignore": "secret", "secret": "", "a": "", "inside": "-> " + other + "/Dockerfile"})
	write(t, other, map[string]string{"Dockerfile": "FROM busybox", "own": "FROM own", "own.dockerignore": "a"})
	for file, want := range map[string][]string{
		filepath.Join(other, "Dockerfile"): {".archfarm.Dockerfile", ".archfarm.Dockerfile.dockerignore", ".dockerignore", "a", "inside"},
		filepath.Join(other, "own"):        {".archfarm.Dockerfile", ".archfarm.Dockerfile.dockerignore", ".dockerignore", "inside", "secret"},
		filepath.Join(dir, "inside"):       {".archfarm.Dockerfile", ".archfarm.Dockerfile.dockerignore", ".dockerignore", "a", "inside"},
	} {
		s := folder(t, dir, Options{Dockerfile: file})
		if !slices.Equal(names(s), want) || s.Dockerfile() != ".archfarm.Dockerfile" {
			t.Errorf("%s: sent %q, the Dockerfile is %s; want %q", file, names(s), s.Dockerfile(), want)
		}
		out := t.TempDir()
		if _, err := Unpack(ctx, bytes.NewReader(archive(t, s)), out, Limits{}); err != nil {
			t.Fatal(err)
		}
		// What BuildKit's frontend then leaves out by itself.
		rules, _ := os.ReadFile(filepath.Join(out, ".archfarm.Dockerfile.dockerignore"))
		copied := sentByDocker(t, out, string(rules))
		if slices.ContainsFunc(copied, func(n string) bool { return strings.HasPrefix(n, ".archfarm") }) {
			t.Errorf("%s: COPY . would copy %q", file, copied)
		}
		got, _ := os.ReadFile(filepath.Join(out, s.Dockerfile()))
		if want, _ := os.ReadFile(file); string(got) != string(want) {
			t.Errorf("%s: the Dockerfile is %q, want %q", file, got, want)
		}
	}
}

func TestFolder_DockerfilesThatCannotBe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, map[string]string{"sub/": "", "lower/dockerfile": "FROM scratch", "bad/Dockerfile": "", "bad/.dockerignore": "[", "file": ""})
	if s := folder(t, filepath.Join(dir, "lower"), Options{}); s.Dockerfile() != "dockerfile" {
		t.Errorf("the Dockerfile is %s", s.Dockerfile())
	}
	for name, c := range map[string]struct {
		dir  string
		o    Options
		want string
	}{
		"none":           {dir, Options{}, "has no Dockerfile"},
		"not there":      {dir, Options{Dockerfile: filepath.Join(dir, "x")}, "no such file"},
		"a folder":       {dir, Options{Dockerfile: filepath.Join(dir, "sub")}, "is not a file"},
		"bad pattern":    {filepath.Join(dir, "bad"), Options{}, ".dockerignore: syntax error in pattern"},
		"not a folder":   {filepath.Join(dir, "file"), Options{}, "is not a folder"},
		"no such folder": {filepath.Join(dir, "nowhere"), Options{}, "no such file"},
	} {
		if _, err := Folder(c.dir, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}
