package storetest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/store"
)

// testJobsModel does whatever may be done to some jobs, in any order, and compares
// what comes of it with the simplest program that does the same.
func testJobsModel(t *testing.T, s store.Store) {
	round := 0
	rapid.Check(t, func(rt *rapid.T) {
		round++
		m := &jobsModel{ctx: t.Context(), store: s, prefix: fmt.Sprintf("%05d", round), jobs: map[string]*modelJob{}}
		defer m.clear() // also after a failure, which is repeated to find the shortest
		rt.Repeat(map[string]func(*rapid.T){
			"submit": m.submit, "submitAgain": m.submitAgain, "claim": m.claim, "renew": m.renew, "release": m.release,
			"update": m.update, "cancel": m.cancel, "retry": m.retry, "list": m.list, "": m.check,
		})
		m.checkEvents(rt)
	})
}

// modelJob is what a job should be. Times are compared by whether they are there.
type modelJob struct {
	job   store.Job
	epoch int64
	held  bool // by a lease that has not ended
}

type jobsModel struct {
	ctx    context.Context
	store  store.Store
	prefix string
	jobs   map[string]*modelJob
	leases []store.Lease // all there were
}

func must(t fatal, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func mustBe(t fatal, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("the error is %v, not: %v", err, want)
	}
}

func mustEqual(t fatal, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s:\n got  %+v\n want %+v", what, got, want)
	}
}

// plain is a job without the times, which the store makes.
func plain(j store.Job) store.Job {
	past := func(t *time.Time) {
		if !t.IsZero() {
			*t = created
		}
	}
	past(&j.Created)
	past(&j.Started)
	past(&j.Ended)
	return j
}

var (
	modelPlatforms = []string{"linux/amd64", "linux/arm64"}
	modelStates    = []store.State{"", store.Running, store.Publishing, store.Succeeded, store.Failed, store.Cancelled}
)

func (m *jobsModel) ids() []string {
	all := []string{}
	for id := range m.jobs {
		all = append(all, id)
	}
	slices.Sort(all)
	return all
}

func (m *jobsModel) any(t *rapid.T) *modelJob {
	if len(m.jobs) == 0 {
		t.Skip("no jobs yet")
	}
	return m.jobs[rapid.SampledFrom(m.ids()).Draw(t, "job")]
}

func (m *jobsModel) submit(t *rapid.T) {
	j := job(fmt.Sprintf("%s-%03d", m.prefix, len(m.jobs)))
	j.RequestID = "request of " + j.ID
	j.Priority = rapid.IntRange(-1, 1).Draw(t, "priority")
	j.Sealed = []byte("sealed")
	n := rapid.IntRange(0, 10).Draw(t, "events")
	got, created, err := m.store.Submit(m.ctx, j, events(n))
	must(t, err)
	mustEqual(t, "created", created, true)
	j.State, j.LastSeq, j.Created = store.Queued, int64(n), time.Now()
	for i := range j.Legs {
		j.Legs[i].State = store.Queued
	}
	mustEqual(t, "submitted", plain(got), plain(j))
	m.jobs[j.ID] = &modelJob{job: plain(j)}
}

func (m *jobsModel) submitAgain(t *rapid.T) {
	there := m.any(t)
	again := job("again")
	again.RequestID, again.SpecDigest = there.job.RequestID, there.job.SpecDigest
	got, created, err := m.store.Submit(m.ctx, again, events(1))
	must(t, err)
	mustEqual(t, "created", created, false)
	mustEqual(t, "the one that is there", withoutEnds(got), there.job)
}

