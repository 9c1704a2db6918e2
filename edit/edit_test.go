package edit_test

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/edit"
)

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"main", "mian", 2}, {"v1.2", "v1.2.3", 2}} {
		if got := edit.Distance(c.a, c.b); got != c.want {
			t.Errorf("%q and %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestDistance_PropertyIsAMetric(t *testing.T) {
	t.Parallel()
	name := rapid.StringMatching("[ab]{0,6}")
	rapid.Check(t, func(r *rapid.T) {
		a, b, c := name.Draw(r, "a"), name.Draw(r, "b"), name.Draw(r, "c")
		if edit.Distance(a, b) != edit.Distance(b, a) || (edit.Distance(a, b) == 0) != (a == b) || edit.Distance(a, c) > edit.Distance(a, b)+edit.Distance(b, c) {
			r.Fatalf("%q %q %q", a, b, c)
		}
	})
}
