package storetest

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

var created = time.Date(2026, 5, 1, 12, 30, 0, 123456000, time.UTC)

func testRoundTrip(t *testing.T, s store.Store) {
	j := job("a")
	j.RequestID, j.Pools, j.Sealed, j.Context, j.Priority, j.Created = "r", []string{"x", "y"}, []byte{0, 255}, "sha256:c", -7, created
	j.Tags = []string{"registry.example/app:1", "registry.example/other:2"}
	j.Repositories = []string{"registry.example/app", "registry.example/other", "registry.example/app"}
	got, _, err := s.Submit(t.Context(), j, events(2))
	ok(t, err)
	j.State, j.LastSeq = store.Queued, 2
	for i := range j.Legs {
		j.Legs[i].State = store.Queued
	}
	same(t, "submitted", got, j)
	same(t, "stored", get(t, s, "a"), j)
	_, err = s.Job(t.Context(), "b")
	is(t, err, store.ErrNotFound)

	c := claim(t, s, "one", long)
	j.Coordinator = "one"
	same(t, "claimed", c.Job, j)
	j.Legs[1] = store.Leg{
		Platform: "linux/arm64", State: store.Failed, Descriptor: []byte(`{"digest": "x"}`), Worker: "mac", Error: "no\x00 luck",
		Attempts: []store.Attempt{
			{Number: 1, Coordinator: "one", Worker: "mac", Error: "lost", Began: created, Ended: created.Add(time.Second)},
			{Number: 2, Coordinator: "one", Worker: "mac", Began: created.Add(2 * time.Second)},
		},
	}
	seq, err := s.Update(t.Context(), c.Lease, store.Update{State: store.Publishing, Digest: "sha256:d", Error: "e", Legs: j.Legs[1:], Events: events(3)})
	ok(t, err)
	j.State, j.Digest, j.Error, j.LastSeq = store.Publishing, "sha256:d", "e", 5
	same(t, "last event", seq, 5)
	same(t, "updated", get(t, s, "a"), j)
	listed, err := s.List(t.Context(), store.Query{})
	ok(t, err)
	same(t, "listed", listed, []store.Job{j})
}

func testSubmitAgain(t *testing.T, s store.Store) {
	ctx := t.Context()
	first, other := job("a"), job("b")
	first.RequestID, other.RequestID, other.Tenant = "r", "r", "other"
	submit(t, s, first, other)
	again := job("c")
	again.RequestID, again.SpecDigest = first.RequestID, first.SpecDigest
	got, made, err := s.Submit(ctx, again, events(5))
	ok(t, err)
	if made || got.ID != "a" || got.LastSeq != 1 {
		t.Errorf("the second submission is %+v, made anew: %v", got, made)
	}
	again.SpecDigest = "sha256:another"
	got, made, err = s.Submit(ctx, again, nil)
	is(t, err, store.ErrConflict)
	if made || got.ID != "a" {
		t.Errorf("the contradiction is to %+v, made: %v", got, made)
	}
	_, made, err = s.Submit(ctx, job("a"), nil) // the id
	is(t, err, store.ErrConflict)
	if made {
		t.Error("an id was taken twice")
	}
	submit(t, s, job("d"), job("e")) // no request id is not one
}

func testSubmitRace(t *testing.T, s store.Store) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	made, ids := 0, map[string]bool{}
	for i := range 24 {
		wg.Go(func() {
			j := job(fmt.Sprint("job-", i))
			j.RequestID, j.SpecDigest = "r", "sha256:same"
			got, created, err := s.Submit(t.Context(), j, events(1))
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			}
			if ids[got.ID] = true; created {
				made++
			}
		})
	}
	wg.Wait()
	if made != 1 || len(ids) != 1 {
		t.Errorf("%d jobs were made, and %v returned", made, ids)
	}
}

