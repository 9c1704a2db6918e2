package history

import (
	"slices"
	"testing"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// ago is a record of a build that began so long ago and took so long.
func ago(ref string, began, took time.Duration, change ...func(*controlapi.BuildHistoryRecord)) *controlapi.BuildHistoryRecord {
	start := time.Now().Add(-began)
	r := &controlapi.BuildHistoryRecord{Ref: ref, CreatedAt: timestamppb.New(start), CompletedAt: timestamppb.New(start.Add(took))}
	for _, c := range change {
		c(r)
	}
	return r
}

func failed(message string) func(*controlapi.BuildHistoryRecord) {
	return func(r *controlapi.BuildHistoryRecord) { r.Error = &spb.Status{Message: message} }
}

func attrs(kv ...string) func(*controlapi.BuildHistoryRecord) {
	return func(r *controlapi.BuildHistoryRecord) { r.FrontendAttrs = map[string]string{kv[0]: kv[1]} }
}

func refs(records []*controlapi.BuildHistoryRecord) []string {
	var out []string
	for _, r := range records {
		out = append(out, r.GetRef())
	}
	return out
}

func TestChoose_FiltersAndLimits(t *testing.T) {
	t.Parallel()
	records := []*controlapi.BuildHistoryRecord{
		ago("a", 3*time.Hour, time.Minute, attrs("vcs:source", "https://example.com/one.git")),
		ago("b", time.Hour, time.Hour, failed("exit code: 1"), attrs("context", "https://github.com/two/two.git#main")),
		ago("c", 2*time.Hour, time.Second, failed("rpc error: context canceled")),
		{Ref: "d", CreatedAt: timestamppb.Now()},
	}
	for name, test := range map[string]struct {
		filter []string
		limit  int32
		want   []string
	}{
		"nothing":              {nil, 0, []string{"a", "b", "c", "d"}},
		"newest first":         {nil, 2, []string{"d", "b"}},
		"a large limit":        {nil, 10, []string{"d", "b", "c", "a"}},
		"reference":            {[]string{"ref==b"}, 0, []string{"b"}},
		"part of a reference":  {[]string{"ref~=[ab]"}, 0, []string{"a", "b"}},
		"completed":            {[]string{"status==completed"}, 0, []string{"a"}},
		"failed":               {[]string{"status==error"}, 0, []string{"b"}},
		"canceled":             {[]string{"status==canceled"}, 0, []string{"c"}},
		"running":              {[]string{"status==running"}, 0, []string{"d"}},
		"not failed":           {[]string{"status!=error"}, 0, []string{"a", "c", "d"}},
		"repository":           {[]string{"repository~=one"}, 0, []string{"a"}},
		"repository of a URL":  {[]string{"repository==https://github.com/two/two.git"}, 0, []string{"b"}},
		"started since":        {[]string{"startedAt>=90m"}, 0, []string{"b", "d"}},
		"started before":       {[]string{"startedAt<150m"}, 0, []string{"a"}},
		"a point in time":      {[]string{"startedAt>" + time.Now().Add(time.Hour).Format(time.RFC3339)}, 0, nil},
		"completed since":      {[]string{"completedAt>=1h59m59s"}, 0, []string{"b", "c"}},
		"duration":             {[]string{"duration>30s"}, 0, []string{"a", "b"}},
		"duration to a second": {[]string{"duration<=1s"}, 0, []string{"c", "d"}},
		"both":                 {[]string{"duration>30s,status==error"}, 0, []string{"b"}},
		"either, and a limit":  {[]string{"status==error", "ref==a"}, 1, []string{"b"}},
		"an empty filter":      {[]string{""}, 0, []string{"a", "b", "c", "d"}},
	} {
		got, err := choose(records, test.filter, test.limit)
		if err != nil || !slices.Equal(refs(got), test.want) {
			t.Errorf("%s: %v, %v; want %v", name, refs(got), err, test.want)
		}
	}
	for _, bad := range []string{"startedAt>soon", "duration<1", "~~", `"`} {
		if _, err := choose(records, []string{bad}, 0); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
	if _, err := choose(records, nil, -1); err == nil {
		t.Error("a negative limit is no error")
	}
}

func FuzzParseFilter(f *testing.F) {
	for _, seed := range []string{"", "ref==a", "duration>=1h,status!=error", `"startedAt<2024-01-01T00:00:00Z"`} {
		f.Add(seed)
	}
	record := ago("a", time.Hour, time.Minute, attrs("context", "https://example.com/x.git"))
	f.Fuzz(func(_ *testing.T, text string) {
		conditions, err := parseFilter(text, time.Now())
		for _, c := range conditions {
			if err == nil {
				c(record)
			}
		}
	})
}
