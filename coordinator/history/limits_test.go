package history

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestLimits_Defaults(t *testing.T) {
	t.Parallel()
	if got := (Limits{}).WithDefaults(); got != (Limits{MaxEntries: 50, MaxAge: 48 * time.Hour, MaxSize: 1 << 30}) {
		t.Errorf("%+v", got)
	}
	if own := (Limits{MaxEntries: 1, MaxAge: 2, MaxSize: 3}); own.WithDefaults() != own {
		t.Errorf("%+v", own.WithDefaults())
	}
}

func TestOverdue(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(ref string, hours int, size int64) kept {
		return kept{ref: ref, completed: now.Add(-time.Duration(hours) * time.Hour), size: size}
	}
	pinned := at("pinned", 100, 1000)
	pinned.pinned = true
	all := []kept{at("new", 1, 10), pinned, at("old", 60, 10), at("older", 70, 10), at("day", 24, 10)}
	for name, test := range map[string]struct {
		limits Limits
		want   []string
	}{
		"all is well":                   {Limits{MaxEntries: 50, MaxAge: 48 * time.Hour, MaxSize: 100}, nil},
		"too many, and too old":         {Limits{MaxEntries: 1, MaxAge: 48 * time.Hour, MaxSize: 100}, []string{"older", "old"}},
		"one more is kept":              {Limits{MaxEntries: 3, MaxAge: 48 * time.Hour, MaxSize: 100}, []string{"older"}},
		"too many, but none is too old": {Limits{MaxEntries: 1, MaxAge: 480 * time.Hour, MaxSize: 100}, nil},
		"too large":                     {Limits{MaxEntries: 50, MaxAge: 48 * time.Hour, MaxSize: 25}, []string{"older", "old"}},
		"nothing fits":                  {Limits{MaxEntries: 50, MaxAge: 48 * time.Hour, MaxSize: 1}, []string{"older", "old", "day", "new"}},
	} {
		if got := test.limits.overdue(all, now); !slices.Equal(got, test.want) {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

func TestOverdue_WhatIsLeftKeepsTheLimits(t *testing.T) {
	t.Parallel()
	now := time.Now()
	rapid.Check(t, func(t *rapid.T) {
		limits := Limits{MaxEntries: rapid.IntRange(1, 5).Draw(t, "entries"), MaxAge: time.Hour, MaxSize: int64(rapid.IntRange(1, 100).Draw(t, "size"))}
		var all []kept
		for i := range rapid.IntRange(0, 12).Draw(t, "records") {
			all = append(all, kept{
				ref: fmt.Sprint(i), completed: now.Add(-time.Duration(rapid.IntRange(0, 120).Draw(t, "age")) * time.Minute),
				pinned: rapid.Bool().Draw(t, "pinned"), size: int64(rapid.IntRange(0, 30).Draw(t, "bytes")),
			})
		}
		gone := limits.overdue(all, now)
		var size int64
		var left, aged int
		for _, r := range all {
			switch {
			case slices.Contains(gone, r.ref):
				if r.pinned {
					t.Fatalf("%s is pinned", r.ref)
				}
			case !r.pinned:
				size += r.size
				left++
				if now.Sub(r.completed) > limits.MaxAge {
					aged++
				}
			}
		}
		if size > limits.MaxSize || left > limits.MaxEntries && aged > 0 {
			t.Fatalf("%d bytes, %d records, %d of them old, are left with %+v", size, left, aged, limits)
		}
		if again := limits.overdue(slices.DeleteFunc(all, func(r kept) bool { return slices.Contains(gone, r.ref) }), now); len(again) > 0 {
			t.Fatalf("another time removes %v", again)
		}
	})
}
