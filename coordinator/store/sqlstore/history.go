package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// together is how many rows are written, or named, by one statement.
const together = 100

const buildColumns = "ref, tenant, record, extent, pinned, completed, size"

func scanBuild(scan func(...any) error) (b store.Build, err error) {
	var completed int64
	err = scan(&b.Ref, &b.Tenant, &b.Record, &b.Extent, &b.Pinned, &completed, &b.Size)
	b.Completed = moment(completed)
	return b, err
}

// PutBuild creates or replaces a record.
func (s *Store) PutBuild(ctx context.Context, b store.Build) error {
	return s.changeBuild(ctx, b.Ref, func(tx Tx) error {
		had, err := namedBy(tx, b.Ref)
		if err != nil {
			return err
		}
		b.Blobs, b.Places = append([]string{}, b.Blobs...), append([]store.Place{}, b.Places...) // nil would leave what there was
		return putBuild(tx, b, had)
	})
}

// ChangeBuild replaces a record by what change makes of it.
func (s *Store) ChangeBuild(ctx context.Context, ref string, change func(*store.Build) error) error {
	return s.changeBuild(ctx, ref, func(tx Tx) error {
		b, err := one(tx, scanBuild, "SELECT "+buildColumns+" FROM builds WHERE ref = $1", text(ref))
		if err != nil {
			return err
		}
		had, err := namedBy(tx, ref)
		if err != nil {
			return err
		}
		if err := change(&b); err != nil {
			return err
		}
		b.Ref = ref
		return putBuild(tx, b, had)
	})
}

// changeBuild runs fn while nobody else changes the record.
func (s *Store) changeBuild(ctx context.Context, ref string, fn func(Tx) error) error {
	_, err := write(ctx, s, fmt.Sprintf("the record of build %q", ref), func(tx Tx) (struct{}, error) {
		if err := tx.Lock("build " + text(ref)); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, fn(tx)
	})
	return err
}

// namedBy are the blobs that a record names.
func namedBy(tx Tx, ref string) ([]string, error) {
	return rows(tx, column[string], "SELECT digest FROM build_names WHERE ref = $1", text(ref))
}

// putBuild writes a record that named the blobs in had until now.
func putBuild(tx Tx, b store.Build, had []string) error {
	if err := lockBlobs(tx, slices.Concat(had, b.Blobs)); err != nil {
		return err
	}
	if _, err := tx.Exec(`INSERT INTO builds (ref, tenant, record, extent, pinned, completed, size) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (ref) DO UPDATE SET tenant = excluded.tenant, record = excluded.record, extent = excluded.extent,
			pinned = excluded.pinned, completed = excluded.completed, size = excluded.size`,
		text(b.Ref), text(b.Tenant), b.Record, b.Extent, b.Pinned, micros(b.Completed), b.Size); err != nil {
		return err
	}
	if err := putPlaces(tx, b); err != nil || b.Blobs == nil {
		return err
	}
	if err := present(tx, b.Blobs); err != nil {
		return err
	}
	if _, err := tx.Exec("DELETE FROM build_names WHERE ref = $1", text(b.Ref)); err != nil {
		return err
	}
	var names [][]any
	for _, digest := range b.Blobs {
		names = append(names, []any{text(b.Ref), digest})
	}
	if err := insert(tx, "build_names (ref, digest)", names); err != nil {
		return err
	}
	return dropBlobs(tx, had)
}

func putPlaces(tx Tx, b store.Build) error {
	if b.Places == nil {
		return nil
	}
	if _, err := tx.Exec("DELETE FROM build_places WHERE ref = $1", text(b.Ref)); err != nil {
		return err
	}
	var places [][]any
	for _, p := range b.Places {
		places = append(places, []any{text(b.Ref), text(p.Digest), text(p.Worker)})
	}
	return insert(tx, "build_places (ref, digest, worker)", places)
}

// insert adds rows to a table, "name (columns)", unless they are there.
func insert(tx Tx, table string, all [][]any) error {
	for some := range slices.Chunk(all, together) {
		var p params
		values := make([]string, len(some))
		for i, row := range some {
			values[i] = "(" + list(&p, row) + ")"
		}
		if _, err := tx.Exec("INSERT INTO "+table+" VALUES "+strings.Join(values, ", ")+" ON CONFLICT DO NOTHING", p...); err != nil {
			return err
		}
	}
	return nil
}

// RemoveBuild removes a record, and what only it named.
func (s *Store) RemoveBuild(ctx context.Context, ref string) (store.Build, error) {
	var removed store.Build
	err := s.changeBuild(ctx, ref, func(tx Tx) error {
		had, err := namedBy(tx, ref)
		if err != nil {
			return err
		}
		if err := lockBlobs(tx, had); err != nil {
			return err
		}
		removed, err = one(tx, scanBuild, "DELETE FROM builds WHERE ref = $1 RETURNING "+buildColumns, text(ref))
		if err != nil {
			return err
		}
		return dropBlobs(tx, had)
	})
	return removed, err
}

