package storetest

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

const repository = "registry.example/app"

// publication is one of tags of the repository.
func publication(id string, tags ...string) store.Publication {
	p := store.Publication{
		ID: id, Tenant: "acme", Job: "job of " + id, Digest: "sha256:" + id, MediaType: "application/vnd.oci.image.index.v1+json",
		Blob: []byte("{" + id + "}"), Insecure: true, Created: created,
		Source: store.Source{URL: "https://git.example/app", Commit: "c" + id, Branch: "main", Tag: "v1", CommitTime: created.Add(-time.Hour)},
	}
	for _, tag := range tags {
		p.Bindings = append(p.Bindings, store.Binding{Repository: repository, Tag: tag, Immutable: tag != "latest"})
	}
	return p
}

func bind(t testing.TB, s store.Store, p store.Publication, owner string, lease time.Duration) (store.Publication, store.Lease) {
	t.Helper()
	got, l, err := s.Bind(t.Context(), p, owner, lease, nil)
	ok(t, err)
	return got, l
}

// settle ends all bindings of a publication.
func settle(t testing.TB, s store.Store, p store.Publication, l store.Lease, state store.BindingState) {
	t.Helper()
	states := map[int64]store.BindingState{}
	for _, b := range p.Bindings {
		states[b.ID] = state
	}
	ok(t, s.Settle(t.Context(), l, states))
}

func testBind(t *testing.T, s store.Store) {
	ctx := t.Context()
	p := publication("p", "v1", "latest")
	got, l := bind(t, s, p, "one", long)
	if l.Job != "p" || l.Owner != "one" || l.For != long || l.Epoch < 1 || l.Asked.IsZero() {
		t.Errorf("the lease is %+v", l)
	}
	if len(got.Bindings) != 2 || got.Bindings[0].ID == 0 || got.Bindings[1].ID <= got.Bindings[0].ID {
		t.Fatalf("the bindings are %+v", got.Bindings)
	}
	for i, b := range got.Bindings {
		if time.Since(b.Bound).Abs() > time.Minute {
			t.Errorf("bound at %v", b.Bound)
		}
		same(t, "binding", b, store.Binding{
			ID: b.ID, Publication: "p", Repository: repository, Tag: p.Bindings[i].Tag, Digest: "sha256:p", Immutable: i == 0,
			State: store.Pending, Bound: b.Bound, Job: "job of p", Tenant: "acme", Source: p.Source,
		})
	}
	want := p
	want.Bindings = got.Bindings
	same(t, "bound", got, want)
	of, err := s.PublicationOf(ctx, "job of p")
	ok(t, err)
	same(t, "the job's", of, want)
	_, err = s.PublicationOf(ctx, "")
	is(t, err, store.ErrNotFound)
	_, err = s.Current(ctx, repository, "v1") // nothing has been published
	is(t, err, store.ErrNotFound)

	// Somebody else's is busy, also after its lease.
	short := l
	short.For = over
	_, err = s.RenewPublication(ctx, short)
	ok(t, err)
	_, _, err = s.Bind(ctx, publication("q", "other", "v1"), "two", long, nil)
	is(t, err, store.ErrBusy)
	var busy *store.BusyError
	if !errors.As(err, &busy) {
		t.Fatal(err)
	}
	same(t, "the holder", busy.Holder, got.Bindings[0])
	_, err = s.PublicationOf(ctx, "job of q") // all or nothing
	is(t, err, store.ErrNotFound)
	bind(t, s, publication("r", "other"), "two", long)

	for _, bad := range []store.Publication{{}, publication("x", ""), publication("x", "a", "a"), {ID: "x", Bindings: p.Bindings}} {
		if _, _, err := s.Bind(ctx, bad, "one", long, nil); err == nil {
			t.Errorf("%+v was bound", bad)
		}
	}
}

