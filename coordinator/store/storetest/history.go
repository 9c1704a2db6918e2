package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/store"
)

// content is a blob of the history.
func content(data []byte) store.BuildBlob {
	return store.BuildBlob{Digest: digest.FromBytes(data).String(), Size: int64(len(data))}
}

func putBlob(ctx context.Context, t fatal, s store.Store, holder string, data []byte) string {
	t.Helper()
	b := content(data)
	if err := s.PutBuildBlob(ctx, holder, b, bytes.NewReader(data)); err != nil {
		t.Fatal(err)
	}
	return b.Digest
}

func build(ref string, blobs ...string) store.Build {
	return store.Build{
		Ref: ref, Tenant: "acme", Record: []byte("record of " + ref), Extent: []byte{0, 0xff, '\''}, Completed: created, Size: 7, Blobs: blobs,
	}
}

// shown is a build as it is returned.
func shown(b store.Build) store.Build {
	b.Blobs, b.Places = nil, nil
	return b
}

func testBuilds(t *testing.T, s store.Store) {
	ctx := t.Context()
	_, err := s.Build(ctx, "a")
	is(t, err, store.ErrNotFound)
	_, err = s.RemoveBuild(ctx, "a")
	is(t, err, store.ErrNotFound)
	is(t, s.ChangeBuild(ctx, "a", func(*store.Build) error { t.Error("there is nothing to change"); return nil }), store.ErrNotFound)
	b := build("b")
	for _, put := range []store.Build{build("c"), b, build("B"), build("ä"), b} {
		ok(t, s.PutBuild(ctx, put))
	}
	got, err := s.Build(ctx, "b")
	ok(t, err)
	same(t, "the record", got, shown(b))
	ok(t, s.ChangeBuild(ctx, "b", func(c *store.Build) error {
		same(t, "what is changed", *c, shown(b))
		c.Record, c.Pinned, c.Size = []byte("another"), true, 9
		return nil
	}))
	b.Record, b.Pinned, b.Size = []byte("another"), true, 9
	failed := errors.New("not after all")
	is(t, s.ChangeBuild(ctx, "b", func(c *store.Build) error { c.Size = 1; return failed }), failed)
	first, err := s.Builds(ctx, "", 2)
	ok(t, err)
	same(t, "the first two", first, []store.Build{shown(build("B")), shown(b)})
	rest, err := s.Builds(ctx, "b", 10)
	ok(t, err)
	same(t, "the others", rest, []store.Build{shown(build("c")), shown(build("ä"))})
	sizes, err := s.BuildSizes(ctx)
	ok(t, err)
	same(t, "sizes", len(sizes), 4)
	b.Record, b.Extent = nil, nil
	if !slices.ContainsFunc(sizes, func(size store.Build) bool {
		return size.Ref == "b" && size.Pinned && size.Size == 9 && size.Completed.Equal(created) && size.Record == nil
	}) {
		t.Errorf("b is not among %+v", sizes)
	}
	removed, err := s.RemoveBuild(ctx, "c")
	ok(t, err)
	same(t, "what was removed", removed, shown(build("c")))
	_, err = s.Build(ctx, "c")
	is(t, err, store.ErrNotFound)
}

func testBuildPlaces(t *testing.T, s store.Store) {
	ctx := t.Context()
	layer := digest.FromString("layer").String()
	where := func() []string {
		workers, err := s.BuildPlaces(ctx, layer)
		ok(t, err)
		slices.Sort(workers)
		return workers
	}
	for ref, workers := range map[string][]string{"a": {"one", "two"}, "b": {"one"}, "c": {"three"}} {
		b := build(ref)
		for _, w := range workers {
			b.Places = append(b.Places, store.Place{Digest: layer, Worker: w}, store.Place{Digest: layer, Worker: w})
		}
		ok(t, s.PutBuild(ctx, b))
	}
	same(t, "who has it", where(), []string{"one", "three", "two"})
	ok(t, s.ChangeBuild(ctx, "a", func(b *store.Build) error { b.Pinned = true; return nil }))
	same(t, "after a change of something else", where(), []string{"one", "three", "two"})
	ok(t, s.ChangeBuild(ctx, "c", func(b *store.Build) error { b.Places = []store.Place{{Digest: layer, Worker: "four"}}; return nil }))
	same(t, "after a change", where(), []string{"four", "one", "two"})
	ok(t, s.PutBuild(ctx, build("a")))
	same(t, "after a is replaced", where(), []string{"four", "one"})
	_, err := s.RemoveBuild(ctx, "b")
	ok(t, err)
	same(t, "after b is gone", where(), []string{"four"})
}

