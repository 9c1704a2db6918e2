// Package storetest is what every store.Store has to pass.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// Open returns an empty store, which is closed when the test ends.
type Open func(t testing.TB) store.Store

// over is a lease that has ended when it begins; long one that no test sees the end of.
const (
	over = -time.Second
	long = time.Hour
)

// Run runs the suite.
func Run(t *testing.T, open Open) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"Submit/RoundTrip":    testRoundTrip,
		"Submit/Again":        testSubmitAgain,
		"Submit/Race":         testSubmitRace,
		"Submit/OddTexts":     testOddTexts,
		"Events":              testEvents,
		"Claim/Order":         testClaimOrder,
		"Claim/Race":          testClaimRace,
		"Lease/Lost":          testLeaseLost,
		"Lease/Released":      testRelease,
		"Update/AllOrNothing": testUpdateAllOrNothing,
		"Update/End":          testUpdateEnd,
		"Cancel":              testCancel,
		"Retry":               testRetry,
		"List":                testList,
		"List/Since":          testListSince,
		"FindJobs":            testFindJobs,
		"Purge":               testPurge,
		"ContextInUse":        testContextInUse,
		"Model/Jobs":          testJobsModel,
		"Ledger/Bind":         testBind,
		"Ledger/Decide":       testDecide,
		"Ledger/Race":         testBindRace,
		"Ledger/Again":        testBindAgain,
		"Ledger/Settle":       testSettle,
		"Ledger/Abandoned":    testAbandoned,
		"Ledger/Bindings":     testBindings,
		"Model/Ledger":        testLedgerModel,
		"Secrets":             testSecrets,
		"Secrets/Change":      testChangeSecrets,
		"Blobs":               testBlobs,
		"Blobs/Sweep":         testSweep,
		"Builds":              testBuilds,
		"Builds/Places":       testBuildPlaces,
		"Builds/Blobs":        testBuildBlobs,
		"Builds/Race":         testBuildsRace,
		"Model/Builds":        testBuildsModel,
		"Wakes":               testWakes,
		"EndedContext":        testEndedContext,
		"Now":                 testNow,
		"Closed":              testClosed,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, open(t))
		})
	}
}

// ok ends a test whose step did not succeed.
func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// is ends a test whose step did not end as it should.
func is(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("the error is %v, not: %v", err, want)
	}
}

// same compares what is stored.
func same[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s:\n got  %+v\n want %+v", what, got, want)
	}
}

// fatal is what is used of *testing.T and *rapid.T.
type fatal interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// job is a small one.
func job(id string) store.Job {
	return store.Job{
		ID: id, Tenant: "acme", SubmittedBy: "client ci", Spec: []byte("spec of " + id), SpecDigest: "sha256:" + id,
		Repositories: []string{"registry.example/app"}, Tags: []string{"registry.example/app:1"},
		Legs: []store.Leg{{Platform: "linux/amd64"}, {Platform: "linux/arm64"}},
	}
}

func submit(t testing.TB, s store.Store, jobs ...store.Job) {
	t.Helper()
	for _, j := range jobs {
		_, created, err := s.Submit(t.Context(), j, events(1))
		ok(t, err)
		if !created {
			t.Fatalf("job %s is there already", j.ID)
		}
	}
}

// events are n different ones.
func events(n int) []store.Event {
	all := make([]store.Event, n)
	for i := range all {
		all[i].Data = fmt.Appendf(nil, "event %d of %d", i+1, n)
	}
	return all
}

// claim leases one job.
func claim(t testing.TB, s store.Store, owner string, lease time.Duration) store.Claimed {
	t.Helper()
	claimed, err := s.Claim(t.Context(), owner, lease, 1)
	ok(t, err)
	if len(claimed) != 1 {
		t.Fatalf("%d jobs were claimed instead of one", len(claimed))
	}
	return claimed[0]
}

func get(t testing.TB, s store.Store, id string) store.Job {
	t.Helper()
	j, err := s.Job(t.Context(), id)
	ok(t, err)
	return j
}

func ids(jobs []store.Job) []string {
	var all []string
	for _, j := range jobs {
		all = append(all, j.ID)
	}
	return all
}

func claimedIDs(jobs []store.Claimed) []string {
	var all []string
	for _, j := range jobs {
		all = append(all, j.ID)
	}
	return all
}

func testWakes(t *testing.T, s store.Store) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	wakes := s.Wakes(ctx)
	slow := s.Wakes(ctx)
	hear := func(want store.Wake) {
		t.Helper()
		for late := time.After(10 * time.Second); ; {
			select {
			case got := <-wakes:
				if got == want {
					return
				}
			case <-late:
				t.Fatalf("nothing was heard of %+v", want)
			}
		}
	}
	submit(t, s, job("a"))
	hear(store.Wake{})
	c := claim(t, s, "one", long)
	_, err := s.Update(t.Context(), c.Lease, store.Update{State: store.Running})
	ok(t, err)
	hear(store.Wake{Job: "a"})
	for range 100 { // more than a slow receiver can take, which holds nobody up
		_, err := s.Update(t.Context(), c.Lease, store.Update{Events: events(1)})
		ok(t, err)
	}
	ok(t, s.Release(t.Context(), c.Lease))
	stop()
	for range slow { // ends
	}
	for range wakes {
	}
}