func testDecide(t *testing.T, s store.Store) {
	ctx := t.Context()
	var seen []string
	decide := func(b store.Binding, current *store.Binding) error {
		was := "nothing"
		if current != nil {
			was = current.Digest
		}
		seen = append(seen, fmt.Sprintf("%s from %s to %s of %s", b.Tag, was, b.Digest, b.Source.Commit))
		return nil
	}
	one := publication("one", "v1")
	one.Job, one.Build = "", "build"
	got, l, err := s.Bind(ctx, one, "me", long, decide)
	ok(t, err)
	settle(t, s, got, l, store.Published)
	got, l = bind(t, s, publication("undone", "v1"), "me", long)
	settle(t, s, got, l, store.Undone)
	seen = nil
	_, l, err = s.Bind(ctx, publication("two", "v1", "v2"), "me", long, decide)
	ok(t, err)
	same(t, "seen", seen, []string{"v1 from sha256:one to sha256:two of ctwo", "v2 from nothing to sha256:two of ctwo"})
	current, err := s.Current(ctx, repository, "v1")
	ok(t, err)
	same(t, "current", current.Digest+current.Build, "sha256:onebuild")

	refusal := errors.New("another digest is behind it")
	_, _, err = s.Bind(ctx, publication("three", "v3", "v4"), "me", long, func(b store.Binding, _ *store.Binding) error {
		if b.Tag == "v4" {
			return refusal
		}
		return nil
	})
	if err != refusal { //nolint:errorlint // it is to be the same
		t.Errorf("the refusal came as %v", err)
	}
	all, err := s.Bindings(ctx, nil, repository, "v3", 0, 10)
	ok(t, err)
	same(t, "bindings of what was refused", all, nil)
	_, err = s.RenewPublication(ctx, l)
	ok(t, err)
}

