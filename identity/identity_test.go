package identity_test

import (
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/identity"
)

var names = rapid.StringMatching(`[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}`)

var identities = rapid.Custom(func(t *rapid.T) identity.Identity {
	i := identity.Identity{
		Kind: rapid.SampledFrom([]identity.Kind{identity.Coordinator, identity.Worker, identity.Client, identity.Admin}).Draw(t, "kind"),
		Name: names.Draw(t, "name"),
	}
	switch i.Kind {
	case identity.Worker:
		i.Pools = []string{names.Draw(t, "pool")}
	case identity.Client, identity.Admin:
		i.Tenant = names.Draw(t, "tenant")
		i.Pools = rapid.SliceOfN(names, 0, 3).Draw(t, "pools")
	}
	return i
})

func TestParse_ReadsWhatURIWrites(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := identities.Draw(t, "identity")
		u, err := url.Parse(want.URI().String()) // as certificates do
		if err != nil {
			t.Fatal(err)
		}
		got, err := identity.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		if len(want.Pools) == 0 {
			want.Pools = nil
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%s reads as %+v, want %+v", u, got, want)
		}
	})
}

func TestParse_RefusesOtherThanOneForm(t *testing.T) {
	t.Parallel()
	for _, uri := range []string{
		"https://archfarm/worker/a/pool/b", "spiffe://other/worker/a/pool/b", "spiffe://archfarm/worker/a", "spiffe://archfarm/worker/a/pool/b/pool/c",
		"spiffe://archfarm/worker/a/tenant/t/pool/b", "spiffe://archfarm/client/a", "spiffe://archfarm/client/a/pool/b/tenant/t",
		"spiffe://archfarm/client/a/tenant/t/tenant/u", "spiffe://archfarm/root/a", "spiffe://archfarm/worker/%61/pool/b", "spiffe://archfarm/worker/a%2Fpool%2Fx/pool/b",
		"spiffe://archfarm/worker/a/pool/b?x", "spiffe://u@archfarm/worker/a/pool/b", "spiffe://archfarm/worker/a/pool/b#f", "spiffe://archfarm//worker/a/pool/b",
		"spiffe://archfarm/worker/../pool/b", "spiffe://archfarm/anonymous/a", "spiffe://archfarm//a", "spiffe://archfarm/", "spiffe:archfarm", "",
	} {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := identity.Parse(u); err == nil {
			t.Errorf("%s reads as %+v", uri, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("spiffe://archfarm/worker/mac-2/pool/office")
	f.Add("spiffe://archfarm/client/ci/tenant/acme/pool/office/pool/cloud")
	f.Add("spiffe://archfarm/admin/alice/tenant/default")
	f.Add("spiffe://archfarm/coordinator/farm-1")
	f.Add("spiffe://archfarm/worker/a%2fb/pool/..")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := url.Parse(text)
		if err != nil {
			return
		}
		i, err := identity.Parse(u)
		if err != nil {
			return
		}
		if err := i.Validate(); err != nil {
			t.Errorf("%q: %v", text, err)
		}
		if got := i.URI().String(); got != u.String() {
			t.Errorf("%q is written as %q", text, got)
		}
	})
}

func TestIdentity_WhatEachMayDo(t *testing.T) {
	t.Parallel()
	type may struct{ administer, operate, build, see, use bool }
	for _, test := range []struct {
		who  identity.Identity
		want may
	}{
		{identity.Identity{}, may{false, true, true, true, true}},
		{identity.Identity{Socket: true}, may{true, true, true, true, true}},
		{identity.Identity{Kind: identity.Admin, Tenant: "t"}, may{true, true, true, true, true}},
		{identity.Identity{Kind: identity.Client, Tenant: "acme", Pools: []string{"office"}}, may{false, false, true, true, true}},
		{identity.Identity{Kind: identity.Client, Tenant: "t", Pools: []string{"cloud"}}, may{false, false, true, false, false}},
		{identity.Identity{Kind: identity.Worker, Pools: []string{"office"}, Socket: true}, may{false, false, false, false, true}},
		{identity.Identity{Kind: identity.Anonymous, Socket: true}, may{false, false, false, false, true}},
	} {
		got := may{test.who.Administers(), test.who.Operates(), test.who.Builds(), test.who.MaySee("acme"), test.who.MayUse("office")}
		if got != test.want {
			t.Errorf("%+v may %+v, want %+v", test.who, got, test.want)
		}
	}
}

var tokens = rapid.Custom(func(t *rapid.T) identity.Token {
	token := identity.Token{
		Kind:         rapid.SampledFrom([]identity.Kind{identity.Worker, identity.Client, identity.Admin}).Draw(t, "kind"),
		Coordinators: rapid.SliceOfN(rapid.SampledFrom([]string{"farm.example:8372", "[fe80::1%eth0]:1", "10.0.0.1:8372"}), 0, 4).Draw(t, "coordinators"),
	}
	for _, field := range [][]byte{token.ID[:], token.Secret[:], token.Fingerprint[:]} {
		copy(field, rapid.SliceOfN(rapid.Byte(), len(field), len(field)).Draw(t, "field"))
	}
	return token
})

func TestToken_ReadsWhatItWritesAndNoticesMistakes(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := tokens.Draw(t, "token")
		text := want.Text()
		got, err := identity.ParseToken("  " + text + "\n")
		if err != nil {
			t.Fatal(err)
		}
		if len(want.Coordinators) == 0 {
			want.Coordinators = nil
		}
		if !reflect.DeepEqual(got, want) {
			t.Fatalf("%#v, want %#v", got, want)
		}
		at := rapid.IntRange(0, len(text)-1).Draw(t, "at")
		other := rapid.SampledFrom(slices.DeleteFunc([]byte("aZ0-_=. "), func(b byte) bool { return b == text[at] })).Draw(t, "letter")
		wrong := text[:at] + string(other) + text[at+1:]
		if strings.TrimSpace(wrong) == text {
			return
		}
		_, err = identity.ParseToken(wrong)
		if err == nil {
			t.Fatalf("letter %d was not noticed", at)
		}
		if strings.Contains(err.Error(), text[10:30]) {
			t.Fatal("the error tells the token")
		}
	})
}

func FuzzParseToken(f *testing.F) {
	f.Add(identity.Token{Kind: identity.Worker, Coordinators: []string{"farm.example:8372"}}.Text())
	f.Add(identity.Token{Kind: identity.Admin}.Text())
	f.Add("archfarm1.")
	f.Add("archfarm2.AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := identity.ParseToken(text)
		if err == nil && token.Text() != strings.TrimSpace(text) {
			t.Errorf("%q is written as %q", text, token.Text())
		}
	})
}
