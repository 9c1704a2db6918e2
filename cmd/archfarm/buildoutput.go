package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/containerd/console"
	bk "github.com/moby/buildkit/client"
	"github.com/spf13/cobra"

	"github.com/archfarm/archfarm/file"
)

// exportsOf is where --output, --push and --tag send the result.
func exportsOf(cmd *cobra.Command, stdout *os.File) ([]bk.ExportEntry, error) {
	flags := cmd.Flags()
	list, _ := flags.GetStringArray("output")
	names, _ := flags.GetStringArray("tag")
	annotations, _ := flags.GetStringArray("annotation")
	push, _ := flags.GetBool("push")
	var out []bk.ExportEntry
	for _, text := range list {
		entry, err := parseOutput(text, stdout)
		if err != nil {
			return nil, fmt.Errorf("--output %q: %w", text, err)
		}
		out = append(out, entry)
	}
	switch image := imageOf(out); {
	case push && image != nil:
		image.Attrs["push"] = "true"
	case push:
		out = append(out, bk.ExportEntry{Type: bk.ExporterImage, Attrs: map[string]string{"push": "true"}})
	case len(out) == 0 && len(names) > 0:
		fmt.Fprintln(cmd.ErrOrStderr(), "archfarm: the image goes nowhere but into the farm's cache: use --push or --output")
	}
	for i := range out {
		if err := nameExport(&out[i], names, annotations); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func imageOf(exports []bk.ExportEntry) *bk.ExportEntry {
	for i := range exports {
		if exports[i].Type == bk.ExporterImage {
			return &exports[i]
		}
	}
	return nil
}

// parseOutput reads one --output: NAME=VALUE,… with a type, a folder, or - for a tar
// archive on standard output.
func parseOutput(text string, stdout *os.File) (bk.ExportEntry, error) {
	entry := bk.ExportEntry{Attrs: map[string]string{}}
	switch {
	case text == "":
		return entry, errors.New("it is empty")
	case text == "-":
		text = "type=tar,dest=-"
	case !strings.Contains(text, "="):
		text = "type=local,dest=" + text
	}
	fields, err := fieldsOf(text)
	if err != nil {
		return entry, err
	}
	for _, f := range fields {
		if f.name == "type" {
			entry.Type = f.value
		} else {
			entry.Attrs[f.name] = f.value
		}
	}
	if entry.Type == "registry" {
		entry.Type = bk.ExporterImage
		entry.Attrs["push"] = "true"
	}
	return entry, place(&entry, stdout)
}

// place is where on this machine the result goes.
func place(entry *bk.ExportEntry, stdout *os.File) error {
	dest := entry.Attrs["dest"]
	delete(entry.Attrs, "dest")
	tar, err := strconv.ParseBool(entry.Attrs["tar"])
	folder := err == nil && !tar
	switch entry.Type {
	case bk.ExporterImage:
		if dest != "" {
			return errors.New("an image has no dest: it is pushed to its name")
		}
		return nil
	case bk.ExporterLocal:
		folder = true
	case bk.ExporterTar:
		folder = false
	case bk.ExporterOCI, bk.ExporterDocker:
	case "":
		return errors.New("it has no type, as type=registry or type=local")
	default:
		return errors.New("the type is image, registry, oci, docker, tar or local")
	}
	switch {
	case folder && (dest == "" || dest == "-"):
		return errors.New("it needs a folder: dest=PATH")
	case folder:
		entry.OutputDir = dest
		return nil
	case dest != "" && dest != "-":
		if isFolder(dest) {
			return fmt.Errorf("dest=%s is a folder", dest)
		}
		entry.Output = func(map[string]string) (io.WriteCloser, error) { return os.Create(dest) }
		return nil
	}
	if _, err := console.ConsoleFromFile(stdout); err == nil {
		return errors.New("it would write an archive to the terminal: name a file with dest=PATH")
	}
	entry.Output = func(map[string]string) (io.WriteCloser, error) { return stdout, nil }
	return nil
}

// nameExport gives an image the names and annotations of the flags.
func nameExport(entry *bk.ExportEntry, names, annotations []string) error {
	switch entry.Type {
	case bk.ExporterImage, bk.ExporterOCI, bk.ExporterDocker:
	default:
		return nil
	}
	if _, named := entry.Attrs["name"]; !named && len(names) > 0 {
		entry.Attrs["name"] = strings.Join(names, ",")
	}
	if entry.Attrs["name"] == "" && entry.Attrs["push"] == "true" {
		return errors.New("what is pushed needs a name: give one with --tag")
	}
	for _, text := range annotations {
		keys, value, err := parseAnnotation(text)
		if err != nil {
			return err
		}
		for _, key := range keys {
			entry.Attrs[key] = value
		}
	}
	return nil
}

var annotationKinds = regexp.MustCompile(`^((?:index|manifest|index-descriptor|manifest-descriptor)(?:\[[A-Za-z0-9_/-]+\])?(?:,(?:index|manifest|index-descriptor|manifest-descriptor)(?:\[[A-Za-z0-9_/-]+\])?)*):`)

// parseAnnotation reads KEY=VALUE, or KIND,KIND:KEY=VALUE, as exporters' attributes.
func parseAnnotation(text string) (keys []string, value string, err error) {
	kinds, rest := "", text
	if m := annotationKinds.FindStringSubmatch(text); m != nil {
		kinds, rest = m[1], text[len(m[0]):]
	}
	key, value, ok := strings.Cut(rest, "=")
	if !ok || key == "" {
		return nil, "", fmt.Errorf("--annotation %q: write KEY=VALUE, or index:KEY=VALUE", text)
	}
	for kind := range strings.SplitSeq(kinds, ",") {
		if kind != "" {
			kind = "-" + kind
		}
		keys = append(keys, "annotation"+kind+"."+key)
	}
	return keys, value, nil
}

// writeMetadata writes what the exporters have answered, as buildx does: values that
// are JSON in base64 are decoded.
func writeMetadata(path string, answer map[string]string) error {
	out := map[string]any{}
	for key, value := range answer {
		out[key] = value
		if decoded, err := base64.StdEncoding.DecodeString(value); err == nil {
			var object map[string]any
			if json.Unmarshal(decoded, &object) == nil && len(object) > 0 {
				out[key] = json.RawMessage(decoded)
			}
		}
	}
	text, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return err
	}
	return file.Replace(path, text, 0o644)
}
