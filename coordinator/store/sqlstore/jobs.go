package sqlstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// submitted is what Submit returns.
type submitted struct {
	job     store.Job
	created bool
}

// Submit creates a job, or returns the one that has its RequestID.
func (s *Store) Submit(ctx context.Context, j store.Job, events []store.Event) (store.Job, bool, error) {
	if j.ID == "" || j.Tenant == "" {
		return store.Job{}, false, errors.New("storing a job: it has no id or no tenant")
	}
	j.State, j.Digest, j.Error, j.CancelRequested, j.Coordinator = store.Queued, "", "", false, ""
	j.Retries, j.LastSeq, j.Started, j.Ended = 0, 0, time.Time{}, time.Time{}
	j.Legs = slices.Clone(j.Legs)
	for i := range j.Legs {
		j.Legs[i] = store.Leg{Platform: j.Legs[i].Platform, State: store.Queued}
	}
	got, err := write(ctx, s, "storing job "+j.ID, func(tx Tx) (submitted, error) { return submit(tx, j, events) })
	if got.created && err == nil {
		s.wakes.send(store.Wake{})
	}
	if errors.Is(err, errTaken) { // not in the transaction, that must not be undone for it
		err = fmt.Errorf("the request id %q has been used for another specification, by job %s: %w", j.RequestID, got.job.ID, store.ErrConflict)
	}
	return got.job, got.created, err
}

// errTaken: the request id is another specification's.
var errTaken = errors.New("taken")

func submit(tx Tx, j store.Job, events []store.Event) (submitted, error) {
	now, err := tx.Now()
	if err != nil {
		return submitted{}, err
	}
	j.Created = stored(cmp.Or(j.Created, now))
	j.LastSeq = int64(len(events))
	inserted, err := insertJob(tx, j)
	if err != nil {
		return submitted{}, err
	}
	if !inserted {
		return taken(tx, j)
	}
	for _, repository := range repositories(j) {
		if _, err := tx.Exec("INSERT INTO job_repositories (repository, state, job, tenant) VALUES ($1, $2, $3, $4)",
			text(repository), string(j.State), j.ID, text(j.Tenant)); err != nil {
			return submitted{}, err
		}
	}
	return submitted{j, true}, appendEvents(tx, j.ID, 0, now, events)
}

func taken(tx Tx, j store.Job) (submitted, error) {
	there, err := ofRequest(tx, j.Tenant, j.RequestID)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return submitted{}, fmt.Errorf("the job's id: %w", store.ErrConflict)
	case err == nil && there.SpecDigest != j.SpecDigest:
		err = errTaken
	}
	return submitted{job: there.Job}, err
}

// insertJob tells whether it did: not if the request id, or the id, is there already.
func insertJob(tx Tx, j store.Job) (bool, error) {
	pools, err1 := encode(j.Pools)
	tags, err2 := encode(j.Tags)
	names, err3 := encode(j.Repositories)
	legs, err4 := encodeLegs(j.Legs)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return false, err
	}
	n, err := tx.Exec(`INSERT INTO jobs (id, request_id, tenant, submitted_by, pools, spec, spec_digest, sealed, context, tags, repositories,
			priority, state, last_seq, created, legs)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)
		ON CONFLICT DO NOTHING`,
		text(j.ID), text(j.RequestID), text(j.Tenant), text(j.SubmittedBy), pools, j.Spec, text(j.SpecDigest), j.Sealed, text(j.Context), tags, names,
		j.Priority, string(j.State), j.LastSeq, micros(j.Created), legs)
	return n == 1, err
}

// repositories are those of a job, each once.
func repositories(j store.Job) []string {
	return slices.Compact(slices.Sorted(slices.Values(j.Repositories)))
}

// appendEvents gives them the numbers after last.
func appendEvents(tx Tx, id string, last int64, now time.Time, events []store.Event) error {
	for len(events) > 0 {
		// A few shapes of the statement, so that each is prepared once.
		n := 1
		for _, many := range []int{64, 8} {
			if len(events) >= many {
				n = many
				break
			}
		}
		var p params
		query := "INSERT INTO job_events (job, seq, time, data) VALUES "
		for i, e := range events[:n] {
			if i > 0 {
				query += ", "
			}
			last++
			query += "(" + p.add(text(id)) + ", " + p.add(last) + ", " + p.add(micros(cmp.Or(e.Time, now))) + ", " + p.add(e.Data) + ")"
		}
		if _, err := tx.Exec(query, p...); err != nil {
			return fmt.Errorf("events: %w", err)
		}
		events = events[n:]
	}
	return nil
}

