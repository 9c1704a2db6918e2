package sqlstore

import (
	"context"

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
