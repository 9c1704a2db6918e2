package worker

import (
	"fmt"
	"regexp"
)

const (
	maxLabels = 32
	maxLabel  = 63 // characters of a key, and of a value
)

// Keys and values are those of Kubernetes, a key with its prefix as long as there
// without (kubernetes.io/docs/concepts/overview/working-with-objects/labels).
var (
	labelKey   = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)
	labelValue = regexp.MustCompile(`^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$`)
)

// CheckLabels says what is wrong with an operator's labels.
func CheckLabels(labels map[string]string) error {
	if len(labels) > maxLabels {
		return fmt.Errorf("%d labels: a worker has at most %d", len(labels), maxLabels)
	}
	for key, value := range labels {
		switch {
		case len(key) > maxLabel || !labelKey.MatchString(key):
			return fmt.Errorf("label %q: a key has 1 to %d letters, digits, '-', '_' and '.', begins and ends with a letter or digit, and may have a prefix: zone, example.org/zone", clip(key), maxLabel)
		case len(value) > maxLabel || !labelValue.MatchString(value):
			return fmt.Errorf("label %s: its value %q must have at most %d letters, digits, '-', '_' and '.', and begin and end with a letter or digit", key, clip(value), maxLabel)
		}
	}
	return nil
}