// Job returns a job by its id.
func (s *Store) Job(ctx context.Context, id string) (store.Job, error) {
	j, err := read(ctx, s, "job "+id, func(tx Tx) (job, error) {
		return one(tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE id = $1", text(id))
	})
	return j.Job, err
}

// JobOfRequest returns the tenant's job that has the RequestID.
func (s *Store) JobOfRequest(ctx context.Context, tenant, requestID string) (store.Job, error) {
	j, err := read(ctx, s, "the job of a request", func(tx Tx) (job, error) { return ofRequest(tx, tenant, requestID) })
	return j.Job, err
}

func ofRequest(tx Tx, tenant, requestID string) (job, error) {
	return one(tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE tenant = $1 AND request_id = $2 AND request_id <> ''", text(tenant), text(requestID))
}

// FindJobs returns the ids, at most two, that begin with a prefix.
func (s *Store) FindJobs(ctx context.Context, prefix string) ([]string, error) {
	return read(ctx, s, "looking for jobs "+prefix+"…", func(tx Tx) ([]string, error) {
		return rows(tx, column[string], "SELECT id FROM jobs WHERE id >= $1 AND id < $2 ORDER BY id LIMIT 2",
			text(prefix), text(prefix)+"\U0010FFFF")
	})
}

// Events returns up to limit events of a job after a sequence number.
func (s *Store) Events(ctx context.Context, id string, after int64, limit int) ([]store.Event, error) {
	return read(ctx, s, "the events of job "+id, func(tx Tx) ([]store.Event, error) {
		return rows(tx, func(scan func(...any) error) (e store.Event, err error) {
			var at int64
			err = scan(&e.Seq, &at, &e.Data)
			e.Time = moment(at)
			return e, err
		}, "SELECT seq, time, data FROM job_events WHERE job = $1 AND seq > $2 ORDER BY seq LIMIT $3", text(id), after, page(limit))
	})
}

// Cancel ends a job that nobody has a lease of, and marks one that somebody has.
func (s *Store) Cancel(ctx context.Context, id string, events []store.Event) (store.Job, error) {
	j, err := write(ctx, s, "cancelling job "+id, func(tx Tx) (job, error) {
		j, now, err := lock(tx, id)
		switch {
		case err != nil || j.State.Ended():
			return j, err
		case j.State == store.Publishing:
			return j, fmt.Errorf("it is being published: %w", store.ErrConflict)
		case j.held(now):
			j.CancelRequested = true
			return j, save(tx, &j, j.State, nil, now)
		}
		was := j.State
		j.State, j.CancelRequested, j.Error = store.Cancelled, true, ""
		for i := range j.Legs {
			if l := &j.Legs[i]; !l.State.Ended() {
				l.State = store.Cancelled
				for a := range l.Attempts {
					l.Attempts[a].Ended = cmp.Or(l.Attempts[a].Ended, stored(now))
				}
			}
		}
		return j, save(tx, &j, was, events, now)
	})
	if err == nil {
		s.wakes.send(store.Wake{Job: id})
	}
	return j.Job, err
}

// Retry puts an ended job back into the queue.
func (s *Store) Retry(ctx context.Context, id string, platforms []string, events []store.Event) (store.Job, error) {
	j, err := write(ctx, s, "retrying job "+id, func(tx Tx) (job, error) {
		j, now, err := lock(tx, id)
		switch {
		case err != nil:
			return j, err
		case !j.State.Ended():
			return j, fmt.Errorf("it is %s: %w", j.State, store.ErrConflict)
		}
		for _, platform := range platforms {
			if !slices.ContainsFunc(j.Legs, func(l store.Leg) bool { return l.Platform == platform }) {
				return j, fmt.Errorf("it has no leg for %s: %w", platform, store.ErrConflict)
			}
		}
		for i, l := range j.Legs {
			if l.State != store.Succeeded || slices.Contains(platforms, l.Platform) {
				j.Legs[i] = store.Leg{Platform: l.Platform, State: store.Queued}
			}
		}
		was := j.State
		j.State, j.Digest, j.Error, j.CancelRequested = store.Queued, "", "", false
		j.Started, j.Ended = time.Time{}, time.Time{}
		j.Retries++
		return j, save(tx, &j, was, events, now)
	})
	if err == nil {
		s.wakes.send(store.Wake{Job: id})
		s.wakes.send(store.Wake{})
	}
	return j.Job, err
}

// lock returns a job, which nobody else changes until the transaction ends.
func lock(tx Tx, id string) (job, time.Time, error) {
	j, err := one(tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE id = $1"+forUpdate(tx), text(id))
	if err != nil {
		return job{}, time.Time{}, err
	}
	now, err := tx.Now() // after the wait
	return j, now, err
}

// save writes what may change of a locked job, appends the events, and does what
// belongs to the end of a job.
func save(tx Tx, j *job, was store.State, events []store.Event, now time.Time) error {
	if j.State.Ended() {
		j.Ended, j.leaseUntil = cmp.Or(j.Ended, stored(now)), 0
		if j.State != store.Failed {
			j.Sealed = nil
		}
	}
	legs, err := encodeLegs(j.Legs)
	if err != nil {
		return err
	}
	last := j.LastSeq
	j.LastSeq += int64(len(events))
	if _, err := tx.Exec(`UPDATE jobs SET sealed = $1, state = $2, digest = $3, error = $4, retries = $5, cancel_requested = $6, last_seq = $7,
			started = $8, ended = $9, legs = $10, lease_until = $11 WHERE id = $12`,
		j.Sealed, string(j.State), text(j.Digest), text(j.Error), j.Retries, j.CancelRequested, j.LastSeq,
		micros(j.Started), micros(j.Ended), legs, j.leaseUntil, j.ID); err != nil {
		return err
	}
	if j.State != was {
		for _, repository := range repositories(j.Job) {
			if _, err := tx.Exec("UPDATE job_repositories SET state = $1 WHERE repository = $2 AND state = $3 AND job = $4",
				string(j.State), text(repository), string(was), j.ID); err != nil {
				return err
			}
		}
	}
	return appendEvents(tx, j.ID, last, now, events)
}

// CountJobs returns how many jobs there are in each state that is not an end.
func (s *Store) CountJobs(ctx context.Context) (map[store.State]int, error) {
	return read(ctx, s, "counting jobs", func(tx Tx) (map[store.State]int, error) {
		counts := map[store.State]int{}
		err := tx.Query(func(scan func(...any) error) error {
			var state store.State
			var n int
			err := scan(&state, &n)
			counts[state] = n
			return err
		}, "SELECT state, COUNT(*) FROM jobs WHERE state IN ('queued', 'running', 'publishing') GROUP BY state")
		return counts, err
	})
}

// ContextInUse tells whether a job that has not ended, or has failed and may be
// tried again, names the context.
func (s *Store) ContextInUse(ctx context.Context, tenant, digest string) (bool, error) {
	return read(ctx, s, "looking for jobs of a context", func(tx Tx) (bool, error) {
		found, err := rows(tx, column[string], `SELECT id FROM jobs WHERE tenant = $1 AND context = $2 AND context <> ''
			AND state IN ('queued', 'running', 'publishing', 'failed') LIMIT 1`, text(tenant), text(digest))
		return len(found) > 0, err
	})
}

// purged at a time, so that others get their turn between.
const purged = 20

// Purge removes jobs that ended before a time, at most limit.
func (s *Store) Purge(ctx context.Context, before time.Time, limit int) (int, error) {
	total := 0
	for total < limit {
		n, err := write(ctx, s, "removing old jobs", func(tx Tx) (int, error) { return purge(tx, before, min(limit-total, purged)) })
		total += n
		if err != nil || n == 0 {
			return total, err
		}
	}
	return total, nil
}

func purge(tx Tx, before time.Time, limit int) (int, error) {
	old, err := rows(tx, scanJob, "SELECT "+jobColumns+" FROM jobs WHERE ended > 0 AND ended < $1 ORDER BY ended LIMIT $2"+skipLocked(tx),
		micros(before), limit)
	if err != nil {
		return 0, err
	}
	for _, j := range old {
		for _, repository := range repositories(j.Job) {
			if _, err := tx.Exec("DELETE FROM job_repositories WHERE repository = $1 AND state = $2 AND job = $3",
				text(repository), string(j.State), j.ID); err != nil {
				return 0, err
			}
		}
		if _, err := tx.Exec("DELETE FROM jobs WHERE id = $1", j.ID); err != nil { // and its events
			return 0, err
		}
	}
	return len(old), nil
}
