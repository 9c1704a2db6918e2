package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bk "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"
)

func TestParseOutput_AsDockerDoes(t *testing.T) {
	t.Parallel()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	dir := t.TempDir()
	for text, want := range map[string]bk.ExportEntry{
		"type=registry":                       {Type: "image", Attrs: map[string]string{"push": "true"}},
		"type=image,name=a,push=true":         {Type: "image", Attrs: map[string]string{"name": "a", "push": "true"}},
		`type=image,"name=a,b"`:               {Type: "image", Attrs: map[string]string{"name": "a,b"}},
		"out":                                 {Type: "local", OutputDir: "out"},
		"type=local,dest=out":                 {Type: "local", OutputDir: "out"},
		"type=oci,tar=false,dest=out":         {Type: "oci", OutputDir: "out", Attrs: map[string]string{"tar": "false"}},
		"-":                                   {Type: "tar"},
		"type=tar,dest=" + dir + "/a.tar":     {Type: "tar"},
		"type=oci,dest=" + dir + "/b.tar,X=y": {Type: "oci", Attrs: map[string]string{"x": "y"}},
		"type=docker,dest=-":                  {Type: "docker"},
	} {
		got, err := parseOutput(text, null)
		if err != nil || got.Type != want.Type || got.OutputDir != want.OutputDir || !maps.Equal(got.Attrs, want.Attrs) {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if file := got.Type == "tar" || got.Type == "docker" || got.Type == "oci" && got.OutputDir == ""; file != (got.Output != nil) {
			t.Errorf("%s: written to a file: %v", text, got.Output != nil)
		}
	}
	for _, text := range []string{"", "dest=x", "type=local", "type=image,dest=x", "type=toaster", "type=tar,dest=" + dir, "type=oci,tar=false", "type=local,x"} {
		if got, err := parseOutput(text, null); err == nil {
			t.Errorf("%q is taken as %+v", text, got)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "a.tar")); err == nil {
		t.Error("a file has been made before there was a result")
	}
}

// buildCommand is archfarm build with its flags parsed.
func buildCommand(t *testing.T, args ...string) *cobra.Command {
	t.Helper()
	cmd := newBuild()
	cmd.SetErr(os.Stderr)
	if err := cmd.ParseFlags(args); err != nil {
		t.Fatal(err)
	}
	return cmd
}

func TestExportsOf_GiveImagesTheirNames(t *testing.T) {
	t.Parallel()
	for want, args := range map[string][]string{
		"":                         {"-t", "a"},
		"image name=a,b push=true": {"-t", "a", "-t", "b", "--push"},
		"image name=own push=true": {"-t", "a", "--push", "-o", "type=image,name=own"},
		"image annotation-index.k=v annotation.k=w name=a push=true":                       {"-t", "a", "--push", "--annotation", "index:k=v", "--annotation", "k=w"},
		"image annotation-index.k=v annotation-manifest[linux/arm64].k=v name=a push=true": {"-t", "a", "--push", "--annotation", "index,manifest[linux/arm64]:k=v"},
		"local  image name=a push=true":                                                    {"-t", "a", "--push", "-o", "out"},
		"oci name=a":                                                                       {"-t", "a", "-o", "type=oci,dest=x.tar"},
	} {
		exports, err := exportsOf(buildCommand(t, args...), os.Stdout)
		var got []string
		for _, e := range exports {
			var attrs []string
			for k, v := range e.Attrs {
				attrs = append(attrs, k+"="+v)
			}
			slices.Sort(attrs)
			got = append(got, e.Type+" "+strings.Join(attrs, " "))
		}
		if text := strings.Join(got, " "); err != nil || text != want {
			t.Errorf("%q: %q, %v; want %q", args, text, err, want)
		}
	}
	for _, args := range [][]string{{"--push"}, {"-t", "a", "--push", "--annotation", "k"}, {"-o", "type=registry"}} {
		if got, err := exportsOf(buildCommand(t, args...), os.Stdout); err == nil {
			t.Errorf("%q is taken as %v", args, got)
		}
	}
}

func TestSolveOpt_IsWhatTheFlagsSay(t *testing.T) {
	t.Setenv("TEST_BUILD_ARG", "e")
	dir := folder(t, map[string]string{"Dockerfile": "FROM scratch\n", "x/Other.Dockerfile": "FROM scratch\n", "y/f": ""})
	for name, test := range map[string]struct {
		from   string
		args   []string
		stdin  string
		attrs  map[string]string
		mounts []string
	}{
		"a folder":       {dir, nil, "", map[string]string{"filename": "Dockerfile", "attest:provenance": "mode=min,inline-only=true"}, []string{"context", "dockerfile"}},
		"another file":   {dir, []string{"-f", dir + "/x/Other.Dockerfile", "--provenance", "false", "--sbom", "true"}, "", map[string]string{"filename": "Other.Dockerfile", "attest:sbom": ""}, []string{"context", "dockerfile"}},
		"standard input": {dir, []string{"-f", "-", "--provenance=false"}, "FROM scratch\n", map[string]string{"filename": "Dockerfile", "dockerfilekey": "dockerfile"}, []string{"context", "dockerfile"}},
		"a repository":   {"https://git.example.com/app.git#main", []string{"-f", "x/Dockerfile", "--provenance=mode=max"}, "", map[string]string{"context": "https://git.example.com/app.git#main", "filename": "x/Dockerfile", "attest:provenance": "mode=max"}, nil},
		"an archive":     {"-", []string{"--provenance=false"}, "tar", map[string]string{"context": "http://buildkit-session/context"}, nil},
		"values": {dir, []string{"--provenance=false", "--build-arg", "A=1", "--build-arg", "TEST_BUILD_ARG", "--build-arg", "TEST_BUILD_NONE", "--label", "l=2", "--target", "t", "--no-cache", "--pull", "--platform", "amd64,linux/arm64"}, "",
			map[string]string{"filename": "Dockerfile", "build-arg:A": "1", "build-arg:TEST_BUILD_ARG": "e", "label:l": "2", "target": "t", "no-cache": "", "image-resolve-mode": "pull", "platform": "linux/amd64,linux/arm64"}, []string{"context", "dockerfile"}},
		"named contexts": {dir, []string{"--provenance=false", "--build-context", "y=" + dir + "/y", "--build-context", "base=docker-image://alpine"}, "", map[string]string{"filename": "Dockerfile", "context:y": "local:y", "context:base": "docker-image://alpine"}, []string{"context", "dockerfile", "y"}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := buildCommand(t, test.args...)
			cmd.SetIn(strings.NewReader(test.stdin))
			opt, release, err := solveOpt(cmd, test.from)
			if err != nil {
				t.Fatal(err)
			}
			defer release()
			if mounts := slices.Sorted(maps.Keys(opt.LocalMounts)); !maps.Equal(opt.FrontendAttrs, test.attrs) || !slices.Equal(mounts, test.mounts) {
				t.Errorf("attributes %q, mounts %q", opt.FrontendAttrs, mounts)
			}
		})
	}
	for name, args := range map[string][]string{
		"no Dockerfile": {"-f", dir + "/none"}, "a stored secret": {"--secret", "id=a,name=b"}, "an unknown privilege": {"--allow", "everything"}, "a cache of no type": {"--cache-to", "ref=x"},
		"an attestation": {"--provenance", "mode"}, "a context without a name": {"--build-context", "x"},
	} {
		if _, _, err := solveOpt(buildCommand(t, args...), dir); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

func TestKeepResult_WritesWhatDockerWrites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cmd := buildCommand(t, "--metadata-file", dir+"/meta", "--iidfile", dir+"/iid", "--quiet")
	var out strings.Builder
	cmd.SetOut(&out)
	descriptor := base64.StdEncoding.EncodeToString([]byte(`{"digest":"sha256:1"}`))
	if err := keepResult(cmd, map[string]string{"containerimage.digest": "sha256:1", "containerimage.descriptor": descriptor}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(dir + "/meta")
	var meta struct {
		Digest     string                  `json:"containerimage.digest"`
		Descriptor struct{ Digest string } `json:"containerimage.descriptor"`
	}
	if err := errors.Join(err, json.Unmarshal(text, &meta)); err != nil || meta.Digest != "sha256:1" || meta.Descriptor.Digest != "sha256:1" {
		t.Errorf("%v: %s", err, text)
	}
	if id, err := os.ReadFile(dir + "/iid"); err != nil || string(id) != "sha256:1" || out.String() != "sha256:1\n" {
		t.Errorf("%q, %v; printed %q", id, err, out.String())
	}
}