func testBuildBlobs(t *testing.T, s store.Store) {
	ctx := t.Context()
	var all []store.BuildBlob
	for _, size := range []int{0, 5, store.BuildChunk, store.BuildChunk + 1, 3 * store.BuildChunk} {
		data := bytes.Repeat([]byte("12345"), size/5+1)[:size]
		b := content(data)
		_, err := s.BuildBlob(ctx, b.Digest)
		is(t, err, store.ErrNotFound)
		_, err = s.HoldBuildBlob(ctx, "me", b.Digest)
		is(t, err, store.ErrNotFound)
		for range 2 {
			putBlob(ctx, t, s, "me", data)
		}
		got, err := s.BuildBlob(ctx, b.Digest)
		ok(t, err)
		same(t, "the blob", got, b)
		var whole []byte
		for n := int64(0); len(whole) < size; n++ {
			part, err := s.BuildBlobData(ctx, b.Digest, n)
			ok(t, err)
			whole = append(whole, part...)
		}
		if !bytes.Equal(whole, data) {
			t.Errorf("%d bytes came back as others", size)
		}
		_, err = s.BuildBlobData(ctx, b.Digest, 3)
		is(t, err, store.ErrNotFound)
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b store.BuildBlob) int { return bytes.Compare([]byte(a.Digest), []byte(b.Digest)) })
	listed, err := s.BuildBlobs(ctx, all[0].Digest, 3)
	ok(t, err)
	same(t, "listed", listed, all[1:4])
	for _, bad := range []store.BuildBlob{{Digest: "sha256:x"}, {Digest: all[0].Digest, Size: -1}, {Digest: content([]byte("short")).Digest, Size: 6}} {
		if err := s.PutBuildBlob(ctx, "me", bad, bytes.NewReader([]byte("short"))); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
	is(t, s.PutBuild(ctx, build("a", all[0].Digest, content([]byte("never put")).Digest)), store.ErrNotFound)
	_, err = s.Build(ctx, "a")
	is(t, err, store.ErrNotFound)
}

// buildsModel is what should be there, given who names and who holds it.
type buildsModel struct {
	store.Store
	texts []string
	named map[string][]string        // by reference
	held  map[string]map[string]bool // by holder
}

func (m *buildsModel) digest(text string) string { return content([]byte(text)).Digest }

func (m *buildsModel) there(text string) bool {
	return m.held["me"][text] || m.held["you"][text] ||
		slices.ContainsFunc(slices.Collect(maps.Values(m.named)), func(all []string) bool { return slices.Contains(all, text) })
}

func testBuildsModel(t *testing.T, s store.Store) {
	ctx := t.Context()
	rapid.Check(t, func(r *rapid.T) {
		m := &buildsModel{
			Store: s, texts: []string{"one", "two", strings.Repeat("large", store.BuildChunk/4)},
			named: map[string][]string{}, held: map[string]map[string]bool{"me": {}, "you": {}},
		}
		for range rapid.IntRange(1, 12).Draw(r, "steps") {
			if err := m.step(ctx, r); err != nil {
				r.Fatal(err)
			}
			for _, text := range m.texts {
				if _, err := s.BuildBlob(ctx, m.digest(text)); (err == nil) != m.there(text) {
					r.Fatalf("%.5s is there: %v, should be: %v", text, err, m.there(text))
				}
			}
		}
		for _, ref := range []string{"a", "b"} {
			_, _ = s.RemoveBuild(ctx, ref)
		}
		if err := errors.Join(s.ReleaseBuildBlobs(ctx, "me"), s.ReleaseBuildBlobs(ctx, "you")); err != nil {
			r.Fatal(err)
		}
	})
}

