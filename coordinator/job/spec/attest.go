package spec

import (
	"encoding/csv"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/distribution/reference"
)

// annotationKind is what buildx allows before an annotation's key: what it is of.
var annotationKind = regexp.MustCompile(`^(index|manifest|index-descriptor|manifest-descriptor)(\[[^\]]*\])?(,|:)`)

func checkAnnotation(name string) error {
	if kind := annotationKind.FindString(name); kind != "" {
		return fmt.Errorf("annotations are those of the image index: leave out %q", kind)
	}
	return nil
}

// checkProvenance reads it as buildx's --provenance and checks what BuildKit does.
func checkProvenance(text string) error {
	attrs, err := attributes(text)
	if err != nil {
		return err
	}
	for _, name := range []string{"reproducible", "inline-only", "capture-usage", "complete-materials", "disabled"} {
		if _, err := strconv.ParseBool(attrs[name]); attrs[name] != "" && err != nil {
			return fmt.Errorf("%s=%s: want true or false", name, quote(attrs[name]))
		}
	}
	switch attrs["mode"] {
	case "", "min", "max", "full":
	default:
		return fmt.Errorf("mode=%s: want min or max", quote(attrs["mode"]))
	}
	switch attrs["version"] {
	case "", "v0.2", "v1":
	default:
		return fmt.Errorf("version=%s: want v0.2 or v1", quote(attrs["version"]))
	}
	return nil
}

// checkSBOM reads it as buildx's --sbom.
func checkSBOM(text string) error {
	attrs, err := attributes(text)
	if err != nil {
		return err
	}
	if image, ok := attrs["generator"]; ok {
		if _, err := reference.ParseNormalizedNamed(image); err != nil {
			return fmt.Errorf("generator=%s: %w", quote(image), err)
		}
	}
	return nil
}

// attributes reads "", a truth value (none) or key=value pairs, separated by commas.
func attributes(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	if _, err := strconv.ParseBool(text); err == nil {
		return nil, nil
	}
	fields, err := pairs(text)
	if err != nil {
		return nil, err
	}
	attrs := map[string]string{}
	for _, field := range fields {
		name, value, ok := strings.Cut(field, "=")
		switch {
		case !ok:
			return nil, fmt.Errorf("%s: want true, false, or attributes as name=value", quote(field))
		case strings.EqualFold(strings.TrimSpace(name), "type"):
			return nil, errors.New("type is given by the field")
		}
		attrs[name] = value
	}
	return attrs, nil
}

// pairs splits at commas, but for those in quotation marks.
func pairs(text string) ([]string, error) {
	if len(text) > maxAttests {
		return nil, fmt.Errorf("%d bytes long, at most %d are possible", len(text), maxAttests)
	}
	if strings.ContainsAny(text, "\r\n") {
		return nil, errors.New("it has several lines")
	}
	fields, err := csv.NewReader(strings.NewReader(text)).Read()
	if err != nil {
		return nil, fmt.Errorf("%s: want name=value, separated by commas", quote(text))
	}
	return fields, nil
}
