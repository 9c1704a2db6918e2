package dispatch_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	controlapi "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const poolArg = "build-arg:archfarm.pool"

// in attaches a worker of a pool, which is able to emulate the platforms given.
func (f *farm) in(t *testing.T, pool, name string, slots int, native string, emulated ...string) *daemon {
	t.Helper()
	f.door.Pool = pool
	defer func() { f.door.Pool = "" }()
	d := f.worker(t, name, slots, native)
	d.Report(func(r *archfarmv1.Report) { r.Emulated = emulated })
	synctest.Wait()
	return d
}

// as is a call of a client with a certificate for those pools.
func as(ctx context.Context, tenant string, pools ...string) context.Context {
	return identity.NewContext(ctx, identity.Identity{Kind: identity.Client, Name: "ci", Tenant: tenant, Pools: pools})
}

// pooled asks for pools, in the build's request or in its frontend's.
func pooled(req *controlapi.SolveRequest, pools string) *controlapi.SolveRequest {
	req.FrontendAttrs[poolArg] = pools
	return req
}

func TestPools_ABuildRunsInThoseThatItAsksForAndItsWorkersAreNotTold(t *testing.T) {
	for name, ask := range map[string]func(*controlapi.SolveRequest, *gwpb.SolveRequest){
		"by its request":  func(r *controlapi.SolveRequest, _ *gwpb.SolveRequest) { pooled(r, "office") },
		"by its frontend": func(_ *controlapi.SolveRequest, c *gwpb.SolveRequest) { c.FrontendOpt[poolArg] = "office" },
		"by both, of which several are asked for": func(r *controlapi.SolveRequest, c *gwpb.SolveRequest) {
			pooled(r, "office,lab")
			c.FrontendOpt[poolArg] = "lab,office"
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				f.in(t, "cloud", "a", 9, amd64)
				own := f.in(t, "office", "b", 1, amd64)
				req, call := request("b", amd64, ""), frontend(amd64)
				ask(req, call)
				b, _ := f.begin(t.Context(), t, req)
				must(b.Solve(t.Context(), call))(t)
				if own.Used() != 1 {
					t.Error("it runs elsewhere")
				}
				for _, j := range own.attempts() {
					if _, told := j.req.GetFrontendAttrs()[poolArg]; told {
						t.Error("the worker's daemon is told by the request")
					}
				}
				for _, s := range own.solves {
					if _, told := s.GetFrontendOpt()[poolArg]; told {
						t.Error("the worker's daemon is told by the frontend")
					}
				}
			})
		})
	}
}

func TestPools_ARequestThatNamesItsFrontendItselfIsNotToldEither(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.in(t, "cloud", "a", 9, amd64)
		own := f.in(t, "office", "b", 1, amd64)
		req := pooled(request("b", amd64, ""), "office")
		req.Frontend = "dockerfile.v0"
		b, _ := f.begin(t.Context(), t, req)
		must(b.Result(t.Context()))(t)
		if len(own.solves) != 1 || own.solves[0].GetFrontendOpt()["platform"] != amd64 {
			t.Fatalf("%v", own.solves)
		}
		if _, told := own.solves[0].GetFrontendOpt()[poolArg]; told {
			t.Error("the frontend is told")
		}
		if req.GetFrontendAttrs()[poolArg] != "office" {
			t.Error("the client's request was changed: the record would not show what was asked for")
		}
	})
}

func TestPools_WhatACertificateDoesNotAllowIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.in(t, "cloud", "a", 9, amd64)
		f.in(t, "office", "b", 1, amd64)
		ctx := as(t.Context(), "acme", "office", "lab")
		if _, err := f.Begin(ctx, pooled(request("b", amd64, ""), "office,cloud")); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "client ci may not use the pool cloud") {
			t.Errorf("in the request: %v", err)
		}
		if _, err := f.Begin(ctx, pooled(request("b", amd64, ""), "of fice")); status.Code(err) != codes.InvalidArgument {
			t.Errorf("an impossible name: %v", err)
		}
		b, _ := f.begin(ctx, t, request("b", amd64, ""))
		call := frontend(amd64)
		call.FrontendOpt[poolArg] = "cloud"
		if _, err := b.Solve(ctx, call); status.Code(err) != codes.PermissionDenied {
			t.Errorf("by the frontend: %v", err)
		}
	})
}

