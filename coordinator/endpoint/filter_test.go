package endpoint

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/filters"
	apitypes "github.com/moby/buildkit/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestRecordFilter_ChoosesWorkersAndTellsTheRestToThem(t *testing.T) {
	t.Parallel()
	const none = "not asked"
	for name, test := range map[string]struct {
		filter []string
		a, b   string // what the daemons of the workers a and b.c are told, strings joined by " or "
	}{
		"nothing":                          {nil, "", ""},
		"buildx's nothing":                 {[]string{""}, "", ""},
		"not about workers":                {[]string{"type==regular,inuse"}, "type==regular,inuse", "type==regular,inuse"},
		"one worker":                       {[]string{"worker==a"}, "", none},
		"as buildctl's users write it":     {[]string{"worker=a"}, "", none},
		"in quotes":                        {[]string{`worker=="b.c"`}, none, ""},
		"the field in quotes":              {[]string{`"worker"==b.c`}, none, ""},
		"all but one":                      {[]string{"worker!=a"}, none, ""},
		"a regular expression":             {[]string{`worker~=^b\.`}, none, ""},
		"a quoted regular expression":      {[]string{`worker~=/a|b/`}, "", ""},
		"one that does not compile":        {[]string{"worker~=("}, none, none},
		"that there is one":                {[]string{"worker"}, "", ""},
		"and more":                         {[]string{"mutable,worker==a,type==regular"}, "mutable,type==regular", none},
		"two at once":                      {[]string{"worker==a,worker==b.c"}, none, none},
		"either":                           {[]string{"worker==a,mutable", "worker==b.c", "shared"}, "mutable or shared", " or shared"},
		"nobody":                           {[]string{"worker==z"}, none, none},
		"a value that looks like one":      {[]string{`description=="x,worker==a"`}, `description=="x,worker==a"`, `description=="x,worker==a"`},
		"a value with quotes":              {[]string{`description~=a"b,worker==a`}, `description~=a"b`, none},
		"a value with an escaped quote":    {[]string{`description=="a\",worker==z",worker==a`}, `description=="a\",worker==z"`, none},
		"a label of that name":             {[]string{"labels.worker==a"}, "labels.worker==a", "labels.worker==a"},
		"an id as the farm shows it":       {[]string{"id==x@a"}, "id==x", "id==x@a"},
		"an id as the daemon has it":       {[]string{"id==x"}, "id==x", "id==x"},
		"buildx's id":                      {[]string{"id~=x@b.c"}, "id~=x@b.c", "id~=x"},
		"not that id":                      {[]string{"id!=x@a"}, "id!=x", "id!=x@a"},
		"the whole id":                     {[]string{"id~=^x@a$"}, "id~=^x$", "id~=^x@a$"},
		"ids of two workers":               {[]string{"id~=/x@a|y@b.c/"}, "id~=/x|y@b.c/", "id~=/x@a|y/"},
		"a worker with a longer name":      {[]string{"id==x@a1", "parents~=x@ab;y@a"}, "id==x@a1 or parents~=x@ab;y", "id==x@a1 or parents~=x@ab;y@a"},
		"what looks like an id, elsewhere": {[]string{"description==x@a"}, "description==x@a", "description==x@a"},
		"with space":                       {[]string{" worker == a , id == x@a"}, none, none}, // refused below
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, err := parseRecordFilter("diskusage", test.filter)
			if name == "with space" {
				if err == nil {
					t.Error("containerd's grammar takes no space after a value")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for worker, want := range map[string]string{"a": test.a, "b.c": test.b} {
				list, ok := f.of(worker)
				got := strings.Join(list, " or ")
				if !ok {
					got = none
				}
				if got != want {
					t.Errorf("%s: %q, want %q", worker, got, want)
				}
				if ok && len(test.filter) > 0 && len(list) == 0 {
					t.Errorf("%s: told nothing, although there is a filter", worker)
				}
			}
		})
	}
}

func TestRecordFilter_RefusesWhatBuildkitdRefuses(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"id=x", "id==", ",", "a,", ",a", "==x", `id=="x`, "worker==", "worker===a", "a b", "worker=a,", "\x00", "worker=,a"} {
		_, err := parseRecordFilter("prune", []string{bad})
		if err == nil {
			t.Errorf("%q is taken", bad)
			continue
		}
		if want := "failed to parse prune filters [" + bad + "]: "; !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if _, err := parseRecordFilter("prune", []string{strings.Repeat("x", maxFilters)}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("one too long: %v", err)
	}
}

// FuzzRecordFilter checks that what a daemon is told means what the client has said.
func FuzzRecordFilter(f *testing.F) {
	for _, seed := range []string{"", "worker==a", "id~=x@a,worker!=b", `"worker"~=/a|b/,description=="x,y"`, `id=="a\"b",mutable`, "labels.\"a.b\"==c", "worker=a", "id==x@a1"} {
		f.Add(seed, "x", "a")
	}
	f.Fuzz(func(t *testing.T, text, id, worker string) {
		if checkName(worker) || strings.ContainsFunc(id, func(r rune) bool { return !inName(r) }) {
			return
		}
		if got := strings.Join(cut(text), ","); got != text {
			t.Fatalf("cut into pieces of something else: %q", got)
		}
		parsed, err := parseRecordFilter("diskusage", []string{text})
		theirs, theirErr := filters.ParseAll(text)
		if theirErr != nil || err != nil {
			if theirErr == nil {
				t.Fatalf("a valid filter is refused: %v", err)
			}
			return // what is refused, or only the farm takes
		}
		list, asked := parsed.of(worker)
		got := false
		if asked {
			ours, err := filters.ParseAll(list...)
			if err != nil {
				t.Fatalf("the worker is told %q: %v", list, err)
			}
			got = ours.Match(usage(id, ""))
		}
		if strings.Contains(text, "@") || strings.Contains(text, "id") && strings.Contains(text, "~") {
			return // ids as the farm shows them, or parts of them
		}
		if want := theirs.Match(usage(id, worker)); got != want {
			t.Fatalf("%q on worker %q: %t, should be %t; told %q", text, worker, got, want, list)
		}
	})
}

// checkName tells that no worker can have that name.
func checkName(name string) bool {
	return name == "" || strings.ContainsFunc(name, func(r rune) bool { return !inName(r) })
}

func usage(id, worker string) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch {
		case path[0] == "id":
			return id, true
		case slices.Equal(path, []string{"worker"}):
			return worker, worker != ""
		}
		return "", false
	})
}

// FuzzWorkerFilter checks that no filter of workers makes the coordinator panic.
func FuzzWorkerFilter(f *testing.F) {
	for _, seed := range []string{"", "id==a", "labels", `labels."archfarm.worker"~=/a|b/`, "labels.a.b.c!=d,id", `""=="x"`} {
		f.Add(seed, "archfarm.worker", "a")
	}
	f.Fuzz(func(_ *testing.T, text, label, value string) {
		if filter, err := filters.ParseAll(text, text); err == nil {
			filter.Match(workerFields(&apitypes.WorkerRecord{ID: value, Labels: map[string]string{label: value}}))
			filter.Match(workerFields(&apitypes.WorkerRecord{}))
		}
	})
}
