package coordinator

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/archfarm/archfarm/coordinator/contexts"
	"github.com/archfarm/archfarm/coordinator/gitref"
	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/coordinator/seal"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/postgres"
	"github.com/archfarm/archfarm/coordinator/store/sqlite"
)

const (
	// keyCheck is the name of what tells whether the key that the secrets in a store
	// were sealed with is the one at hand. No tenant is called "".
	keyCheck = "key-check"

	// pulse is how often the store is asked whether it is there, for at most answering.
	// It is away when it has been silent for as long as a PostgreSQL takes to restart.
	pulse     = 2 * time.Second
	answering = 5 * time.Second
	away      = 10 * time.Second
)

// state is what outlives the process: jobs, tags, secrets, contexts and the history.
type state struct {
	store    store.Store
	key      *seal.Key
	contexts *contexts.Contexts
	resolve  job.Resolve
	log      *slog.Logger
	answered atomic.Pointer[time.Time] // when the store did, last
}

// openState opens the store that the configuration names.
func openState(ctx context.Context, cfg Config, data *dataDir, metrics prometheus.Registerer) (*state, error) {
	key, err := openKey(cfg)
	if err != nil {
		return nil, err
	}
	s, err := openStore(ctx, cfg, countFailures(metrics))
	if err != nil {
		return nil, err
	}
	opened := &state{store: s, key: key, log: cfg.Logger}
	opened.heard()
	err = opened.checkKey(ctx)
	if err == nil {
		opened.contexts, err = contexts.New(s, filepath.Join(data.own, "contexts"), contexts.Options{MaxContext: cfg.MaxContext})
	}
	if err == nil {
		opened.resolve, err = gitref.In(filepath.Join(data.own, "git"))
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return opened, nil
}

func openStore(ctx context.Context, cfg Config, failed func(string)) (store.Store, error) {
	switch {
	case cfg.Store == "":
		return sqlite.Open(ctx, sqlite.Options{
			Path: filepath.Join(cfg.DataDir, StoreFile), BlobDir: filepath.Join(cfg.DataDir, "blobs"), Succeeds: cfg.succeeds(), Failed: failed, Log: cfg.Logger,
		})
	case postgres.IsURL(cfg.Store):
		return postgres.Open(ctx, postgres.Options{URL: cfg.Store, Failed: failed, Log: cfg.Logger})
	}
	return nil, errors.New("opening the store: --store is no postgres:// URL (it is not shown, as it may hold a password)")
}

// countFailures makes the metric of what the database gets wrong.
func countFailures(metrics prometheus.Registerer) func(operation string) {
	counter := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "archfarm_store_errors_total", Help: "Reads and writes that the database of jobs, tags, secrets and history has failed at, tries included.",
	}, []string{"operation"})
	for _, operation := range []string{"read", "write"} {
		counter.WithLabelValues(operation)
	}
	metrics.MustRegister(counter)
	return func(operation string) { counter.WithLabelValues(operation).Inc() }
}

// openKey makes the key of a store that nobody shares; one that several coordinators
// have must be there.
func openKey(cfg Config) (*seal.Key, error) {
	if cfg.SecretsKeyFile != "" {
		return seal.Load(cfg.SecretsKeyFile)
	}
	return seal.Open(keyFile(cfg))
}

func keyFile(cfg Config) string { return filepath.Join(cfg.DataDir, "secrets.key") }

// checkKey refuses a store whose secrets another key has sealed. What an older line of
// the key's file has sealed is sealed anew by the first, so that the line can go.
func (s *state) checkKey(ctx context.Context) error {
	sealed, err := s.store.Secret(ctx, "", keyCheck)
	if errors.Is(err, store.ErrNotFound) {
		if sealed, err = s.key.Seal([]byte(keyCheck), sealContext("", keyCheck)); err != nil {
			return err
		}
		return s.store.PutSecret(ctx, "", keyCheck, sealed)
	}
	if err == nil {
		_, err = s.key.Unseal(sealed, sealContext("", keyCheck))
	}
	if err != nil {
		return fmt.Errorf("the secrets in the store cannot be read with %s: %w; coordinators that share a store need the same --secrets-key-file, and \"archfarm secret forget\" gives up what a lost key has sealed", cmp.Or(s.key.Path(), "the key"), err)
	}
	return s.reseal(ctx)
}

