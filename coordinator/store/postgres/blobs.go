package postgres

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
)

// now is the server's clock, in microseconds.
const now = "(extract(epoch FROM clock_timestamp()) * 1000000)::bigint"

// sweeping is how many blobs are looked at at a time.
const sweeping = 1000

// MissingBlobs returns those that are not there, and keeps the others.
func (s *Store) MissingBlobs(ctx context.Context, tenant string, digests []string) ([]string, error) {
	for _, d := range digests {
		if err := sqlstore.CheckBlob(tenant, d, nil); err != nil {
			return nil, err
		}
	}
	there := map[string]bool{}
	err := s.db.Write(ctx, func(t sqlstore.Tx) error {
		clear(there)
		// Locked in one order, so that two callers cannot wait for each other.
		return t.Query(func(scan func(...any) error) error {
			var digest string
			err := scan(&digest)
			there[digest] = true
			return err
		}, `WITH kept AS (SELECT digest FROM blobs WHERE tenant = $1 AND digest = ANY($2::text[]) ORDER BY digest FOR UPDATE)
			UPDATE blobs SET used = `+now+` FROM kept WHERE blobs.tenant = $1 AND blobs.digest = kept.digest RETURNING blobs.digest`, tenant, digests)
	})
	if err != nil {
		return nil, fmt.Errorf("looking for blobs: %w", err)
	}
	var missing []string
	for _, d := range digests {
		if !there[d] {
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// PutBlob stores one, unless it is there.
func (s *Store) PutBlob(ctx context.Context, tenant, digest string, data []byte) error {
	if err := sqlstore.CheckBlob(tenant, digest, data); err != nil {
		return err
	}
	if data == nil {
		data = []byte{}
	}
	err := s.db.Write(ctx, func(t sqlstore.Tx) error {
		_, err := t.Exec("INSERT INTO blobs (tenant, digest, data, used) VALUES ($1, $2, $3, "+now+`)
			ON CONFLICT (tenant, digest) DO UPDATE SET used = excluded.used`, tenant, digest, data)
		return err
	})
	if err != nil {
		err = fmt.Errorf("storing blob %s: %w", digest, err)
	}
	return err
}

// Blob opens one, of which all is in memory.
func (s *Store) Blob(ctx context.Context, tenant, digest string) (io.ReadCloser, error) {
	if err := sqlstore.CheckBlob(tenant, digest, nil); err != nil {
		return nil, err
	}
	var data []byte
	found := false
	err := s.db.Read(ctx, func(t sqlstore.Tx) error {
		return t.Query(func(scan func(...any) error) error {
			found = true
			return scan(&data)
		}, "SELECT data FROM blobs WHERE tenant = $1 AND digest = $2", tenant, digest)
	})
	if err == nil && !found {
		err = store.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", digest, err)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

// blob names one that may be removed.
type blob struct{ tenant, digest string }

// SweepBlobs removes old ones that are not named.
func (s *Store) SweepBlobs(ctx context.Context, before time.Time, named func(tenant, digest string) bool) (freed int64, err error) {
	for last := (blob{}); ; {
		old, err := s.oldBlobs(ctx, before, last)
		if err != nil || len(old) == 0 {
			return freed, err
		}
		last = old[len(old)-1]
		for _, b := range old {
			if named(b.tenant, b.digest) {
				continue
			}
			size, err := s.removeBlob(ctx, before, b)
			if err != nil {
				return freed, err
			}
			freed += size
		}
	}
}

func (s *Store) oldBlobs(ctx context.Context, before time.Time, after blob) (old []blob, err error) {
	err = s.db.Read(ctx, func(t sqlstore.Tx) error {
		old = nil
		return t.Query(func(scan func(...any) error) error {
			var b blob
			err := scan(&b.tenant, &b.digest)
			old = append(old, b)
			return err
		}, `SELECT tenant, digest FROM blobs WHERE used < $1 AND (tenant, digest) > ($2, $3)
			ORDER BY tenant, digest LIMIT $4`, before.UnixMicro(), after.tenant, after.digest, sweeping)
	})
	if err != nil {
		err = fmt.Errorf("sweeping blobs: %w", err)
	}
	return old, err
}

// removeBlob removes one, unless it has been asked for meanwhile, and returns its size.
func (s *Store) removeBlob(ctx context.Context, before time.Time, b blob) (size int64, err error) {
	err = s.db.Write(ctx, func(t sqlstore.Tx) error {
		size = 0
		return t.Query(func(scan func(...any) error) error { return scan(&size) },
			"DELETE FROM blobs WHERE tenant = $1 AND digest = $2 AND used < $3 RETURNING octet_length(data)",
			b.tenant, b.digest, before.UnixMicro())
	})
	if err != nil {
		err = fmt.Errorf("sweeping blobs: %w", err)
	}
	return size, err
}
