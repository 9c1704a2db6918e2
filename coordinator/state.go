package coordinator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/archfarm/archfarm/coordinator/contexts"
	"github.com/archfarm/archfarm/coordinator/seal"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/postgres"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

// keyCheck is the name of what tells whether the key that the secrets in a store
// were sealed with is the one at hand. No tenant is called "".
const keyCheck = "key-check"

// state is what outlives the process: jobs, tags, secrets and contexts.
type state struct {
	store    store.Store
	key      *seal.Key
	contexts *contexts.Contexts
}

// openState opens the store that the configuration names.
func openState(ctx context.Context, cfg Config) (*state, error) {
	key, err := openKey(cfg)
	if err != nil {
		return nil, err
	}
	s, err := openStore(ctx, cfg)
	if err != nil {
		return nil, err
	}
	opened := &state{store: s, key: key}
	err = opened.checkKey(ctx)
	if err == nil {
		opened.contexts, err = contexts.New(s, filepath.Join(cfg.DataDir, "contexts"), contexts.Options{MaxContext: cfg.MaxContext})
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return opened, nil
}

func openStore(ctx context.Context, cfg Config) (store.Store, error) {
	switch {
	case cfg.Store == "":
		return sqlite.Open(ctx, sqlite.Options{Path: filepath.Join(cfg.DataDir, StoreFile), BlobDir: filepath.Join(cfg.DataDir, "blobs"), Log: cfg.Logger})
	case postgres.IsURL(cfg.Store):
		return postgres.Open(ctx, postgres.Options{URL: cfg.Store, Log: cfg.Logger})
	}
	return nil, errors.New("opening the store: --store is no postgres:// URL (it is not shown, as it may hold a password)")
}

// openKey makes the key of a store that nobody shares; one that several coordinators
// have must be there.
func openKey(cfg Config) (*seal.Key, error) {
	if cfg.SecretsKeyFile != "" {
		return seal.Load(cfg.SecretsKeyFile)
	}
	return seal.Open(filepath.Join(cfg.DataDir, "secrets.key"))
}

// checkKey refuses a store whose secrets another key has sealed.
func (s *state) checkKey(ctx context.Context) error {
	sealed, err := s.store.Secret(ctx, "", keyCheck)
	if errors.Is(err, store.ErrNotFound) {
		if sealed, err = s.key.Seal([]byte(keyCheck), []byte(keyCheck)); err != nil {
			return err
		}
		return s.store.PutSecret(ctx, "", keyCheck, sealed)
	}
	if err == nil {
		_, err = s.key.Unseal(sealed, []byte(keyCheck))
	}
	if err != nil {
		return fmt.Errorf("the secrets in the store cannot be read with %s: %w; coordinators that share a store need the same --secrets-key-file", cmp.Or(s.key.Path(), "the key"), err)
	}
	return nil
}

func (s *state) close() error {
	s.contexts.Close()
	if err := s.store.Close(); err != nil {
		return fmt.Errorf("closing the store: %w", err)
	}
	return nil
}