func TestPools_ACertificatesPoolsBoundWhereABuildRuns(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.in(t, "cloud", "a", 9, amd64)
		f.in(t, "cloud", "c", 9, arm64)
		own := f.in(t, "office", "b", 1, amd64)
		ctx := as(t.Context(), "acme", "office")
		b, end := f.begin(ctx, t, request("b", amd64, ""))
		must(b.Solve(ctx, frontend(amd64)))(t)
		if own.Used() != 1 {
			t.Error("it runs elsewhere")
		}
		end(nil)
		own.pinned(map[string][]string{arm64: {"arm64"}}) // as a guest, of which something executes
		b, _ = f.begin(ctx, t, request("b2", arm64, ""))
		_, err := b.Solve(ctx, frontend(arm64))
		var none *build.NoWorkerError
		if !errors.As(err, &none) || strings.Contains(err.Error(), "cloud") || none.Others != "" || none.Fleet != "linux/amd64 (1)" {
			t.Errorf("got %v", err)
		}
		other, _ := f.begin(t.Context(), t, pooled(request("b3", amd64, ""), "nowhere"))
		if _, err := other.Solve(t.Context(), frontend(amd64)); !errors.As(err, &none) || !strings.Contains(err.Error(), "in pool nowhere") || none.Others == "" {
			t.Errorf("of a pool without workers: %v", err)
		}
	})
}

func TestPools_TheyCannotBeChangedOnceSomethingRuns(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.in(t, "cloud", "a", 1, amd64)
		b, _ := f.begin(t.Context(), t, request("b", amd64, ""))
		must(b.Solve(t.Context(), frontend(amd64)))(t)
		for pools, want := range map[string]codes.Code{"cloud,office": codes.OK, "office": codes.FailedPrecondition} {
			call := frontend(amd64)
			call.FrontendOpt[poolArg] = pools
			if _, err := b.Solve(t.Context(), call); status.Code(err) != want {
				t.Errorf("%s: %v", pools, err)
			}
		}
	})
}

func TestPools_ALegMovesWithinThemOnly(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		arm := f.in(t, "office", "arm", 1, arm64)
		f.in(t, "cloud", "a", 1, amd64)
		arm.pinned(map[string][]string{arm64: {"amd64"}})
		b, end := f.begin(t.Context(), t, pooled(request("b", arm64, ""), "office"))
		_, err := b.Solve(t.Context(), frontend(arm64))
		if none := (*build.NoWorkerError)(nil); !errors.As(err, &none) || none.Platform != amd64 || none.Step == "" || none.Others != "linux/amd64 (1)" {
			t.Errorf("got %v", err)
		}
		end(err)
		own := f.in(t, "office", "b", 1, amd64)
		own.pinned(map[string][]string{arm64: {"amd64"}})
		b, _ = f.begin(t.Context(), t, pooled(request("b2", arm64, ""), "office"))
		must(b.Solve(t.Context(), frontend(arm64)))(t)
		if own.Used() != 1 {
			t.Error("it did not move to its pool's")
		}
	})
}

func TestPools_ABuildsSlotIsNotLentToOneOfOtherPools(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.in(t, "cloud", "a", 1, amd64)
		f.in(t, "office", "b", 1, amd64).Occupy(1)
		bake := connection(t.Context(), t)
		_, first, _ := f.solving(bake, t, "first")
		if err := first.ended(t); err != nil {
			t.Fatal(err)
		}
		second, end := f.begin(bake, t, pooled(request("second", amd64, ""), "office"))
		solve := aside(func() error { _, err := second.Solve(bake, frontend(amd64)); return err })
		solve.waits(t)
		end(nil)
		if err := solve.ended(t); err == nil {
			t.Error("it ran")
		}
	})
}