func (m *jobsModel) claim(t *rapid.T) {
	n := rapid.IntRange(1, 3).Draw(t, "n")
	lease := rapid.SampledFrom([]time.Duration{long, long, over}).Draw(t, "lease")
	owner := rapid.SampledFrom([]string{"one", "two"}).Draw(t, "owner")
	claimed, err := m.store.Claim(m.ctx, owner, lease, n)
	must(t, err)
	var want []string
	for _, id := range m.ids() {
		if j := m.jobs[id]; !j.held && !j.job.State.Ended() {
			want = append(want, id)
		}
	}
	slices.SortStableFunc(want, func(a, b string) int { return cmp.Compare(m.jobs[b].job.Priority, m.jobs[a].job.Priority) })
	mustEqual(t, "claimed", claimedIDs(claimed), want[:min(n, len(want))])
	for _, c := range claimed {
		j := m.jobs[c.ID]
		j.held, j.job.Coordinator = lease == long, owner
		if c.Lease.Epoch <= j.epoch {
			t.Fatalf("epoch %d comes after %d", c.Lease.Epoch, j.epoch)
		}
		j.epoch = c.Lease.Epoch
		m.leases = append(m.leases, c.Lease)
	}
}

// lease is any that there has ever been, with its job, and whether it is good.
func (m *jobsModel) lease(t *rapid.T) (store.Lease, *modelJob, bool) {
	if len(m.leases) == 0 {
		t.Skip("no leases yet")
	}
	l := rapid.SampledFrom(m.leases).Draw(t, "lease")
	j := m.jobs[l.Job]
	return l, j, j.held && j.epoch == l.Epoch
}

func (m *jobsModel) renew(t *rapid.T) {
	l, j, good := m.lease(t)
	l.For = rapid.SampledFrom([]time.Duration{long, long, over}).Draw(t, "for")
	_, cancel, err := m.store.Renew(m.ctx, l)
	if !good {
		mustBe(t, err, store.ErrLeaseLost)
		return
	}
	must(t, err)
	mustEqual(t, "cancel", cancel, j.job.CancelRequested)
	j.held = l.For == long
}

func (m *jobsModel) release(t *rapid.T) {
	l, j, good := m.lease(t)
	err := m.store.Release(m.ctx, l)
	if !good {
		mustBe(t, err, store.ErrLeaseLost)
		return
	}
	must(t, err)
	j.held = false
}

func (m *jobsModel) update(t *rapid.T) {
	l, j, good := m.lease(t)
	u := store.Update{
		State:  rapid.SampledFrom(modelStates).Draw(t, "state"),
		Digest: rapid.SampledFrom([]string{"", "sha256:1", "sha256:2"}).Draw(t, "digest"),
		Error:  rapid.SampledFrom([]string{"", "one", "two"}).Draw(t, "error"),
		Events: events(rapid.IntRange(0, 70).Draw(t, "events")),
	}
	for _, platform := range modelPlatforms {
		if rapid.Bool().Draw(t, platform) {
			u.Legs = append(u.Legs, store.Leg{
				Platform: platform, State: rapid.SampledFrom(modelStates[1:]).Draw(t, "leg's state"), Worker: "w", Descriptor: []byte("{}"),
				Attempts: []store.Attempt{{Number: 1, Began: created}},
			})
		}
	}
	seq, err := m.store.Update(m.ctx, l, u)
	if !good {
		mustBe(t, err, store.ErrLeaseLost)
		return
	}
	must(t, err)
	j.apply(u)
	mustEqual(t, "last event", seq, j.job.LastSeq)
}

func (j *modelJob) apply(u store.Update) {
	j.job.LastSeq += int64(len(u.Events))
	if u.Digest != "" {
		j.job.Digest = u.Digest
	}
	if u.Error != "" || u.State.Ended() {
		j.job.Error = u.Error
	}
	for _, l := range u.Legs {
		j.job.Legs[slices.Index(modelPlatforms, l.Platform)] = l
	}
	if u.State != "" {
		j.job.State = u.State
	}
	if u.State == store.Running {
		j.job.Started = created
	}
	if u.State.Ended() {
		j.end()
	}
}

func (j *modelJob) end() {
	j.job.Ended, j.held = created, false
	if j.job.State != store.Failed {
		j.job.Sealed = nil
	}
}

