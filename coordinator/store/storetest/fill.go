package storetest

import (
	"io/fs"
	"slices"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// filled are the jobs of Fill, by the state that they are in.
var filled = []store.State{store.Queued, store.Running, store.Publishing, store.Succeeded, store.Failed, store.Cancelled}

// Fill makes something of everything, for the dump of a schema that later programs
// are to understand. It is as the first schema had it: what comes later is for
// another function.
func Fill(t testing.TB, s store.Store) {
	t.Helper()
	ctx := t.Context()
	for _, state := range filled {
		j := job("job-" + string(state))
		j.RequestID, j.Pools, j.Sealed, j.Context, j.Priority, j.Created = "request "+string(state), []string{"office"}, []byte{0, 1, 0xff}, "sha256:context", 3, created
		submit(t, s, j)
		if state == store.Queued {
			continue
		}
		claimed, err := s.Claim(ctx, "farm-1", long, 10)
		ok(t, err)
		for _, c := range claimed {
			if c.ID != j.ID {
				ok(t, s.Release(ctx, c.Lease))
				continue
			}
			_, err = s.Update(ctx, c.Lease, store.Update{
				State: state, Digest: "sha256:d", Error: "it's\na \"text\"; --", Events: []store.Event{{Time: created, Data: []byte{0, 0xff, '\''}}},
				Legs: []store.Leg{{
					Platform: "linux/amd64", State: store.Succeeded, Descriptor: []byte(`{"size":1}`), Worker: "w",
					Attempts: []store.Attempt{{Number: 1, Coordinator: "farm-1", Worker: "w", Began: created, Ended: created.Add(time.Minute)}},
				}},
			})
			ok(t, err)
		}
	}
	for _, state := range []store.BindingState{store.Published, store.Undone, store.Pending} {
		p, _ := bind(t, s, publication(string(state), "v1", "latest"), "farm-1", over)
		if state != store.Pending {
			_, l := bind(t, s, p, "farm-1", long)
			settle(t, s, p, l, state)
		}
	}
	ok(t, s.PutSecret(ctx, "acme", "npm", []byte{1, 0, 2}))
}

// CheckFilled compares what Fill made, after whatever migrations, with what it was,
// and goes on with it.
func CheckFilled(t testing.TB, s store.Store) {
	t.Helper()
	ctx := t.Context()
	for _, state := range filled {
		checkFilledJob(t, get(t, s, "job-"+string(state)), state)
		for _, q := range []store.Query{
			{States: []store.State{state}}, {Repository: "registry.example/app", States: []store.State{state}},
			{Tenants: []string{"acme"}, States: []store.State{state}},
		} {
			found, err := s.List(ctx, q)
			ok(t, err)
			same(t, "listed", ids(found), []string{"job-" + string(state)})
		}
		of, err := s.Events(ctx, "job-"+string(state), 0, 10)
		ok(t, err)
		if state != store.Queued {
			same(t, "its event", of[1], store.Event{Seq: 2, Time: created, Data: []byte{0, 0xff, '\''}})
		}
		again := job("again")
		again.RequestID, again.SpecDigest = "request "+string(state), "sha256:job-"+string(state)
		_, made, err := s.Submit(ctx, again, nil)
		ok(t, err)
		same(t, "made again", made, false)
	}
	for state, pending := range map[store.BindingState]bool{store.Published: false, store.Undone: false, store.Pending: true} {
		p, err := s.PublicationOf(ctx, "job of "+string(state))
		ok(t, err)
		want := publication(string(state))
		if want.Bindings = p.Bindings; !pending {
			want.Blob = nil
		}
		same(t, "publication", p, want)
		for _, b := range p.Bindings {
			same(t, "binding", []any{b.State, b.Repository, b.Source, b.Tenant, b.Ended.IsZero()}, []any{state, repository, want.Source, "acme", pending})
		}
	}
	secret, err := s.Secret(ctx, "acme", "npm")
	ok(t, err)
	same(t, "secret", secret, []byte{1, 0, 2})

	p, l, err := s.Abandoned(ctx, "farm-2", long, true)
	ok(t, err)
	settle(t, s, p, l, store.Published)
	current, err := s.Current(ctx, repository, "latest")
	ok(t, err)
	same(t, "current", current.Digest, "sha256:pending")
	same(t, "it is the newest", current.ID, slices.Max([]int64{p.Bindings[0].ID, p.Bindings[1].ID}))
	bind(t, s, publication("new", "v1"), "farm-2", long)
	submit(t, s, job("new"))
	_, err = s.Retry(ctx, "job-failed", nil, events(1))
	ok(t, err)
}

func checkFilledJob(t testing.TB, got store.Job, state store.State) {
	t.Helper()
	want := job(got.ID)
	want.RequestID, want.Pools, want.Sealed, want.Context, want.Priority, want.Created = "request "+string(state), []string{"office"}, []byte{0, 1, 0xff}, "sha256:context", 3, created
	want.State, want.LastSeq, want.Coordinator = state, 1, got.Coordinator
	for i := range want.Legs {
		want.Legs[i].State = store.Queued
	}
	if state != store.Queued {
		want.LastSeq, want.Digest, want.Error, want.Coordinator = 2, "sha256:d", "it's\na \"text\"; --", "farm-1"
		want.Legs[0] = store.Leg{
			Platform: "linux/amd64", State: store.Succeeded, Descriptor: []byte(`{"size":1}`), Worker: "w",
			Attempts: []store.Attempt{{Number: 1, Coordinator: "farm-1", Worker: "w", Began: created, Ended: created.Add(time.Minute)}},
		}
	}
	if state == store.Succeeded || state == store.Cancelled {
		want.Sealed = nil
	}
	same(t, "there is a start", got.Started.IsZero(), state != store.Running)
	same(t, "there is an end", got.Ended.IsZero(), !state.Ended())
	want.Started, want.Ended = got.Started, got.Ended
	same(t, "the job", got, want)
}

// CheckDumps returns the names of the dumps in a folder, of which there has to be
// one for each migration, so that none is released untested.
func CheckDumps(t testing.TB, dumps, migrations fs.FS) []string {
	t.Helper()
	names, err := fs.Glob(dumps, "schema-*.sql")
	ok(t, err)
	steps, err := fs.Glob(migrations, "*.sql")
	ok(t, err)
	if len(names) != len(steps) || len(names) == 0 {
		t.Fatalf("there are %d migrations and %d dumps: make the last one with -run TestMigrate -update", len(steps), len(names))
	}
	return names
}
