package schedule

import (
	"testing"
	"time"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestExpect_UntilGraceHasPassed(t *testing.T) {
	t.Parallel()
	now := time.Now()
	s := New(func() time.Time { return now })
	amd, arm := ocispecs.Platform{OS: "linux", Architecture: "amd64"}, ocispecs.Platform{OS: "linux", Architecture: "arm64"}
	s.Expect([]Worker{{Name: "arm-1", Pool: "office", Platforms: []ocispecs.Platform{arm}}})
	s.Update([]Worker{{Name: "amd-1", Platforms: []ocispecs.Platform{amd}, Slots: 1}})
	check := func(when string, want bool, members int) {
		t.Helper()
		if got := s.Awaits(arm); got != want {
			t.Errorf("%s: arm64 is awaited: %v", when, got)
		}
		if got := s.Awaits(arm, "office"); got != want {
			t.Errorf("%s: arm64 of its pool is awaited: %v", when, got)
		}
		if s.Awaits(arm, "other") || s.Awaits(amd) {
			t.Errorf("%s: what nobody had is awaited", when)
		}
		if got := s.Members(); len(got) != members {
			t.Errorf("%s: members %v", when, got)
		}
	}
	check("at first", true, 2)
	now = now.Add(DefaultGrace - time.Second)
	check("before Grace has passed", true, 2)
	s.Update([]Worker{{Name: "amd-1", Platforms: []ocispecs.Platform{amd}}, {Name: "arm-1", Pool: "office", Platforms: []ocispecs.Platform{arm}}})
	check("once it is there", true, 2)
	s.Update(nil)
	now = now.Add(2 * time.Second)
	check("after it", false, 0)
}
