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

// publication is a row of publications, with its bindings.
type publication struct {
	store.Publication
	pending           int
	owner             string
	epoch, leaseUntil int64
}

// leasedPublication is what those return that lease one.
type leasedPublication struct {
	publication store.Publication
	lease       store.Lease
}

const publicationColumns = "id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending, owner, epoch, lease_until"

func scanPublication(scan func(...any) error) (p publication, err error) {
	var from string
	var created int64
	if err := scan(&p.ID, &p.Tenant, &p.Job, &p.Build, &p.Digest, &p.MediaType, &p.Blob, &p.Insecure, &from, &created,
		&p.pending, &p.owner, &p.epoch, &p.leaseUntil); err != nil {
		return publication{}, err
	}
	p.Created = moment(created)
	if p.Source, err = decodeSource(from); err != nil {
		return publication{}, fmt.Errorf("publication %s: %w: %w", p.ID, store.ErrCorrupt, err)
	}
	return p, nil
}

const bindingColumns = "id, publication, repository, tag, digest, immutable, state, bound, ended, job, build, tenant, source"

func scanBinding(scan func(...any) error) (b store.Binding, err error) {
	var from string
	var bound, ended int64
	if err := scan(&b.ID, &b.Publication, &b.Repository, &b.Tag, &b.Digest, &b.Immutable, &b.State, &bound, &ended,
		&b.Job, &b.Build, &b.Tenant, &from); err != nil {
		return store.Binding{}, err
	}
	b.Bound, b.Ended = moment(bound), moment(ended)
	if b.Source, err = decodeSource(from); err != nil {
		return store.Binding{}, fmt.Errorf("binding %d: %w: %w", b.ID, store.ErrCorrupt, err)
	}
	return b, nil
}

// Bind creates a publication and its bindings, or leases the one that is there.
func (s *Store) Bind(ctx context.Context, p store.Publication, owner string, lease time.Duration, decide store.Decide) (store.Publication, store.Lease, error) {
	if err := complete(p); err != nil {
		return store.Publication{}, store.Lease{}, fmt.Errorf("binding tags: %w", err)
	}
	asked := time.Now()
	// What decide answers is the caller's to explain: it is not wrapped.
	got, err := write(ctx, s, "", func(tx Tx) (leasedPublication, error) {
		if err := tx.Lock(locks(p)...); err != nil {
			return leasedPublication{}, err
		}
		there, err := lockPublication(tx, p.ID)
		if errors.Is(err, store.ErrNotFound) {
			there, err = bind(tx, p, decide)
		} else if err == nil {
			err = mayTake(tx, there, owner)
		}
		if err != nil {
			return leasedPublication{}, err
		}
		return take(tx, there, owner, lease, asked)
	})
	if err != nil {
		return store.Publication{}, store.Lease{}, err
	}
	return got.publication, got.lease, nil
}

// complete says what a publication lacks.
func complete(p store.Publication) error {
	if p.ID == "" || p.Digest == "" {
		return errors.New("the publication has no id or no digest")
	}
	seen := map[[2]string]bool{}
	for _, b := range p.Bindings {
		name := [2]string{b.Repository, b.Tag}
		if b.Repository == "" || b.Tag == "" || seen[name] {
			return fmt.Errorf("the tag %q of %q is incomplete, or is there twice", b.Tag, b.Repository)
		}
		seen[name] = true
	}
	return nil
}

// locks are the keys that serialise bindings, in an order that cannot deadlock.
func locks(p store.Publication) []string {
	keys := []string{"publication " + p.ID}
	for _, b := range p.Bindings {
		keys = append(keys, "tag "+b.Repository+":"+b.Tag)
	}
	slices.Sort(keys)
	return keys
}

// bind creates a publication whose tags are locked.
func bind(tx Tx, p store.Publication, decide store.Decide) (publication, error) {
	now, err := tx.Now()
	if err != nil {
		return publication{}, err
	}
	p.Created = stored(cmp.Or(p.Created, now))
	p.Source.CommitTime = stored(p.Source.CommitTime)
	p.Bindings = slices.Clone(p.Bindings)
	from, err := encodeSource(p.Source)
	if err != nil {
		return publication{}, err
	}
	if _, err := tx.Exec(`INSERT INTO publications (id, tenant, job, build, digest, media_type, blob, insecure, source, created, pending)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)`,
		p.ID, text(p.Tenant), text(p.Job), text(p.Build), p.Digest, p.MediaType, p.Blob, p.Insecure, from, micros(p.Created), len(p.Bindings)); err != nil {
		return publication{}, err
	}
	for i := range p.Bindings {
		b := &p.Bindings[i]
		b.Publication, b.Digest, b.State, b.Bound, b.Ended = p.ID, cmp.Or(b.Digest, p.Digest), store.Pending, stored(now), time.Time{}
		b.Job, b.Build, b.Tenant, b.Source = p.Job, p.Build, p.Tenant, p.Source
		if err := bindTag(tx, b, from, decide); err != nil {
			return publication{}, err
		}
	}
	return publication{Publication: p, pending: len(p.Bindings)}, nil
}