func testEndedContext(t *testing.T, s store.Store) {
	ctx, stop := context.WithCancel(t.Context())
	stop()
	_, _, err := s.Submit(ctx, job("a"), nil)
	is(t, err, context.Canceled)
	_, err = s.List(ctx, store.Query{})
	is(t, err, context.Canceled)
	submit(t, s, job("b"))
}

func testNow(t *testing.T, s store.Store) {
	first, err := s.Now(t.Context())
	ok(t, err)
	second, err := s.Now(t.Context())
	ok(t, err)
	if second.Before(first) || time.Since(first).Abs() > time.Minute { // on the same machine
		t.Errorf("the clock says %v, then %v", first, second)
	}
}

func testClosed(t *testing.T, s store.Store) {
	wakes := s.Wakes(t.Context())
	ok(t, s.Close())
	for range wakes { // ends
	}
	if _, _, err := s.Submit(t.Context(), job("a"), nil); err == nil {
		t.Error("a closed store takes jobs")
	}
	if _, err := s.Job(t.Context(), "a"); err == nil || errors.Is(err, store.ErrNotFound) {
		t.Error("a closed store answers", err)
	}
}

func testSecrets(t *testing.T, s store.Store) {
	ctx := t.Context()
	_, err := s.Secret(ctx, "acme", "npm")
	is(t, err, store.ErrNotFound)
	is(t, s.DeleteSecret(ctx, "acme", "npm"), store.ErrNotFound)
	for _, name := range []string{"npm", "B", "a"} {
		ok(t, s.PutSecret(ctx, "acme", name, []byte("first of "+name)))
	}
	ok(t, s.PutSecret(ctx, "acme", "npm", []byte{0, 1, 255}))
	ok(t, s.PutSecret(ctx, "other", "npm", []byte("the other's")))
	got, err := s.Secret(ctx, "acme", "npm")
	ok(t, err)
	same(t, "the secret", got, []byte{0, 1, 255})
	infos, err := s.ListSecrets(ctx, "acme")
	ok(t, err)
	var names []string
	for _, info := range infos {
		names = append(names, info.Name)
		if time.Since(info.Updated).Abs() > time.Minute {
			t.Errorf("%s was updated at %v", info.Name, info.Updated)
		}
	}
	same(t, "the names", names, []string{"B", "a", "npm"})
	ok(t, s.DeleteSecret(ctx, "acme", "npm"))
	_, err = s.Secret(ctx, "acme", "npm")
	is(t, err, store.ErrNotFound)
	_, err = s.Secret(ctx, "other", "npm")
	ok(t, err)
}

func testChangeSecrets(t *testing.T, s store.Store) {
	ctx := t.Context()
	for _, name := range []string{"keep", "replace", "remove"} {
		ok(t, s.PutSecret(ctx, "acme", name, []byte("of acme")))
		ok(t, s.PutSecret(ctx, "", name, []byte("of nobody")))
	}
	before, err := s.ListSecrets(ctx, "acme")
	ok(t, err)
	var seen []string
	ok(t, s.ChangeSecrets(ctx, func(tenant, name string, sealed []byte) ([]byte, error) {
		seen = append(seen, tenant+"/"+name+": "+string(sealed))
		switch {
		case tenant == "acme" && name == "replace":
			return []byte("anew"), nil
		case tenant == "acme" && name == "remove":
			return nil, nil
		}
		return sealed, nil
	}))
	same(t, "what is passed", seen, []string{
		"/keep: of nobody", "/remove: of nobody", "/replace: of nobody", "acme/keep: of acme", "acme/remove: of acme", "acme/replace: of acme",
	})
	after, err := s.ListSecrets(ctx, "acme")
	ok(t, err)
	same(t, "what is there, and since when", after, []store.SecretInfo{before[0], before[2]})
	for name, want := range map[string]string{"keep": "of acme", "replace": "anew"} {
		got, err := s.Secret(ctx, "acme", name)
		ok(t, err)
		same(t, name, string(got), want)
	}
	refusal := errors.New("no")
	is(t, s.ChangeSecrets(ctx, func(string, string, []byte) ([]byte, error) { return nil, refusal }), refusal)
	if got, err := s.Secret(ctx, "", "keep"); err != nil || string(got) != "of nobody" {
		t.Fatalf("after a refusal: %q, %v", got, err)
	}
}
