package history

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/util/gitutil"
)

// condition is one requirement that a record meets or not.
type condition func(*controlapi.BuildHistoryRecord) bool

// choose returns the records that a listener asked for: those that meet all
// conditions of any filter, and of these the newest when there is a limit. The
// notation is BuildKit's (ref, status, repository, startedAt, completedAt,
// duration), and its order: that given without a limit, newest first with one.
func choose(records []*controlapi.BuildHistoryRecord, filter []string, limit int32) ([]*controlapi.BuildHistoryRecord, error) {
	if limit < 0 {
		return nil, fmt.Errorf("invalid limit %d", limit)
	}
	var alternatives [][]condition
	for _, f := range filter {
		conditions, err := parseFilter(f, time.Now())
		if err != nil {
			return nil, err
		}
		alternatives = append(alternatives, conditions)
	}
	out := slices.DeleteFunc(slices.Clone(records), func(r *controlapi.BuildHistoryRecord) bool {
		return len(alternatives) > 0 && !slices.ContainsFunc(alternatives, func(all []condition) bool {
			return !slices.ContainsFunc(all, func(c condition) bool { return !c(r) })
		})
	})
	if limit == 0 {
		return out, nil
	}
	slices.SortStableFunc(out, func(a, b *controlapi.BuildHistoryRecord) int {
		return b.GetCreatedAt().AsTime().Compare(a.GetCreatedAt().AsTime())
	})
	return out[:min(len(out), int(limit))], nil
}

// parseFilter reads the conditions of one filter, which are separated by commas.
func parseFilter(text string, now time.Time) ([]condition, error) {
	fields, err := csv.NewReader(strings.NewReader(text)).Read()
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("invalid history filter %q: %w", text, err)
	}
	var out []condition
	var rest []string
	for _, field := range fields {
		timed, err := timeCondition(field, now)
		if err != nil {
			return nil, err
		}
		if timed == nil {
			rest = append(rest, field)
			continue
		}
		out = append(out, timed)
	}
	match, err := filters.ParseAll(strings.Join(rest, ","))
	if err != nil {
		return nil, fmt.Errorf("invalid history filter %q: %w", text, err)
	}
	return append(out, func(r *controlapi.BuildHistoryRecord) bool { return match.Match(adapt(r)) }), nil
}

// timeCondition reads a comparison of times or durations; nil if it is none.
func timeCondition(text string, now time.Time) (condition, error) {
	i := strings.IndexAny(text, "<>")
	if i < 0 {
		return nil, nil
	}
	key, value := text[:i], text[i+1:]
	less, equal := text[i] == '<', strings.HasPrefix(value, "=")
	value = strings.TrimPrefix(value, "=")
	var want int64
	switch key {
	case "startedAt", "completedAt":
		moment, err := parseMoment(value, now)
		if err != nil {
			return nil, err
		}
		want = moment.Unix()
	case "duration":
		d, err := time.ParseDuration(value)
		if err != nil {
			return nil, fmt.Errorf("invalid duration %s", value)
		}
		want = int64(d)
	default:
		return nil, nil
	}
	return func(r *controlapi.BuildHistoryRecord) bool {
		got := measure(r, key)
		return equal && got == want || less && got < want || !less && got > want
	}, nil
}

// parseMoment reads a time, or how long ago it was.
func parseMoment(value string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(value); err == nil {
		return now.Add(-ago), nil
	}
	moment, err := time.Parse(time.RFC3339, value)
	if err != nil {
		return time.Time{}, fmt.Errorf("invalid time %s", value)
	}
	return moment, nil
}

// measure is the number that a record has for a key: seconds since 1970, or
// nanoseconds of a duration; 0 for what has not completed.
func measure(r *controlapi.BuildHistoryRecord, key string) int64 {
	switch {
	case key == "startedAt":
		return r.GetCreatedAt().AsTime().Unix()
	case r.GetCompletedAt() == nil:
		return 0
	case key == "completedAt":
		return r.GetCompletedAt().AsTime().Unix()
	}
	return int64(r.GetCompletedAt().AsTime().Sub(r.GetCreatedAt().AsTime()))
}

// adapt are the fields of a record that filters name.
func adapt(r *controlapi.BuildHistoryRecord) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		if len(path) == 0 {
			return "", false
		}
		switch path[0] {
		case "ref":
			return r.GetRef(), r.GetRef() != ""
		case "status":
			return state(r), true
		case "repository":
			return repository(r.GetFrontendAttrs())
		}
		return "", false
	})
}

func state(r *controlapi.BuildHistoryRecord) string {
	switch {
	case r.GetCompletedAt() == nil:
		return "running"
	case r.GetError() == nil:
		return "completed"
	case strings.Contains(r.GetError().GetMessage(), "context canceled"):
		return "canceled"
	}
	return "error"
}

func repository(attrs map[string]string) (string, bool) {
	if source, ok := attrs["vcs:source"]; ok {
		return source, true
	}
	if build, ok := attrs["context"]; ok {
		if url, err := gitutil.ParseURL(build); err == nil {
			return url.Remote, true
		}
	}
	return "", false
}