func testBindRace(t *testing.T, s store.Store) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	won := 0
	for i := range 16 { // overlapping tags, in either order
		wg.Go(func() {
			p := publication(fmt.Sprint("p", i), "a", "b", "c")
			if i%2 == 0 {
				p.Bindings[0], p.Bindings[2] = p.Bindings[2], p.Bindings[0]
			}
			got, l, err := s.Bind(t.Context(), p, "me", long, func(_ store.Binding, current *store.Binding) error {
				if current != nil {
					return store.ErrConflict // the tags are immutable
				}
				return nil
			})
			if err == nil {
				mu.Lock()
				won++
				mu.Unlock()
				settle(t, s, got, l, store.Published)
			} else if !errors.Is(err, store.ErrBusy) && !errors.Is(err, store.ErrConflict) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	same(t, "won", won, 1)
	for _, tag := range []string{"a", "b", "c"} {
		all, err := s.Bindings(t.Context(), nil, repository, tag, 0, 10)
		ok(t, err)
		same(t, "bindings", len(all), 1)
	}
}

func testBindAgain(t *testing.T, s store.Store) {
	ctx := t.Context()
	first, l := bind(t, s, publication("p", "v1", "v2"), "one", long)
	_, _, err := s.Bind(ctx, publication("p", "v1"), "two", long, nil)
	is(t, err, store.ErrLeaseLost)
	ok(t, s.Settle(ctx, l, map[int64]store.BindingState{first.Bindings[0].ID: store.Published}))

	// The same owner's: as it is, whatever it is said to be now.
	again, l2, err := s.Bind(ctx, publication("p", "v7"), "one", over, func(store.Binding, *store.Binding) error { return errors.New("not asked") })
	ok(t, err)
	same(t, "states", [2]store.BindingState{again.Bindings[0].State, again.Bindings[1].State}, [2]store.BindingState{store.Published, store.Pending})
	same(t, "blob", again.Blob, first.Blob)
	_, err = s.RenewPublication(ctx, l)
	is(t, err, store.ErrLeaseLost)
	is(t, s.Settle(ctx, l, nil), store.ErrLeaseLost)
	is(t, s.Settle(ctx, l2, nil), store.ErrLeaseLost) // it has ended

	// After the lease anybody's.
	_, l3 := bind(t, s, publication("p"), "two", long)
	settle(t, s, again, l3, store.Undone)
	current, err := s.Current(ctx, repository, "v1")
	ok(t, err)
	same(t, "current", current.ID, first.Bindings[0].ID)
	_, err = s.Current(ctx, repository, "v2")
	is(t, err, store.ErrNotFound)

	settled, _ := bind(t, s, publication("p"), "one", long)
	same(t, "blob of what is settled", settled.Blob, nil)
}

func testSettle(t *testing.T, s store.Store) {
	ctx := t.Context()
	p, l := bind(t, s, publication("p", "v1", "v2"), "one", long)
	other, _ := bind(t, s, publication("q", "v3"), "one", long)
	first, second := p.Bindings[0].ID, p.Bindings[1].ID
	for _, bad := range []store.BindingState{store.Pending, "", "gone"} {
		if s.Settle(ctx, l, map[int64]store.BindingState{first: bad}) == nil {
			t.Errorf("a binding became %q", bad)
		}
	}
	ok(t, s.Settle(ctx, l, map[int64]store.BindingState{first: store.Published, other.Bindings[0].ID: store.Published}))
	ok(t, s.Settle(ctx, l, map[int64]store.BindingState{first: store.Undone})) // it is published, and stays so
	now, err := s.PublicationOf(ctx, "job of p")
	ok(t, err)
	if now.Bindings[0].State != store.Published || now.Bindings[0].Ended.IsZero() || now.Bindings[1].State != store.Pending || now.Blob == nil {
		t.Errorf("half of it is settled: %+v", now)
	}
	untouched, err := s.PublicationOf(ctx, "job of q")
	ok(t, err)
	same(t, "the other publication", untouched, other)
	ok(t, s.Settle(ctx, l, map[int64]store.BindingState{second: store.Undone}))
	now, err = s.PublicationOf(ctx, "job of p")
	ok(t, err)
	if now.Bindings[1].State != store.Undone || now.Blob != nil {
		t.Errorf("it is settled: %+v", now)
	}
	is(t, s.Settle(ctx, l, nil), store.ErrLeaseLost)
	_, err = s.RenewPublication(ctx, l)
	is(t, err, store.ErrLeaseLost)
	_, _, err = s.Takeover(ctx, "p", "two", long)
	is(t, err, store.ErrNotFound)
	is(t, s.Settle(ctx, store.Lease{Job: "none"}, nil), store.ErrLeaseLost)
}

func testAbandoned(t *testing.T, s store.Store) {
	ctx := t.Context()
	_, _, err := s.Abandoned(ctx, "two", long, true)
	is(t, err, store.ErrNotFound)
	_, _, err = s.Takeover(ctx, "none", "two", long)
	is(t, err, store.ErrNotFound)

	build := publication("build", "b")
	build.Job, build.Build = "", "ref"
	bind(t, s, build, "one", over)
	first, old := bind(t, s, publication("first", "v1"), "one", over)
	bind(t, s, publication("second", "v2"), "one", over)
	_, held := bind(t, s, publication("held", "v3"), "one", long)
	_, _, err = s.Takeover(ctx, "held", "two", long)
	is(t, err, store.ErrLeaseLost)
	_, err = s.RenewPublication(ctx, held)
	ok(t, err)

	got, l, err := s.Abandoned(ctx, "two", long, true)
	ok(t, err)
	same(t, "the oldest", got, first)
	if l.Epoch <= old.Epoch || l.Owner != "two" || l.Job != "first" {
		t.Errorf("the lease is %+v", l)
	}
	is(t, s.Settle(ctx, old, nil), store.ErrLeaseLost)
	settle(t, s, got, l, store.Published)
	got, l, err = s.Takeover(ctx, "second", "two", long)
	ok(t, err)
	settle(t, s, got, l, store.Published)
	_, _, err = s.Abandoned(ctx, "two", long, true)
	is(t, err, store.ErrNotFound)
	got, _, err = s.Abandoned(ctx, "two", long, false)
	ok(t, err)
	same(t, "the build's", got.ID, "build")
	_, _, err = s.Abandoned(ctx, "two", long, false)
	is(t, err, store.ErrNotFound)
}

func testBindings(t *testing.T, s store.Store) {
	ctx := t.Context()
	for i := range 9 {
		p := publication(fmt.Sprint("p", i), "latest", fmt.Sprint("v", i))
		p.Tenant = []string{"acme", "other"}[i%2]
		got, l := bind(t, s, p, "one", long)
		settle(t, s, got, l, []store.BindingState{store.Published, store.Undone, store.Published}[i%3])
	}
	read := func(tenants []string, tag string) (digests []string) {
		t.Helper()
		var before int64
		for {
			page, err := s.Bindings(ctx, tenants, repository, tag, before, 2)
			ok(t, err)
			for _, b := range page {
				if before != 0 && b.ID >= before || b.Repository != repository {
					t.Errorf("binding %d came after %d", b.ID, before)
				}
				before = b.ID
				digests = append(digests, b.Digest)
			}
			if len(page) < 2 {
				return digests
			}
		}
	}
	same(t, "of latest", read(nil, "latest"), []string{
		"sha256:p8", "sha256:p7", "sha256:p6", "sha256:p5", "sha256:p4", "sha256:p3", "sha256:p2", "sha256:p1", "sha256:p0"})
	same(t, "of one", read([]string{"other"}, "v3"), []string{"sha256:p3"})
	same(t, "of another's", read([]string{"acme"}, "v3"), nil)
	same(t, "of nobody's", read([]string{}, "v3"), nil)
	same(t, "of all", len(read(nil, "")), 18)
	same(t, "of all of two", len(read([]string{"other", "acme"}, "")), 18)
	current, err := s.Current(ctx, repository, "latest")
	ok(t, err)
	same(t, "current", current.Digest, "sha256:p8")
}
