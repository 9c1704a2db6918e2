package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const events = `{"Action":"run","Test":"TestIntegration"}
{"Action":"run","Test":"TestIntegration/A/worker=oci"}
{"Action":"output","Test":"TestIntegration/A/worker=oci","Output":"{\"Action\":\"pass\"}"}
not JSON
{"Action":"pass","Test":"TestIntegration/A/worker=oci"}
{"Action":"run","Test":"TestIntegration/B/worker=oci"}
{"Action":"run","Test":"TestIntegration/B/worker=oci/part"}
{"Action":"fail","Test":"TestIntegration/B/worker=oci/part"}
{"Action":"fail","Test":"TestIntegration/B/worker=oci"}
{"Action":"run","Test":"TestIntegration/C/worker=oci"}
{"Action":"fail","Test":"TestIntegration"}`

func TestRead_CountsTestsWithoutTestsBelow(t *testing.T) {
	t.Parallel()
	got, err := read(strings.NewReader(events))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]outcome{"TestIntegration/A/worker=oci": pass, "TestIntegration/B/worker=oci/part": fail, "TestIntegration/C/worker=oci": unfinished}
	if len(got) != len(want) {
		t.Errorf("outcomes %v, want %v", got, want)
	}
	for name, o := range want {
		if got[name] != o {
			t.Errorf("%s: %q, want %q", name, got[name], o)
		}
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	plain := map[string]outcome{"T/same": pass, "T/lost": pass, "T/missing": pass, "T/broken": fail, "T/debt": pass, "T/paid": pass}
	farm := map[string]outcome{"T/same": pass, "T/lost": fail, "T/broken": fail, "T/debt": fail, "T/paid": pass}
	known := []difference{{regexp.MustCompile("^T/debt$"), "why"}, {regexp.MustCompile("^T/paid$"), "why"}}
	got := compare(plain, farm, known)
	want := []string{
		"T/lost: pass on a plain buildkitd, fail on the farm",
		"T/missing: pass on a plain buildkitd, not run on the farm",
		"T/paid: listed as a known difference, but there is none: remove it from the list",
	}
	if !slices.Equal(got, want) {
		t.Errorf("differences %q, want %q", got, want)
	}
}

func TestPattern_RunsWhatItNames(t *testing.T) {
	t.Parallel()
	got := pattern([]string{"TestIntegration/A/worker=oci", "TestIntegration/B(1)/worker=oci/part"})
	if want := `^(TestIntegration)$/^(A|B\(1\))$/^(worker=oci)$`; got != want {
		t.Errorf("pattern %s, want %s", got, want)
	}
}

func TestReadKnown(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "known.txt")
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# a comment\n\nT/a.*\tits reason\n")
	got, err := readKnown(path)
	if err != nil || len(got) != 1 || !got[0].test.MatchString("T/abc") || got[0].test.MatchString("xT/a") || got[0].reason != "its reason" {
		t.Errorf("read %v, %v", got, err)
	}
	for _, bad := range []string{"T/a without a reason", "T/(\treason"} {
		write(bad)
		if _, err := readKnown(path); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}
