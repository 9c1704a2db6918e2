package split

import (
	"slices"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
)

func TestPools(t *testing.T) {
	t.Parallel()
	if got, err := Pools(map[string]string{"build-arg:other": "x"}); err != nil || got != nil {
		t.Errorf("unasked: %v, %v", got, err)
	}
	for list, want := range map[string][]string{
		"office": {"office"}, "office,cloud, office": {"cloud", "office"}, "A.b_c-1": {"A.b_c-1"},
	} {
		if got, err := Pools(map[string]string{"build-arg:archfarm.pool": list}); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
	for _, list := range []string{"", "office,", "a b", "../x", "ü", "..", strings.Repeat("x", 129), strings.Repeat("x,", 64) + "x"} {
		if got, err := Pools(map[string]string{"build-arg:archfarm.pool": list}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
}

func TestWithoutPools_LeavesTheRequestItselfAsItIs(t *testing.T) {
	t.Parallel()
	opt := map[string]string{"build-arg:archfarm.pool": "office", "build-arg:x": "y"}
	req := &controlapi.SolveRequest{Ref: "r", FrontendAttrs: opt}
	if out := WithoutPools(req); out.GetRef() != "r" || len(out.GetFrontendAttrs()) != 1 || out.GetFrontendAttrs()["build-arg:x"] != "y" {
		t.Errorf("%v", out)
	}
	call := &gwpb.SolveRequest{Frontend: "f", FrontendOpt: opt}
	if out := FrontendWithoutPools(call); out.GetFrontend() != "f" || len(out.GetFrontendOpt()) != 1 {
		t.Errorf("%v", out)
	}
	if len(opt) != 2 {
		t.Errorf("the client's own: %v", opt)
	}
	plain := &gwpb.SolveRequest{}
	if FrontendWithoutPools(plain) != plain {
		t.Error("copied for nothing")
	}
}

func FuzzPools(f *testing.F) {
	for _, seed := range []string{"", "office", "a,b", ",", " a ,\x00", strings.Repeat("a,", 70)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, list string) {
		pools, err := Pools(map[string]string{"build-arg:archfarm.pool": list})
		if err != nil {
			if status.Code(err) != codes.InvalidArgument || len(err.Error()) > 1000 {
				t.Fatalf("%v", err)
			}
			return
		}
		if len(pools) == 0 || len(pools) > 64 || !slices.IsSorted(pools) || len(slices.Compact(slices.Clone(pools))) != len(pools) || slices.ContainsFunc(pools, func(p string) bool { return !identity.ValidName(p) }) {
			t.Fatalf("%q", pools)
		}
	})
}