func testOddTexts(t *testing.T, s store.Store) {
	j := job("a")
	j.SubmittedBy, j.RequestID = "nul \x00 and \xff", "r \x00"
	submit(t, s, j)
	got := get(t, s, "a")
	same(t, "cleaned", got.SubmittedBy, "nul \uFFFD and \uFFFD")
	_, made, err := s.Submit(t.Context(), j, nil)
	ok(t, err)
	if made {
		t.Error("the request id was not found again")
	}
	_, err = s.Job(t.Context(), "a\x00")
	is(t, err, store.ErrNotFound)
	found, err := s.FindJobs(t.Context(), "\x00")
	ok(t, err)
	same(t, "found", found, nil)
	_, _, err = s.Submit(t.Context(), store.Job{ID: "b"}, nil)
	if err == nil {
		t.Error("a job without a tenant was taken")
	}
	c := claim(t, s, "one", long)
	_, err = s.Update(t.Context(), c.Lease, store.Update{State: store.Failed, Error: strings.Repeat("ä\x00", 100_000)})
	ok(t, err)
}

func testEvents(t *testing.T, s store.Store) {
	submit(t, s, job("a"), job("b"))
	c := claim(t, s, "one", long)
	var wg sync.WaitGroup
	for i := range 8 { // of one job, all at once: no gap, no repeat
		wg.Go(func() {
			if _, err := s.Update(t.Context(), c.Lease, store.Update{Events: events(i * 20)}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	const total = 1 + 28*20
	var all []store.Event
	for {
		after := int64(len(all))
		page, err := s.Events(t.Context(), "a", after, 100)
		ok(t, err)
		if len(page) > 100 {
			t.Fatalf("%d events are more than asked for", len(page))
		}
		if len(page) == 0 {
			break
		}
		all = append(all, page...)
	}
	same(t, "events", len(all), total)
	for i, e := range all {
		if e.Seq != int64(i+1) || len(e.Data) == 0 || time.Since(e.Time).Abs() > time.Minute {
			t.Fatalf("event %d is %+v", i+1, e)
		}
	}
	same(t, "the last", get(t, s, "a").LastSeq, total)
	of, err := s.Events(t.Context(), "b", 0, 10)
	ok(t, err)
	same(t, "events of the other", len(of), 1)
	none, err := s.Events(t.Context(), "none", 0, 10)
	ok(t, err)
	same(t, "events of none", none, nil)
	at := store.Event{Time: created, Data: []byte("then")}
	_, err = s.Update(t.Context(), c.Lease, store.Update{Events: []store.Event{at}})
	ok(t, err)
	last, err := s.Events(t.Context(), "a", total, 10)
	ok(t, err)
	at.Seq = total + 1
	same(t, "an event with its time", last, []store.Event{at})
}

func testClaimOrder(t *testing.T, s store.Store) {
	for i, priority := range []int{0, 5, -1, 5, 0} {
		j := job(fmt.Sprintf("job-%d", i))
		j.Priority = priority
		submit(t, s, j)
	}
	first, err := s.Claim(t.Context(), "one", long, 3)
	ok(t, err)
	same(t, "first", claimedIDs(first), []string{"job-1", "job-3", "job-0"})
	for _, c := range first {
		if c.Lease.Job != c.ID || c.Lease.Owner != "one" || c.Lease.For != long || c.Lease.Epoch < 1 || c.State != store.Queued || c.Coordinator != "one" {
			t.Errorf("claimed %+v", c)
		}
	}
	rest, err := s.Claim(t.Context(), "two", long, 3)
	ok(t, err)
	same(t, "rest", claimedIDs(rest), []string{"job-4", "job-2"})
	none, err := s.Claim(t.Context(), "two", long, 3)
	ok(t, err)
	same(t, "none", claimedIDs(none), nil)
}

func testClaimRace(t *testing.T, s store.Store) {
	const jobs = 120
	for i := range jobs {
		submit(t, s, job(fmt.Sprintf("job-%03d", i)))
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	owners := map[string]string{}
	for i := range 8 {
		wg.Go(func() {
			me := fmt.Sprint("owner-", i)
			for {
				got, err := s.Claim(t.Context(), me, long, 7)
				if err != nil {
					t.Error(err)
				}
				if len(got) == 0 {
					return
				}
				mu.Lock()
				for _, c := range got {
					if had := owners[c.ID]; had != "" {
						t.Errorf("%s is %s's and %s's", c.ID, had, me)
					}
					owners[c.ID] = me
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	// Those that somebody was about to lease are left out: ask again.
	rest, err := s.Claim(t.Context(), "last", long, jobs)
	ok(t, err)
	same(t, "claimed", len(owners)+len(rest), jobs)
}

func testLeaseLost(t *testing.T, s store.Store) {
	submit(t, s, job("a"))
	refused := func(l store.Lease) {
		t.Helper()
		before := get(t, s, "a")
		_, _, err := s.Renew(t.Context(), l)
		is(t, err, store.ErrLeaseLost)
		is(t, s.Release(t.Context(), l), store.ErrLeaseLost)
		_, err = s.Update(t.Context(), l, store.Update{State: store.Succeeded, Events: events(1)})
		is(t, err, store.ErrLeaseLost)
		same(t, "the job", get(t, s, "a"), before)
	}
	ended := claim(t, s, "one", over)
	refused(ended.Lease) // although nobody else has it
	next := claim(t, s, "two", long)
	refused(ended.Lease)
	if next.Lease.Epoch <= ended.Lease.Epoch {
		t.Errorf("epoch %d comes after %d", next.Lease.Epoch, ended.Lease.Epoch)
	}
	before := time.Now()
	renewed, cancel, err := s.Renew(t.Context(), next.Lease)
	ok(t, err)
	if cancel || renewed.Asked.Before(before) || renewed.Epoch != next.Lease.Epoch {
		t.Errorf("renewed is %+v, to be cancelled: %v", renewed, cancel)
	}
	_, err = s.Update(t.Context(), next.Lease, store.Update{State: store.Running})
	ok(t, err)
	none := next.Lease
	none.Job = "none"
	_, _, err = s.Renew(t.Context(), none)
	is(t, err, store.ErrLeaseLost)
	_, err = s.Update(t.Context(), none, store.Update{})
	if err == nil {
		t.Error("a job that is not there was updated")
	}
	short := next.Lease
	short.For = over
	_, _, err = s.Renew(t.Context(), short)
	ok(t, err)
	refused(next.Lease)
}

func testRelease(t *testing.T, s store.Store) {
	submit(t, s, job("a"))
	first := claim(t, s, "one", long)
	ok(t, s.Release(t.Context(), first.Lease))
	is(t, s.Release(t.Context(), first.Lease), store.ErrLeaseLost)
	second := claim(t, s, "two", long)
	is(t, s.Release(t.Context(), first.Lease), store.ErrLeaseLost)
	_, err := s.Update(t.Context(), second.Lease, store.Update{State: store.Running})
	ok(t, err)
}

func testUpdateAllOrNothing(t *testing.T, s store.Store) {
	submit(t, s, job("a"))
	c := claim(t, s, "one", long)
	before := get(t, s, "a")
	_, err := s.Update(t.Context(), c.Lease, store.Update{
		State: store.Running, Events: events(3),
		Legs: []store.Leg{{Platform: "linux/amd64", State: store.Running}, {Platform: "linux/s390x"}},
	})
	if err == nil {
		t.Error("an unknown platform was taken")
	}
	same(t, "the job", get(t, s, "a"), before)
	got, err := s.Events(t.Context(), "a", 0, 10)
	ok(t, err)
	same(t, "events", len(got), 1)
}

func testUpdateEnd(t *testing.T, s store.Store) {
	for _, end := range []store.State{store.Succeeded, store.Failed, store.Cancelled} {
		j := job(string(end))
		j.Sealed = []byte("sealed")
		submit(t, s, j)
		c := claim(t, s, "one", long)
		_, err := s.Update(t.Context(), c.Lease, store.Update{State: store.Running, Error: "in between"})
		ok(t, err)
		running := get(t, s, j.ID)
		if running.Started.IsZero() || running.State.Ended() || !running.Ended.IsZero() || running.Error != "in between" {
			t.Errorf("running: %+v", running)
		}
		counts, err := s.CountJobs(t.Context())
		ok(t, err)
		same(t, "counts", counts, map[store.State]int{store.Running: 1})
		_, err = s.Update(t.Context(), c.Lease, store.Update{State: end})
		ok(t, err)
		got := get(t, s, j.ID)
		if got.State != end || got.Ended.IsZero() || got.Error != "" || !got.Started.Equal(running.Started) || (got.Sealed != nil) != (end == store.Failed) {
			t.Errorf("ended: %+v", got)
		}
		_, err = s.Update(t.Context(), c.Lease, store.Update{State: store.Running})
		is(t, err, store.ErrLeaseLost)
		none, err := s.Claim(t.Context(), "two", long, 1)
		ok(t, err)
		same(t, "claimed after the end", none, nil)
	}
}

func testCancel(t *testing.T, s store.Store) {
	ctx := t.Context()
	_, err := s.Cancel(ctx, "none", nil)
	is(t, err, store.ErrNotFound)

	// Nobody has it: it ends.
	j := job("a")
	j.Sealed = []byte("sealed")
	submit(t, s, j)
	c := claim(t, s, "one", long)
	_, err = s.Update(ctx, c.Lease, store.Update{State: store.Running, Legs: []store.Leg{
		{Platform: "linux/amd64", State: store.Succeeded, Descriptor: []byte("{}")},
		{Platform: "linux/arm64", State: store.Running, Attempts: []store.Attempt{{Number: 1, Began: created}}},
	}})
	ok(t, err)
	ok(t, s.Release(ctx, c.Lease))
	got, err := s.Cancel(ctx, "a", events(2))
	ok(t, err)
	if got.State != store.Cancelled || got.Ended.IsZero() || got.Sealed != nil || got.LastSeq != 3 ||
		got.Legs[0].State != store.Succeeded || got.Legs[1].State != store.Cancelled || got.Legs[1].Attempts[0].Ended.IsZero() {
		t.Errorf("cancelled: %+v", got)
	}
	same(t, "stored", get(t, s, "a"), got)
	again, err := s.Cancel(ctx, "a", events(2))
	ok(t, err)
	same(t, "again", again, got)

	// Somebody has it: the holder learns of it.
	submit(t, s, job("b"))
	c = claim(t, s, "one", long)
	for range 2 {
		got, err = s.Cancel(ctx, "b", events(2))
		ok(t, err)
		if !got.CancelRequested || got.State != store.Queued || got.LastSeq != 1 {
			t.Errorf("to be cancelled: %+v", got)
		}
	}
	_, cancel, err := s.Renew(ctx, c.Lease)
	ok(t, err)
	same(t, "cancel", cancel, true)
	_, err = s.Update(ctx, c.Lease, store.Update{State: store.Publishing})
	ok(t, err)
	_, err = s.Cancel(ctx, "b", nil)
	is(t, err, store.ErrConflict)

	// It is being published.
	submit(t, s, job("c"))
	c = claim(t, s, "one", long)
	_, err = s.Update(ctx, c.Lease, store.Update{State: store.Publishing})
	ok(t, err)
	_, err = s.Cancel(ctx, "c", events(1))
	is(t, err, store.ErrConflict)
	ok(t, s.Release(ctx, c.Lease))
	_, err = s.Cancel(ctx, "c", events(1))
	is(t, err, store.ErrConflict)
	same(t, "requested", get(t, s, "c").CancelRequested, false)
}

func testRetry(t *testing.T, s store.Store) {
	_, err := s.Retry(t.Context(), "none", nil, nil)
	is(t, err, store.ErrNotFound)
	submit(t, s, job("a"))
	_, err = s.Retry(t.Context(), "a", nil, nil)
	is(t, err, store.ErrConflict)
	end := func() {
		t.Helper()
		c := claim(t, s, "one", long)
		_, err := s.Update(t.Context(), c.Lease, store.Update{State: store.Running})
		ok(t, err)
		_, err = s.Update(t.Context(), c.Lease, store.Update{State: store.Failed, Digest: "sha256:d", Error: "e", Legs: []store.Leg{
			{Platform: "linux/amd64", State: store.Succeeded, Descriptor: []byte("{}"), Worker: "w", Attempts: []store.Attempt{{Number: 1}}},
			{Platform: "linux/arm64", State: store.Failed, Error: "e", Attempts: []store.Attempt{{Number: 1}}},
		}})
		ok(t, err)
		_, err = s.Update(t.Context(), c.Lease, store.Update{})
		is(t, err, store.ErrLeaseLost)
	}
	end()
	_, err = s.Retry(t.Context(), "a", []string{"linux/s390x"}, nil)
	is(t, err, store.ErrConflict)
	ended := get(t, s, "a")
	got, err := s.Retry(t.Context(), "a", nil, events(2))
	ok(t, err)
	want := ended
	want.State, want.Digest, want.Error, want.Retries, want.LastSeq = store.Queued, "", "", 1, ended.LastSeq+2
	want.Started, want.Ended = time.Time{}, time.Time{}
	want.Legs = slices.Clone(ended.Legs)
	want.Legs[1] = store.Leg{Platform: "linux/arm64", State: store.Queued}
	same(t, "retried", got, want)
	same(t, "stored", get(t, s, "a"), want)
	end()
	got, err = s.Retry(t.Context(), "a", []string{"linux/amd64"}, nil)
	ok(t, err)
	same(t, "legs", got.Legs, []store.Leg{{Platform: "linux/amd64", State: store.Queued}, {Platform: "linux/arm64", State: store.Queued}})
	listed, err := s.List(t.Context(), store.Query{Repository: "registry.example/app", States: []store.State{store.Queued}})
	ok(t, err)
	same(t, "listed", ids(listed), []string{"a"})
}

func testList(t *testing.T, s store.Store) {
	ctx := t.Context()
	var all []store.Job
	for i := range 60 {
		j := job(fmt.Sprintf("job-%03d", i))
		j.Tenant = []string{"acme", "other", "third"}[i%3]
		j.Repositories = [][]string{{"r.example/a"}, {"r.example/a", "r.example/b"}, nil, {"r.example/b"}}[i%4]
		j.Created = created.Add(time.Duration(i) * time.Minute)
		submit(t, s, j)
	}
	for i, state := range []store.State{store.Running, store.Publishing, store.Succeeded, store.Failed, store.Cancelled} {
		claimed, err := s.Claim(ctx, "one", long, 7+i)
		ok(t, err)
		for _, c := range claimed {
			_, err := s.Update(ctx, c.Lease, store.Update{State: state})
			ok(t, err)
		}
	}
	for i := 59; i >= 0; i-- {
		all = append(all, get(t, s, fmt.Sprintf("job-%03d", i)))
	}
	var queries []store.Query
	for _, tenants := range [][]string{nil, {}, {"acme"}, {"third", "acme"}, {"none"}} {
		for _, states := range [][]store.State{nil, {store.Failed}, {store.Queued, store.Succeeded, store.Running}} {
			for _, repository := range []string{"", "r.example/a", "r.example/b", "r.example/c"} {
				queries = append(queries, store.Query{Tenants: tenants, States: states, Repository: repository})
			}
		}
	}
	many := store.Query{States: []store.State{store.Queued, store.Running}}
	for i := range 100 {
		many.Tenants = append(many.Tenants, fmt.Sprint("tenant-", i))
	}
	many.Tenants = append(many.Tenants, "acme")
	for _, q := range append(queries, many) {
		for _, since := range []time.Time{{}, created.Add(29 * time.Minute)} {
			q.Since = since
			var want []string
			for _, j := range all {
				if (q.Tenants == nil || slices.Contains(q.Tenants, j.Tenant)) && (q.States == nil || slices.Contains(q.States, j.State)) &&
					(q.Repository == "" || slices.Contains(j.Repositories, q.Repository)) && !j.Created.Before(since) {
					want = append(want, j.ID)
				}
			}
			var got []string
			for q.Limit = 7; ; q.Before = got[len(got)-1] {
				page, err := s.List(ctx, q)
				ok(t, err)
				got = append(got, ids(page)...)
				if len(page) < q.Limit {
					break
				}
			}
			q.Before = ""
			same(t, fmt.Sprintf("%+v", q), got, want)
		}
	}
}

// testListSince has ids whose order is not quite that of time, as with clocks of
// several coordinators.
func testListSince(t *testing.T, s store.Store) {
	for i, minute := range []int{0, 1, 30, 25, 31, 28, 60} {
		j := job(fmt.Sprint("job-", i))
		j.Created = created.Add(time.Duration(minute) * time.Minute)
		submit(t, s, j)
	}
	for limit := 1; limit < 5; limit++ {
		got, err := s.List(t.Context(), store.Query{Since: created.Add(30 * time.Minute), Limit: limit})
		ok(t, err)
		same(t, "since", ids(got), []string{"job-6", "job-4", "job-2"}[:min(limit, 3)])
	}
}

func testFindJobs(t *testing.T, s store.Store) {
	submit(t, s, job("abc1"), job("abc2"), job("abc3"), job("abd"), job("ABC"), job("a"))
	for prefix, want := range map[string][]string{
		"abc": {"abc1", "abc2"}, "abd": {"abd"}, "abc2": {"abc2"}, "abe": nil, "A": {"ABC"}, "": {"ABC", "a"}, "%": nil, "abd ": nil,
	} {
		got, err := s.FindJobs(t.Context(), prefix)
		ok(t, err)
		same(t, "jobs like "+prefix, got, want)
	}
}

func testPurge(t *testing.T, s store.Store) {
	ctx := t.Context()
	for i := range 50 {
		submit(t, s, job(fmt.Sprintf("old-%02d", i)))
	}
	submit(t, s, job("open"), job("young"))
	for i := range 50 {
		_, err := s.Cancel(ctx, fmt.Sprintf("old-%02d", i), events(3))
		ok(t, err)
	}
	before := later(t, s)
	_, err := s.Cancel(ctx, "young", nil)
	ok(t, err)
	for _, want := range []int{30, 20, 0} {
		n, err := s.Purge(ctx, before, 30)
		ok(t, err)
		same(t, "purged", n, want)
	}
	for _, q := range []store.Query{{}, {Repository: "registry.example/app"}, {Tenants: []string{"acme"}}} {
		left, err := s.List(ctx, q)
		ok(t, err)
		same(t, "left", ids(left), []string{"young", "open"})
	}
	gone, err := s.Events(ctx, "old-00", 0, 10)
	ok(t, err)
	same(t, "events", gone, nil)
}

func testContextInUse(t *testing.T, s store.Store) {
	ctx := t.Context()
	j := job("a")
	j.Context = "sha256:c"
	submit(t, s, j, job("none"))
	used := func(tenant, digest string, want bool) {
		t.Helper()
		got, err := s.ContextInUse(ctx, tenant, digest)
		ok(t, err)
		same(t, "in use", got, want)
	}
	used("acme", "sha256:c", true)
	used("other", "sha256:c", false)
	used("acme", "sha256:d", false)
	used("acme", "", false)
	for end, want := range map[store.State]bool{store.Failed: true, store.Succeeded: false} {
		c := claim(t, s, "one", long)
		used("acme", "sha256:c", true)
		_, err := s.Update(ctx, c.Lease, store.Update{State: end})
		ok(t, err)
		used("acme", "sha256:c", want)
		_, err = s.Retry(ctx, "a", nil, nil)
		ok(t, err)
	}
}