func TestPools_ALinkedBuildDoesNotFollowItsInputElsewhere(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		cloud, office := f.in(t, "cloud", "a", 2, amd64), f.in(t, "office", "b", 2, amd64)
		made := runs("amd64")
		made.Def = append(made.Def, lastOp(t, made))
		cloud.Frontend = func(context.Context, *gwpb.SolveRequest) (*gwpb.Result, error) { return cloud.reference(made), nil }
		bake := connection(t.Context(), t)
		for _, tt := range []struct {
			pool string
			want *daemon
		}{{"cloud", cloud}, {"cloud", cloud}, {"office", office}} {
			call := frontend(amd64)
			call.FrontendInputs = map[string]*pb.Definition{"base": made}
			b, _ := f.begin(bake, t, pooled(request("on "+tt.pool+string(rune('0'+cloud.Used())), amd64, ""), tt.pool))
			used := tt.want.Used()
			must(b.Solve(bake, call))(t)
			if tt.want.Used() != used+1 {
				t.Errorf("a build of pool %s runs elsewhere", tt.pool)
			}
		}
	})
}

// lastOp ends a definition, as LLB does: with an op that names its result.
func lastOp(t *testing.T, def *pb.Definition) []byte {
	t.Helper()
	raw, err := (&pb.Op{Inputs: []*pb.Input{{Digest: "sha256:" + strings.Repeat("1", 64)}}}).MarshalVT()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestBuilds_OfAnotherTenantAreNotThere(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "amd", 1, amd64)
		ctx := as(t.Context(), "acme")
		b, err := f.builds.Begin(ctx, request("b", amd64, ""))
		if err != nil {
			t.Fatal(err)
		}
		defer f.builds.End(b, nil)
		for _, tt := range []struct {
			who  context.Context
			want codes.Code
		}{{as(t.Context(), "acme"), codes.OK}, {as(t.Context(), "other"), codes.NotFound}, {t.Context(), codes.OK}} {
			if _, err := f.builds.Find(tt.who, "b", 0); status.Code(err) != tt.want {
				t.Errorf("found by %s: %v", identity.FromContext(tt.who), err)
			}
			if _, err := f.builds.Explain(tt.who, "b"); status.Code(err) != tt.want {
				t.Errorf("explained to %s: %v", identity.FromContext(tt.who), err)
			}
		}
	})
}

func TestBuilds_ExplainSaysWhereEachLegStands(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.worker(t, "amd", 1, amd64)
		arm := f.worker(t, "arm", 1, arm64)
		arm.Occupy(1)
		synctest.Wait()
		b, err := f.builds.Begin(as(t.Context(), "acme"), request("b", both, ""))
		if err != nil {
			t.Fatal(err)
		}
		if legs, err := f.builds.Explain(t.Context(), "b"); err != nil || len(legs) != 0 {
			t.Errorf("before its frontend has asked: %v, %v", legs, err)
		}
		solve := aside(func() error { _, err := b.Solve(t.Context(), frontend(both)); return err })
		solve.waits(t)
		legs := must(f.builds.Explain(t.Context(), "b"))(t)
		if len(legs) != 2 || legs[0].Worker != "amd" || legs[0].Summary != "running on amd for 5 s" || legs[0].Platform != amd64 ||
			legs[1].Worker != "" || legs[1].Summary != "waiting 5 s: 1 is full" || len(legs[1].Workers) != 2 {
			t.Errorf("%+v", legs)
		}
		if q := f.Scheduler.Queue(); len(q) != 1 || q[0].Build != "b" || q[0].Tenant != "acme" || q[0].Platform != arm64 {
			t.Errorf("the queue: %+v", q)
		}
		arm.Occupy(0)
		if err := solve.ended(t); err != nil {
			t.Fatal(err)
		}
		if legs = must(f.builds.Explain(t.Context(), "b"))(t); legs[1].Worker != "arm" {
			t.Errorf("%+v", legs)
		}
		f.builds.End(b, nil)
		synctest.Wait()
		if _, err := f.builds.Explain(t.Context(), "b"); status.Code(err) != codes.NotFound {
			t.Errorf("after its end: %v", err)
		}
	})
}
