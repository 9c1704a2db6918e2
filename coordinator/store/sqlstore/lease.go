package sqlstore

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// Claim leases jobs that have not ended and that nobody has a lease of.
func (s *Store) Claim(ctx context.Context, owner string, lease time.Duration, n int) ([]store.Claimed, error) {
	asked := time.Now()
	jobs, err := write(ctx, s, "claiming jobs", func(tx Tx) ([]job, error) { return claim(tx, owner, lease, page(n)) })
	if err != nil {
		return nil, err
	}
	var claimed []store.Claimed
	for _, j := range jobs {
		claimed = append(claimed, store.Claimed{
			Job:   j.Job,
			Lease: store.Lease{Job: j.ID, Epoch: j.epoch, Owner: owner, For: lease, Asked: asked},
		})
	}
	return claimed, nil
}

func claim(tx Tx, owner string, lease time.Duration, n int) ([]job, error) {
	now, err := tx.Now()
	if err != nil {
		return nil, err
	}
	ids, err := rows(tx, column[string], "SELECT id FROM jobs WHERE ended = 0 AND lease_until <= $1 ORDER BY priority DESC, id LIMIT $2"+skipLocked(tx),
		micros(now), n)
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	p := params{text(owner), leased(now, lease)}
	jobs, err := rows(tx, scanJob, "UPDATE jobs SET epoch = epoch + 1, coordinator = $1, lease_until = $2 WHERE "+
		in(&p, "id", ids)+" RETURNING "+strings.ReplaceAll(jobColumns, "jobs.", ""), p...)
	slices.SortFunc(jobs, func(a, b job) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), cmp.Compare(a.ID, b.ID))
	})
	return jobs, err
}

// Renew extends a lease.
func (s *Store) Renew(ctx context.Context, l store.Lease) (store.Lease, bool, error) {
	l.Asked = time.Now()
	cancel, err := write(ctx, s, "extending the lease of job "+l.Job, func(tx Tx) (bool, error) {
		now, err := tx.Now()
		if err != nil {
			return false, err
		}
		cancels, err := rows(tx, column[bool], `UPDATE jobs SET lease_until = $1 WHERE id = $2 AND epoch = $3 AND lease_until > $4
			RETURNING cancel_requested`, leased(now, l.For), l.Job, l.Epoch, micros(now))
		if err == nil && len(cancels) == 0 {
			err = store.ErrLeaseLost
		}
		return err == nil && cancels[0], err
	})
	return l, cancel, err
}

// Release gives a lease back.
func (s *Store) Release(ctx context.Context, l store.Lease) error {
	_, err := write(ctx, s, "giving back job "+l.Job, func(tx Tx) (int64, error) {
		now, err := tx.Now()
		if err != nil {
			return 0, err
		}
		n, err := tx.Exec("UPDATE jobs SET lease_until = 0 WHERE id = $1 AND epoch = $2 AND lease_until > $3", l.Job, l.Epoch, micros(now))
		if err == nil && n == 0 {
			err = store.ErrLeaseLost
		}
		return n, err
	})
	if err == nil {
		s.wakes.send(store.Wake{})
	}
	return err
}

// Update changes a job if the lease is still good.
func (s *Store) Update(ctx context.Context, l store.Lease, u store.Update) (int64, error) {
	j, err := write(ctx, s, "updating job "+l.Job, func(tx Tx) (job, error) {
		j, now, err := lock(tx, l.Job)
		switch {
		case err != nil:
			return job{}, err
		case j.epoch != l.Epoch || !j.held(now):
			return job{}, store.ErrLeaseLost
		}
		was := j.State
		if err := apply(&j, u, now); err != nil {
			return job{}, err
		}
		return j, save(tx, &j, was, u.Events, now)
	})
	if err != nil {
		return 0, err
	}
	s.wakes.send(store.Wake{Job: l.Job})
	return j.LastSeq, nil
}

// apply makes the job what the update says.
func apply(j *job, u store.Update, now time.Time) error {
	j.State, j.Digest, j.Error = cmp.Or(u.State, j.State), cmp.Or(u.Digest, j.Digest), cmp.Or(u.Error, j.Error)
	if u.State.Ended() {
		j.Error = u.Error
	}
	if u.State == store.Running {
		j.Started = cmp.Or(j.Started, stored(now))
	}
	for _, changed := range u.Legs {
		i := slices.IndexFunc(j.Legs, func(l store.Leg) bool { return l.Platform == changed.Platform })
		if i < 0 {
			return fmt.Errorf("it has no leg for %s", changed.Platform)
		}
		j.Legs[i] = changed
	}
	return nil
}