func (m *buildsModel) step(ctx context.Context, r *rapid.T) error {
	ref, holder := rapid.SampledFrom([]string{"a", "b"}).Draw(r, "ref"), rapid.SampledFrom([]string{"me", "you"}).Draw(r, "holder")
	text := rapid.SampledFrom(m.texts).Draw(r, "text")
	switch rapid.SampledFrom([]string{"blob", "blob", "hold", "put", "put", "change", "remove", "release", "sweep"}).Draw(r, "step") {
	case "blob":
		putBlob(ctx, r, m, holder, []byte(text))
		m.held[holder][text] = true
	case "hold":
		_, err := m.HoldBuildBlob(ctx, holder, m.digest(text))
		if !m.there(text) {
			return expected(err)
		}
		m.held[holder][text] = true
		return err
	case "put":
		return m.put(ctx, r, ref)
	case "change":
		err := m.ChangeBuild(ctx, ref, func(b *store.Build) error { b.Blobs = []string{m.digest(text)}; return nil })
		if m.named[ref] == nil || !m.there(text) {
			return expected(err)
		}
		m.named[ref] = []string{text}
		return err
	case "remove":
		_, err := m.RemoveBuild(ctx, ref)
		if m.named[ref] == nil {
			return expected(err)
		}
		delete(m.named, ref)
		return err
	case "release":
		clear(m.held[holder])
		return m.ReleaseBuildBlobs(ctx, holder)
	case "sweep":
		return m.SweepBuildBlobs(ctx)
	}
	return nil
}

func (m *buildsModel) put(ctx context.Context, r *rapid.T, ref string) error {
	all, missing := []string{}, false
	b := build(ref)
	for _, text := range m.texts {
		if rapid.Bool().Draw(r, "names it") {
			all, b.Blobs = append(all, text), append(b.Blobs, m.digest(text))
			missing = missing || !m.there(text)
		}
	}
	err := m.PutBuild(ctx, b)
	if missing {
		return expected(err)
	}
	m.named[ref] = all
	return err
}

// expected is that something was not there.
func expected(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return fmt.Errorf("the error is %w, not: %w", err, store.ErrNotFound)
}

// testBuildsRace lets several write, name and remove the same: what is named at the
// end is there, whole, and nothing else.
func testBuildsRace(t *testing.T, s store.Store) {
	ctx := t.Context()
	large := bytes.Repeat([]byte("large"), store.BuildChunk/4)
	var writing sync.WaitGroup
	for i := range 6 {
		writing.Go(func() {
			for round := range 4 {
				holder, ref := fmt.Sprintf("holder %d.%d", i, round), fmt.Sprintf("build %d", i%3)
				names := []string{putBlob(ctx, t, s, holder, []byte("shared")), putBlob(ctx, t, s, holder, large), putBlob(ctx, t, s, holder, []byte(holder))}
				if err := s.PutBuild(ctx, build(ref, names...)); err != nil {
					t.Error(err)
				}
				if i%3 == 2 {
					if _, err := s.RemoveBuild(ctx, ref); err != nil && !errors.Is(err, store.ErrNotFound) {
						t.Error(err)
					}
				}
				if err := errors.Join(s.ReleaseBuildBlobs(ctx, holder), s.SweepBuildBlobs(ctx)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writing.Wait()
	left, err := s.BuildBlobs(ctx, "", 100)
	ok(t, err)
	same(t, "blobs left", len(left), 4) // shared, large, and one of each of two builds
	part, err := s.BuildBlobData(ctx, content(large).Digest, 1)
	ok(t, err)
	same(t, "the second chunk has", len(part), len(large)-store.BuildChunk)
	for i := range 2 {
		_, err := s.RemoveBuild(ctx, fmt.Sprintf("build %d", i))
		ok(t, err)
	}
	left, err = s.BuildBlobs(ctx, "", 100)
	ok(t, err)
	same(t, "blobs at the end", len(left), 0)
}

// FillBuilds makes something of everything that the second schema has added.
func FillBuilds(t testing.TB, s store.Store) {
	t.Helper()
	b := build("build", putBlob(t.Context(), t, s, "holder", []byte("it's\x00 a log")))
	b.Pinned, b.Places = true, []store.Place{{Digest: digest.FromString("layer").String(), Worker: "w"}}
	ok(t, s.PutBuild(t.Context(), b))
	putBlob(t.Context(), t, s, "holder", []byte("held"))
}

// CheckFilledBuilds compares what FillBuilds made with what it was, and goes on with it.
func CheckFilledBuilds(t testing.TB, s store.Store) {
	t.Helper()
	ctx := t.Context()
	want := shown(build("build"))
	want.Pinned = true
	got, err := s.RemoveBuild(ctx, "build")
	ok(t, err)
	same(t, "the record", got, want)
	_, err = s.BuildBlob(ctx, content([]byte("held")).Digest)
	if err != nil {
		is(t, err, store.ErrNotFound) // that hold was another process's
	}
	ok(t, s.ReleaseBuildBlobs(ctx, "holder"))
	ok(t, s.SweepBuildBlobs(ctx))
	left, err := s.BuildBlobs(ctx, "", 10)
	ok(t, err)
	same(t, "blobs left", len(left), 0)
	FillBuilds(t, s)
}