// bindTag binds one, unless somebody else does, or decide is against it.
func bindTag(tx Tx, b *store.Binding, from string, decide store.Decide) error {
	// Pending first: as long as the tag is locked, nothing new can be pending, so what
	// is current afterwards stays so.
	holder, err := one(tx, scanBinding, "SELECT "+bindingColumns+" FROM bindings WHERE repository = $1 AND tag = $2 AND state = 'pending'",
		text(b.Repository), text(b.Tag))
	if err == nil {
		return &store.BusyError{Holder: holder}
	}
	var current *store.Binding
	if errors.Is(err, store.ErrNotFound) {
		var last store.Binding
		if last, err = currentBinding(tx, b.Repository, b.Tag); err == nil {
			current = &last
		}
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if decide != nil {
		if err := decide(*b, current); err != nil {
			return err
		}
	}
	b.ID, err = one(tx, column[int64], `INSERT INTO bindings (publication, repository, tag, digest, immutable, state, bound, job, build, tenant, source)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING id`,
		b.Publication, text(b.Repository), text(b.Tag), b.Digest, b.Immutable, string(b.State), micros(b.Bound), text(b.Job), text(b.Build), text(b.Tenant), from)
	return err
}

func currentBinding(tx Tx, repository, tag string) (store.Binding, error) {
	return one(tx, scanBinding, "SELECT "+bindingColumns+` FROM bindings WHERE repository = $1 AND tag = $2 AND state = 'published'
		ORDER BY id DESC LIMIT 1`, text(repository), text(tag))
}

// mayTake says why the owner may not lease a publication, if so.
func mayTake(tx Tx, p publication, owner string) error {
	now, err := tx.Now()
	if err == nil && p.owner != owner && p.leaseUntil > micros(now) {
		err = fmt.Errorf("publication %s is %s's: %w", p.ID, p.owner, store.ErrLeaseLost)
	}
	return err
}

// take leases a locked publication.
func take(tx Tx, p publication, owner string, lease time.Duration, asked time.Time) (leasedPublication, error) {
	now, err := tx.Now()
	if err != nil {
		return leasedPublication{}, err
	}
	_, err = tx.Exec("UPDATE publications SET epoch = epoch + 1, owner = $1, lease_until = $2 WHERE id = $3", text(owner), leased(now, lease), p.ID)
	return leasedPublication{p.Publication, store.Lease{Job: p.ID, Epoch: p.epoch + 1, Owner: owner, For: lease, Asked: asked}}, err
}

// lockPublication returns a publication, with its bindings, which nobody else
// changes until the transaction ends.
func lockPublication(tx Tx, id string) (publication, error) {
	p, err := one(tx, scanPublication, "SELECT "+publicationColumns+" FROM publications WHERE id = $1"+forUpdate(tx), text(id))
	if err != nil {
		return publication{}, err
	}
	p.Bindings, err = bindingsOf(tx, p.ID)
	return p, err
}

func bindingsOf(tx Tx, publication string) ([]store.Binding, error) {
	return rows(tx, scanBinding, "SELECT "+bindingColumns+" FROM bindings WHERE publication = $1 ORDER BY id", publication)
}

// RenewPublication extends a lease.
func (s *Store) RenewPublication(ctx context.Context, l store.Lease) (store.Lease, error) {
	l.Asked = time.Now()
	_, err := write(ctx, s, "extending the lease of publication "+l.Job, func(tx Tx) (int64, error) {
		now, err := tx.Now()
		if err != nil {
			return 0, err
		}
		n, err := tx.Exec("UPDATE publications SET lease_until = $1 WHERE id = $2 AND epoch = $3 AND lease_until > $4",
			leased(now, l.For), l.Job, l.Epoch, micros(now))
		if err == nil && n == 0 {
			err = store.ErrLeaseLost
		}
		return n, err
	})
	return l, err
}

// Settle ends bindings that are pending.
func (s *Store) Settle(ctx context.Context, l store.Lease, states map[int64]store.BindingState) error {
	for id, state := range states {
		if state != store.Published && state != store.Undone {
			return fmt.Errorf("settling publication %s: binding %d cannot become %q", l.Job, id, state)
		}
	}
	p, err := write(ctx, s, "settling publication "+l.Job, func(tx Tx) (publication, error) {
		p, err := lockPublication(tx, l.Job)
		if errors.Is(err, store.ErrNotFound) {
			err = store.ErrLeaseLost
		}
		if err != nil {
			return publication{}, err
		}
		now, err := tx.Now()
		if err == nil && (p.epoch != l.Epoch || p.leaseUntil <= micros(now)) {
			err = store.ErrLeaseLost
		}
		if err != nil {
			return publication{}, err
		}
		return p, settle(tx, p, states, now)
	})
	if err == nil && p.Job != "" {
		s.wakes.send(store.Wake{Job: p.Job})
	}
	return err
}

func settle(tx Tx, p publication, states map[int64]store.BindingState, now time.Time) error {
	for _, b := range p.Bindings {
		state, settled := states[b.ID]
		if !settled || b.State != store.Pending {
			continue
		}
		if _, err := tx.Exec("UPDATE bindings SET state = $1, ended = $2 WHERE id = $3", string(state), micros(now), b.ID); err != nil {
			return err
		}
		p.pending--
	}
	if p.pending > 0 {
		_, err := tx.Exec("UPDATE publications SET pending = $1 WHERE id = $2", p.pending, p.ID)
		return err
	}
	_, err := tx.Exec("UPDATE publications SET pending = 0, blob = NULL, lease_until = 0 WHERE id = $1", p.ID)
	return err
}

// Abandoned leases a publication that is pending and that nobody has a lease of.
func (s *Store) Abandoned(ctx context.Context, owner string, lease time.Duration, jobs bool) (store.Publication, store.Lease, error) {
	asked := time.Now()
	got, err := write(ctx, s, "looking for abandoned publications", func(tx Tx) (leasedPublication, error) {
		now, err := tx.Now()
		if err != nil {
			return leasedPublication{}, err
		}
		p, err := one(tx, scanPublication, "SELECT "+publicationColumns+` FROM publications
			WHERE pending > 0 AND lease_until <= $1 AND (job <> '') = $2 ORDER BY num LIMIT 1`+skipLocked(tx), micros(now), jobs)
		if err != nil {
			return leasedPublication{}, err
		}
		if p.Bindings, err = bindingsOf(tx, p.ID); err != nil {
			return leasedPublication{}, err
		}
		return take(tx, p, owner, lease, asked)
	})
	return got.publication, got.lease, err
}

// Takeover leases one publication whose lease has ended.
func (s *Store) Takeover(ctx context.Context, id, owner string, lease time.Duration) (store.Publication, store.Lease, error) {
	asked := time.Now()
	got, err := write(ctx, s, "taking over publication "+id, func(tx Tx) (leasedPublication, error) {
		p, err := lockPublication(tx, id)
		if err != nil {
			return leasedPublication{}, err
		}
		now, err := tx.Now()
		switch {
		case err != nil:
			return leasedPublication{}, err
		case p.pending == 0:
			return leasedPublication{}, fmt.Errorf("nothing of it is pending: %w", store.ErrNotFound)
		case p.leaseUntil > micros(now):
			return leasedPublication{}, fmt.Errorf("it is %s's: %w", p.owner, store.ErrLeaseLost)
		}
		return take(tx, p, owner, lease, asked)
	})
	return got.publication, got.lease, err
}

// PublicationOf returns the latest publication of a job.
func (s *Store) PublicationOf(ctx context.Context, job string) (store.Publication, error) {
	return read(ctx, s, "the publication of job "+job, func(tx Tx) (store.Publication, error) {
		p, err := one(tx, scanPublication, "SELECT "+publicationColumns+" FROM publications WHERE job = $1 AND job <> '' ORDER BY num DESC LIMIT 1", text(job))
		if err == nil {
			p.Bindings, err = bindingsOf(tx, p.ID)
		}
		return p.Publication, err
	})
}

// Bindings returns those of a repository, or of one tag of it, the newest first.
func (s *Store) Bindings(ctx context.Context, tenants []string, repository, tag string, before int64, limit int) ([]store.Binding, error) {
	if tenants != nil && len(tenants) == 0 {
		return nil, nil
	}
	var p params
	query := "SELECT " + bindingColumns + " FROM bindings WHERE repository = " + p.add(text(repository))
	if tag != "" {
		query += " AND tag = " + p.add(text(tag))
	}
	if tenants != nil {
		query += " AND " + in(&p, "tenant", texts(tenants))
	}
	if before > 0 {
		query += " AND id < " + p.add(before)
	}
	query += " ORDER BY id DESC LIMIT " + p.add(page(limit))
	return read(ctx, s, "the tags of "+repository, func(tx Tx) ([]store.Binding, error) {
		return rows(tx, scanBinding, query, p...)
	})
}

// Current returns the binding of a tag that was published last.
func (s *Store) Current(ctx context.Context, repository, tag string) (store.Binding, error) {
	return read(ctx, s, repository+":"+tag, func(tx Tx) (store.Binding, error) { return currentBinding(tx, repository, tag) })
}
