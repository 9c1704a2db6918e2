package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"strings"
)

// field is one NAME=VALUE of a flag as --output and --secret.
type field struct{ name, value string }

// fieldsOf reads NAME=VALUE,…, in which quotation marks protect commas, as docker
// does it. Names are in lower case.
func fieldsOf(text string) ([]field, error) {
	parts, err := csv.NewReader(strings.NewReader(text)).Read()
	if err != nil {
		return nil, errors.New("write NAME=VALUE,NAME=VALUE")
	}
	var out []field
	for _, p := range parts {
		name, value, ok := strings.Cut(p, "=")
		if !ok {
			return nil, fmt.Errorf("%q is no NAME=VALUE", p)
		}
		out = append(out, field{strings.ToLower(strings.TrimSpace(name)), value})
	}
	return out, nil
}