func (s *state) reseal(ctx context.Context) error {
	err := s.store.ChangeSecrets(ctx, func(tenant, name string, sealed []byte) ([]byte, error) {
		anew, err := s.key.Reseal(sealed, sealContext(tenant, name))
		if err != nil {
			s.log.Warn("a stored secret cannot be opened: store it again", "tenant", tenant, "name", name, "error", err)
			return sealed, nil
		}
		if !bytes.Equal(anew, sealed) {
			s.log.Info("a stored secret is sealed with the first key from now on", "tenant", tenant, "name", name)
		}
		return anew, nil
	})
	if err != nil {
		return fmt.Errorf("sealing the stored secrets with the first key: %w", err)
	}
	return nil
}

// sealContext is what a row of secrets belongs to.
func sealContext(tenant, name string) []byte {
	if tenant == "" && name == keyCheck {
		return []byte(keyCheck)
	}
	return job.SecretSeal(tenant, name)
}

// StoredSecret names a secret that is stored for a tenant.
type StoredSecret struct{ Tenant, Name string }

// ForgetSecrets lists the stored secrets that no key at hand opens, and removes them if
// told to: with a lost key, no coordinator starts otherwise. It makes neither a store
// nor a key. Of SQLite, no coordinator may run.
func ForgetSecrets(ctx context.Context, cfg Config, remove bool) ([]StoredSecret, error) {
	key, err := seal.Load(cmp.Or(cfg.SecretsKeyFile, keyFile(cfg)))
	if err != nil {
		return nil, err
	}
	if cfg.Store == "" {
		if _, err := os.Stat(filepath.Join(cfg.DataDir, StoreFile)); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("there is no database in %s", cfg.DataDir)
		}
	}
	s, err := openStore(ctx, cfg, nil)
	if err != nil {
		return nil, err
	}
	lost := map[StoredSecret]bool{} // it may be asked more than once
	var out []StoredSecret
	err = s.ChangeSecrets(ctx, func(tenant, name string, sealed []byte) ([]byte, error) {
		if _, err := key.Unseal(sealed, sealContext(tenant, name)); err == nil {
			return sealed, nil
		}
		one := StoredSecret{tenant, name}
		if tenant != "" && !lost[one] {
			out = append(out, one)
		}
		lost[one] = true
		if remove {
			return nil, nil
		}
		return sealed, nil
	})
	return out, errors.Join(err, s.Close())
}

// heard notes that the store has answered.
func (s *state) heard() {
	now := time.Now()
	s.answered.Store(&now)
}

// silent is for how long the store has not answered; zero: it is there.
func (s *state) silent() time.Duration {
	if d := time.Since(*s.answered.Load()); d > away {
		return d.Round(time.Second)
	}
	return 0
}

// watch asks the store now and then whether it is there, until ctx ends.
func (s *state) watch(ctx context.Context) {
	ticker := time.NewTicker(pulse)
	defer ticker.Stop()
	for told := false; ; {
		asking, done := context.WithTimeout(ctx, answering)
		_, err := s.store.Secret(asking, "", keyCheck)
		done()
		switch {
		case ctx.Err() != nil:
			return
		case err == nil || errors.Is(err, store.ErrNotFound):
			s.heard()
			if told {
				s.log.Info("the store answers again")
			}
			told = false
		case !told && s.silent() > 0:
			s.log.Warn("the store does not answer: nothing is submitted, jobs rest, and this coordinator is not ready", "error", err)
			told = true
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func (s *state) close() error {
	s.contexts.Close()
	if err := s.store.Close(); err != nil {
		return fmt.Errorf("closing the store: %w", err)
	}
	return nil
}
