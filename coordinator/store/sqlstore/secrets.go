package sqlstore

import (
	"bytes"
	"context"
	"errors"

	"github.com/archfarm/archfarm/coordinator/store"
)

// PutSecret creates or replaces a secret.
func (s *Store) PutSecret(ctx context.Context, tenant, name string, sealed []byte) error {
	_, err := write(ctx, s, "storing secret "+name, func(tx Tx) (int64, error) {
		now, err := tx.Now()
		if err != nil {
			return 0, err
		}
		return tx.Exec(`INSERT INTO secrets (tenant, name, sealed, updated) VALUES ($1, $2, $3, $4)
			ON CONFLICT (tenant, name) DO UPDATE SET sealed = excluded.sealed, updated = excluded.updated`,
			text(tenant), text(name), sealed, micros(now))
	})
	return err
}

// Secret returns a sealed secret.
func (s *Store) Secret(ctx context.Context, tenant, name string) ([]byte, error) {
	return read(ctx, s, "secret "+name, func(tx Tx) ([]byte, error) {
		return one(tx, column[[]byte], "SELECT sealed FROM secrets WHERE tenant = $1 AND name = $2", text(tenant), text(name))
	})
}

// ListSecrets returns what there is, by name.
func (s *Store) ListSecrets(ctx context.Context, tenant string) ([]store.SecretInfo, error) {
	return read(ctx, s, "listing secrets", func(tx Tx) ([]store.SecretInfo, error) {
		return rows(tx, func(scan func(...any) error) (info store.SecretInfo, err error) {
			var updated int64
			err = scan(&info.Name, &updated)
			info.Updated = moment(updated)
			return info, err
		}, "SELECT name, updated FROM secrets WHERE tenant = $1 ORDER BY name", text(tenant))
	})
}

// DeleteSecret removes a secret.
func (s *Store) DeleteSecret(ctx context.Context, tenant, name string) error {
	_, err := write(ctx, s, "deleting secret "+name, func(tx Tx) (int64, error) {
		n, err := tx.Exec("DELETE FROM secrets WHERE tenant = $1 AND name = $2", text(tenant), text(name))
		if err == nil && n == 0 {
			err = store.ErrNotFound
		}
		return n, err
	})
	return err
}

// ChangeSecrets replaces secrets, one after the other: together they may be large.
func (s *Store) ChangeSecrets(ctx context.Context, change func(tenant, name string, sealed []byte) ([]byte, error)) error {
	type key struct{ tenant, name string }
	all, err := read(ctx, s, "listing secrets", func(tx Tx) ([]key, error) {
		return rows(tx, func(scan func(...any) error) (k key, err error) {
			err = scan(&k.tenant, &k.name)
			return k, err
		}, "SELECT tenant, name FROM secrets ORDER BY tenant, name")
	})
	for i := 0; i < len(all) && err == nil; i++ {
		k := all[i]
		_, err = write(ctx, s, "", func(tx Tx) (int64, error) {
			sealed, err := one(tx, column[[]byte], "SELECT sealed FROM secrets WHERE tenant = $1 AND name = $2"+forUpdate(tx), k.tenant, k.name)
			if errors.Is(err, store.ErrNotFound) { // deleted meanwhile
				return 0, nil
			}
			if err != nil {
				return 0, err
			}
			changed, err := change(k.tenant, k.name, sealed)
			switch {
			case err != nil:
				return 0, err
			case changed == nil:
				return tx.Exec("DELETE FROM secrets WHERE tenant = $1 AND name = $2", k.tenant, k.name)
			case bytes.Equal(changed, sealed):
				return 0, nil
			}
			return tx.Exec("UPDATE secrets SET sealed = $1 WHERE tenant = $2 AND name = $3", changed, k.tenant, k.name)
		})
	}
	return err
}
