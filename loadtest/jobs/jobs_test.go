package main

import (
	"strings"
	"testing"

	"github.com/archfarm/archfarm/e2e/farmtest"
)

// TestMeasure_ShortRunLosesNothing takes a few jobs through everything, a killed coordinator included, with the real parts.
func TestMeasure_ShortRunLosesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a coordinator")
	}
	farmtest.FindFarmTools(t) // skips, or fails, where they are missing
	var out strings.Builder
	measure(t.Context(), t, shortly(), &out)
	for _, want := range []string{
		"60 jobs of 2 platforms", "the coordinator was killed", "checked: 60 jobs, each succeeded once", "20 jobs watched",
		"checked: 60 tags in the registry and the ledger", "coordinator after:",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
}

func TestParse(t *testing.T) {
	t.Parallel()
	for line, ok := range map[string]bool{
		"": true, "-jobs 7 -kill": true, "-publish=false -history=false": true, "-short": true, "-watched 0": true,
		"more": false, "-jobs 0": false, "-clients 0": false, "-platforms 3": false, "-watched -1": false, "-limit 0s": false, "-unknown": false,
	} {
		t.Run(line, func(t *testing.T) {
			t.Parallel()
			if _, err := parse(strings.Fields(line)); (err == nil) != ok {
				t.Errorf("error %v", err)
			}
		})
	}
	if o, err := parse([]string{"-short", "-jobs", "7"}); err != nil || o != shortly() {
		t.Errorf("short: %+v, %v", o, err)
	}
}
