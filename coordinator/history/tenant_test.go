package history

import (
	"context"
	"errors"
	"slices"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"

	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/identity"
)

func TestHistory_EachTenantSeesItsOwnBuilds(t *testing.T) {
	bubble(t, func(t *testing.T) {
		dir := t.TempDir()
		as := func(who identity.Identity) context.Context { return identity.NewContext(t.Context(), who) }
		acme := as(identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "acme"})
		other := as(identity.Identity{Kind: identity.Client, Name: "ci", Tenant: "other"})
		admin := as(identity.Identity{Kind: identity.Admin, Name: "root", Tenant: "default"})
		refs := func(h *History, ctx context.Context, req *controlapi.BuildHistoryRequest) []string {
			var out []string
			req.EarlyExit = true
			if err := h.Listen(ctx, req, func(e *controlapi.BuildHistoryEvent) error {
				out = append(out, e.GetRecord().GetRef())
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			slices.Sort(out)
			return out
		}
		check := func(h *History, when string) {
			t.Helper()
			for ctx, want := range map[context.Context][]string{acme: {"of-acme"}, other: {"of-other"}, admin: {"local", "of-acme", "of-other"}, t.Context(): {"local", "of-acme", "of-other"}} {
				if got := refs(h, ctx, &controlapi.BuildHistoryRequest{}); !slices.Equal(got, want) {
					t.Errorf("%s, %s sees %q, want %q", when, identity.FromContext(ctx), got, want)
				}
			}
			if got := refs(h, other, &controlapi.BuildHistoryRequest{Ref: "of-acme"}); got != nil {
				t.Errorf("%s, another tenant's build is shown by its reference: %q", when, got)
			}
		}

		h, end := open(t, Options{Dir: dir})
		ends := []func(){}
		for ref, ctx := range map[string]context.Context{"of-acme": acme, "of-other": other, "local": t.Context()} {
			stream := progress.NewStream(0)
			r := h.Begin(ctx, &controlapi.SolveRequest{Ref: ref}, nil, stream)
			ends = append(ends, func() { r.Complete(nil, nil); stream.Close() })
		}
		check(h, "while they run")
		heard := make(chan string, 10)
		listening, stop := context.WithCancel(acme)
		left := make(chan error, 1)
		go func() {
			left <- h.Listen(listening, &controlapi.BuildHistoryRequest{}, func(e *controlapi.BuildHistoryEvent) error { heard <- e.GetRecord().GetRef(); return nil })
		}()
		for _, end := range ends {
			end()
		}
		pass(patience)
		check(h, "when they have ended")
		stop()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("listening ended with %v", err)
		}
		close(heard)
		for ref := range heard {
			if ref != "of-acme" {
				t.Errorf("who listens hears of %s", ref)
			}
		}

		for name, req := range map[string]*controlapi.UpdateBuildHistoryRequest{
			"pinned": {Ref: "of-acme", Pinned: true}, "deleted": {Ref: "of-acme", Delete: true}, "finalized": {Ref: "of-acme", Finalize: true},
		} {
			if err := h.Update(other, req); err == nil {
				t.Errorf("another tenant's build was %s", name)
			}
		}
		if known, err := h.Status(other, "of-acme", nil); known || err != nil {
			t.Errorf("another tenant's progress is known: %v, %v", known, err)
		}
		end()
		h, _ = open(t, Options{Dir: dir})
		check(h, "after a restart")
		if err := h.Update(acme, &controlapi.UpdateBuildHistoryRequest{Ref: "of-acme", Delete: true}); err != nil {
			t.Error(err)
		}
		if got := refs(h, admin, &controlapi.BuildHistoryRequest{}); !slices.Equal(got, []string{"local", "of-other"}) {
			t.Errorf("after a record's end there are %q", got)
		}
	})
}