// Build returns a record.
func (s *Store) Build(ctx context.Context, ref string) (store.Build, error) {
	return read(ctx, s, fmt.Sprintf("the record of build %q", ref), func(tx Tx) (store.Build, error) {
		return one(tx, scanBuild, "SELECT "+buildColumns+" FROM builds WHERE ref = $1", text(ref))
	})
}

// Builds returns records in the order of their references.
func (s *Store) Builds(ctx context.Context, after string, limit int) ([]store.Build, error) {
	return read(ctx, s, "listing the build history", func(tx Tx) ([]store.Build, error) {
		return rows(tx, scanBuild, "SELECT "+buildColumns+" FROM builds WHERE ref > $1 ORDER BY ref LIMIT $2", text(after), page(limit))
	})
}

// BuildSizes returns all records, without what is in them.
func (s *Store) BuildSizes(ctx context.Context) ([]store.Build, error) {
	return read(ctx, s, "listing the build history", func(tx Tx) ([]store.Build, error) {
		return rows(tx, scanBuild, "SELECT ref, tenant, NULL, NULL, pinned, completed, size FROM builds")
	})
}

// BuildPlaces returns the workers that have a blob.
func (s *Store) BuildPlaces(ctx context.Context, digest string) ([]string, error) {
	return read(ctx, s, "looking for content in the build history", func(tx Tx) ([]string, error) {
		return rows(tx, column[string], "SELECT DISTINCT worker FROM build_places WHERE digest = $1", text(digest))
	})
}

// lockBlobs keeps others from naming, holding or removing blobs. Whoever locks a
// record does so before.
func lockBlobs(tx Tx, digests []string) error {
	keys := []string{}
	for _, d := range digests {
		if key := "build blobs " + d[:min(len(d), len("sha256:0"))]; !slices.Contains(keys, key) { // of 16
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	return tx.Lock(keys...)
}

// present tells, by store.ErrNotFound, that one of the blobs is not there.
func present(tx Tx, digests []string) error {
	digests = slices.Compact(slices.Sorted(slices.Values(digests)))
	for some := range slices.Chunk(digests, together) {
		var p params
		n, err := one(tx, column[int], "SELECT count(*) FROM build_blobs WHERE complete AND "+in(&p, "digest", some), p...)
		if err != nil {
			return err
		}
		if n < len(some) {
			return fmt.Errorf("%d of the blobs that it names: %w", len(some)-n, store.ErrNotFound)
		}
	}
	return nil
}

// dropBlobs removes those of the blobs that nobody wants; they are locked.
func dropBlobs(tx Tx, digests []string) error {
	now, err := tx.Now()
	for some := range slices.Chunk(digests, together) {
		if err != nil {
			break
		}
		var p params
		_, err = tx.Exec("DELETE FROM build_blobs WHERE "+in(&p, "digest", some)+" AND "+unwanted(&p, now), p...)
	}
	return err
}

// unwanted is the condition that nobody names or holds a blob.
func unwanted(p *params, now time.Time) string {
	return `NOT EXISTS (SELECT 1 FROM build_names WHERE build_names.digest = build_blobs.digest)
		AND NOT EXISTS (SELECT 1 FROM build_holds WHERE build_holds.digest = build_blobs.digest AND until > ` + p.add(micros(now)) + ")"
}

// SweepBuildBlobs removes what nobody wants, some at a time.
func (s *Store) SweepBuildBlobs(ctx context.Context) error {
	const doing = "sweeping the build history"
	if _, err := write(ctx, s, doing, func(tx Tx) (int64, error) {
		now, err := tx.Now()
		if err != nil {
			return 0, err
		}
		return tx.Exec("DELETE FROM build_holds WHERE until <= $1", micros(now))
	}); err != nil {
		return err
	}
	for {
		found, err := read(ctx, s, doing, func(tx Tx) ([]string, error) {
			now, err := tx.Now()
			if err != nil {
				return nil, err
			}
			var p params
			return rows(tx, column[string], "SELECT digest FROM build_blobs WHERE "+unwanted(&p, now)+" LIMIT "+p.add(together), p...)
		})
		if err != nil || len(found) == 0 {
			return err
		}
		if _, err := write(ctx, s, doing, func(tx Tx) (struct{}, error) {
			return struct{}{}, errors.Join(lockBlobs(tx, found), dropBlobs(tx, found))
		}); err != nil || len(found) < together {
			return err
		}
	}
}