func (m *jobsModel) cancel(t *rapid.T) {
	j := m.any(t)
	got, err := m.store.Cancel(m.ctx, j.job.ID, events(2))
	switch {
	case j.job.State.Ended():
	case j.job.State == store.Publishing:
		mustBe(t, err, store.ErrConflict)
		return
	case j.held:
		j.job.CancelRequested = true
	default:
		j.job.State, j.job.CancelRequested, j.job.Error = store.Cancelled, true, ""
		j.job.LastSeq += 2
		for i, l := range j.job.Legs {
			if !l.State.Ended() {
				j.job.Legs[i].State = store.Cancelled
			}
		}
		j.end()
	}
	must(t, err)
	mustEqual(t, "cancelled", withoutEnds(got), j.job)
}

// withoutEnds is a plain job whose attempts have not the times that Cancel gave them.
func withoutEnds(j store.Job) store.Job {
	j = plain(j)
	j.Legs = slices.Clone(j.Legs)
	for i := range j.Legs {
		j.Legs[i].Attempts = slices.Clone(j.Legs[i].Attempts)
		for a := range j.Legs[i].Attempts {
			j.Legs[i].Attempts[a].Ended = time.Time{}
		}
	}
	return j
}

func (m *jobsModel) retry(t *rapid.T) {
	j := m.any(t)
	var platforms []string
	if rapid.Bool().Draw(t, "arm64 too") {
		platforms = []string{"linux/arm64"}
	}
	_, err := m.store.Retry(m.ctx, j.job.ID, platforms, events(1))
	if !j.job.State.Ended() {
		mustBe(t, err, store.ErrConflict)
		return
	}
	must(t, err)
	for i, l := range j.job.Legs {
		if l.State != store.Succeeded || slices.Contains(platforms, l.Platform) {
			j.job.Legs[i] = store.Leg{Platform: l.Platform, State: store.Queued}
		}
	}
	j.job.State, j.job.Digest, j.job.Error, j.job.CancelRequested = store.Queued, "", "", false
	j.job.Started, j.job.Ended = time.Time{}, time.Time{}
	j.job.Retries++
	j.job.LastSeq++
}

func (m *jobsModel) list(t *rapid.T) {
	q := store.Query{Limit: 1000}
	if rapid.Bool().Draw(t, "by repository") {
		q.Repository = "registry.example/app"
	}
	if rapid.Bool().Draw(t, "by tenant") {
		q.Tenants = []string{"acme"}
	}
	for _, state := range modelStates[1:] {
		if rapid.Bool().Draw(t, string(state)) {
			q.States = append(q.States, state)
		}
	}
	got, err := m.store.List(m.ctx, q)
	must(t, err)
	var want []string
	for _, id := range m.ids() {
		if len(q.States) == 0 || slices.Contains(q.States, m.jobs[id].job.State) {
			want = append(want, id)
		}
	}
	slices.Reverse(want)
	mustEqual(t, "listed", ids(got), want)
}

// check compares everything.
func (m *jobsModel) check(t *rapid.T) {
	counts := map[store.State]int{}
	for _, id := range m.ids() {
		j := m.jobs[id]
		got, err := m.store.Job(m.ctx, id)
		must(t, err)
		mustEqual(t, "the job", withoutEnds(got), j.job)
		if !j.job.State.Ended() {
			counts[j.job.State]++
		}
	}
	got, err := m.store.CountJobs(m.ctx)
	must(t, err)
	mustEqual(t, "counts", got, counts)
}

func (m *jobsModel) checkEvents(t *rapid.T) {
	for id, j := range m.jobs {
		for after := int64(0); after < j.job.LastSeq; {
			page, err := m.store.Events(m.ctx, id, after, 100)
			must(t, err)
			mustEqual(t, "events", len(page), int(min(100, j.job.LastSeq-after)))
			for _, e := range page {
				after++
				mustEqual(t, "event", e.Seq, after)
			}
		}
	}
}

// clear makes room for the next round.
func (m *jobsModel) clear() {
	for _, l := range m.leases {
		_ = m.store.Release(m.ctx, l)
	}
	open, _ := m.store.Claim(m.ctx, "end", long, 1000)
	for _, c := range open {
		_, _ = m.store.Update(m.ctx, c.Lease, store.Update{State: store.Failed})
	}
	_, _ = m.store.Purge(m.ctx, time.Now().Add(long), 1000)
}
