package endpoint

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/schedule"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

var (
	operator = identity.Identity{}
	acme     = identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "acme", Pools: []string{"office"}}
	evil     = identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "evil"}
)

// fullFarm has two workers in two pools, both full, and a leg that waits for each tenant.
func fullFarm(t *testing.T) *Fleet {
	t.Helper()
	amd64 := []ocispecs.Platform{platforms.MustParse("linux/amd64")}
	s := schedule.New(nil)
	s.Update([]schedule.Worker{{Name: "cloud-1", Platforms: amd64, Pool: "cloud", Slots: 1, Used: 1}, {Name: "office-1", Platforms: amd64, Pool: "office", Slots: 1, Used: 1}})
	for _, d := range []schedule.Demand{
		{Platform: amd64[0], Build: "a", Tenant: "acme", Pools: []string{"office"}, Known: []string{"office"}}, {Platform: amd64[0], Build: "e", Tenant: "evil"},
	} {
		ticket, err := s.Enqueue([]schedule.Demand{d})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(ticket.Close)
	}
	return &Fleet{Scheduler: s}
}

func TestListQueue_ShowsATenantItsOwn(t *testing.T) {
	t.Parallel()
	f := fullFarm(t)
	for want, who := range map[string]identity.Identity{
		"a e": operator, "a": acme, "e": evil, "": {Kind: identity.Client, Name: "ci", Tenant: "other"}, "a e ": {Kind: identity.Admin, Name: "root", Tenant: "other"},
	} {
		got, err := f.ListQueue(identity.NewContext(t.Context(), who), &archfarmv1.ListQueueRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var builds []string
		for _, l := range got.GetLegs() {
			builds = append(builds, l.GetBuild())
			if l.GetPlatform() != "linux/amd64" || l.GetSince() == nil || l.GetReason() == "" {
				t.Errorf("%s sees %v", who, l)
			}
		}
		if strings.Join(builds, " ") != strings.TrimSpace(want) {
			t.Errorf("%s of %s sees %v, want %s", who, who.Tenant, builds, want)
		}
	}
}

func explain(ctx context.Context, f *Fleet, who identity.Identity, platform, pool string) (*archfarmv1.LegExplanation, error) {
	got, err := f.Explain(identity.NewContext(ctx, who), &archfarmv1.ExplainRequest{Subject: &archfarmv1.ExplainRequest_Platform{Platform: platform}, Pool: pool})
	if err != nil {
		return nil, err
	}
	return got.GetLegs()[0], nil
}

func TestExplain_NamesOnlyWorkersOfTheCallersPools(t *testing.T) {
	t.Parallel()
	f := fullFarm(t)
	for _, c := range []struct {
		who  identity.Identity
		pool string
		want []string // eligible
	}{
		{operator, "", []string{"cloud-1", "office-1"}}, {operator, "cloud", []string{"cloud-1"}}, {evil, "", []string{"cloud-1", "office-1"}},
		{acme, "", []string{"office-1"}}, {acme, "office", []string{"office-1"}},
	} {
		got, err := explain(t.Context(), f, c.who, "linux/x86_64", c.pool)
		if err != nil {
			t.Fatal(err)
		}
		var eligible []string
		for _, v := range got.GetWorkers() {
			if v.GetEligible() {
				eligible = append(eligible, v.GetWorker())
			}
			if c.who.Name == acme.Name && c.who.Tenant == acme.Tenant && v.GetWorker() == "cloud-1" {
				t.Errorf("a client of another pool is told of %v", v)
			}
		}
		if !slices.Equal(eligible, c.want) || got.GetPlatform() != "linux/amd64" || got.GetSummary() == "" {
			t.Errorf("%s, pool %q: %v", c.who, c.pool, got)
		}
	}
}

func TestExplain_RefusesWhatMakesNoSense(t *testing.T) {
	t.Parallel()
	f := fullFarm(t)
	for _, c := range []struct {
		who            identity.Identity
		platform, pool string
		want           codes.Code
	}{
		{operator, "a/b/c/d", "", codes.InvalidArgument}, {operator, "", "", codes.InvalidArgument}, {operator, "linux/amd64", "../x", codes.InvalidArgument},
		{acme, "linux/amd64", "cloud", codes.PermissionDenied}, {evil, "linux/amd64", "cloud", codes.OK},
	} {
		if _, err := explain(t.Context(), f, c.who, c.platform, c.pool); status.Code(err) != c.want {
			t.Errorf("%s, %q in %q: %v", c.who, c.platform, c.pool, err)
		}
	}
	if _, err := f.Explain(t.Context(), &archfarmv1.ExplainRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("of nothing: %v", err)
	}
}
