package coordinator

import (
	"context"
	"encoding/hex"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/archfarm/archfarm/coordinator/job"
	"github.com/archfarm/archfarm/coordinator/seal"
	"github.com/archfarm/archfarm/coordinator/store"
)

// withKeys is a data folder's configuration whose file of keys has these lines.
func withKeys(t *testing.T, dir string, keys ...string) Config {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "secrets.key"), []byte(strings.Join(keys, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	return Config{DataDir: dir, Logger: slog.New(slog.DiscardHandler)}
}

func newKeyLine(first byte) string {
	key := make([]byte, 32)
	key[0] = first
	return hex.EncodeToString(key)
}

// within opens the state, and closes it when f is done.
func within(t *testing.T, cfg Config, f func(*state)) error {
	t.Helper()
	s, err := openState(t.Context(), cfg, &dataDir{own: cfg.DataDir}, prometheus.NewRegistry())
	if err != nil {
		return err
	}
	f(s)
	return s.close()
}

func TestState_AnOldKeyCanGoOnceTheCoordinatorHasStartedWithTheNewOne(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old, fresh := newKeyLine(1), newKeyLine(2)
	put := func(s *state) {
		sealed, err := s.key.Seal([]byte("hunter2"), job.SecretSeal("acme", "npm"))
		if err == nil {
			err = s.store.PutSecret(t.Context(), "acme", "npm", sealed)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := within(t, withKeys(t, dir, old), put); err != nil {
		t.Fatal(err)
	}
	if err := within(t, withKeys(t, dir, fresh), func(*state) {}); !errors.Is(err, seal.ErrOtherKey) || !strings.Contains(err.Error(), "archfarm secret forget") {
		t.Fatalf("with another key alone: %v", err)
	}
	for _, keys := range [][]string{{fresh, old}, {fresh}} {
		if err := within(t, withKeys(t, dir, keys...), func(s *state) {
			sealed, err := s.store.Secret(t.Context(), "acme", "npm")
			if err != nil {
				t.Fatal(err)
			}
			if got, err := s.key.Unseal(sealed, job.SecretSeal("acme", "npm")); err != nil || string(got) != "hunter2" {
				t.Errorf("with %d keys: %q, %v", len(keys), got, err)
			}
		}); err != nil {
			t.Errorf("with %d keys: %v", len(keys), err)
		}
	}
}

func TestForgetSecrets_GivesUpWhatALostKeyHasSealed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	kept, lost := newKeyLine(1), newKeyLine(2)
	put := func(name string) func(*state) {
		return func(s *state) {
			sealed, err := s.key.Seal([]byte("hunter2"), job.SecretSeal("acme", name))
			if err == nil {
				err = s.store.PutSecret(t.Context(), "acme", name, sealed)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := within(t, withKeys(t, dir, lost), put("gone")); err != nil {
		t.Fatal(err)
	}
	cfg := withKeys(t, dir, kept)
	want := []StoredSecret{{"acme", "gone"}}
	if got, err := ForgetSecrets(t.Context(), cfg, false); err != nil || !slices.Equal(got, want) {
		t.Fatalf("asked only: %v, %v", got, err)
	}
	if err := within(t, cfg, func(*state) {}); !errors.Is(err, seal.ErrOtherKey) {
		t.Fatalf("asking has changed something: %v", err)
	}
	if got, err := ForgetSecrets(t.Context(), cfg, true); err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v, %v", got, err)
	}
	if err := within(t, cfg, func(s *state) {
		if left, err := s.store.ListSecrets(t.Context(), "acme"); err != nil || len(left) != 0 {
			t.Errorf("left: %v, %v", left, err)
		}
		put("new")(s)
	}); err != nil {
		t.Errorf("it does not start: %v", err)
	}
	if got, err := ForgetSecrets(t.Context(), cfg, true); err != nil || len(got) != 0 {
		t.Errorf("what can be opened is forgotten: %v, %v", got, err)
	}
}

func TestForgetSecrets_MakesNothing(t *testing.T) {
	t.Parallel()
	for what, cfg := range map[string]Config{
		"no key":      {DataDir: t.TempDir()},
		"no database": withKeys(t, t.TempDir(), newKeyLine(1)),
	} {
		before, err := os.ReadDir(cfg.DataDir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ForgetSecrets(t.Context(), cfg, true); err == nil {
			t.Errorf("%s: no error", what)
		}
		if after, err := os.ReadDir(cfg.DataDir); err != nil || len(after) != len(before) {
			t.Errorf("%s: there are %v, %v", what, after, err)
		}
	}
}

// deaf is a store that answers unless it is away.
type deaf struct {
	store.Store
	away atomic.Bool
}

func (d *deaf) Secret(ctx context.Context, _, _ string) ([]byte, error) {
	if d.away.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, store.ErrNotFound
}

func TestState_NoticesThatTheStoreIsAwayAndBack(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := &deaf{}
		s := &state{store: d, log: slog.New(slog.DiscardHandler)}
		s.heard()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { s.watch(ctx); close(ended) }()
		for _, step := range []struct {
			away   bool
			silent bool
		}{{false, false}, {true, true}, {true, true}, {false, false}} {
			d.away.Store(step.away)
			time.Sleep(away + answering + pulse)
			if got := s.silent() > 0; got != step.silent {
				t.Errorf("away %v: silent %v", step.away, got)
			}
		}
		d.away.Store(true)
		time.Sleep(away - answering)
		if s.silent() > 0 {
			t.Error("it is called away before it has been silent for long")
		}
		cancel()
		<-ended
	})
}

func TestWeb_IsNotReadyWhileTheStoreIsSilent(t *testing.T) {
	t.Parallel()
	c, get := served(t, Config{HTTP: "127.0.0.1:0"})
	then := c.state.answered.Load().Add(-away - pulse)
	c.state.answered.Store(&then)
	if code, body := get(http.MethodGet, "/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "store") {
		t.Errorf("%d %q", code, body)
	}
	if code, _ := get(http.MethodGet, "/healthz"); code != http.StatusOK {
		t.Errorf("it is not healthy: %d", code)
	}
	c.state.heard()
	if code, body := get(http.MethodGet, "/readyz"); code != http.StatusOK {
		t.Errorf("once it answers: %d %q", code, body)
	}
	if _, body := get(http.MethodGet, "/metrics"); !strings.Contains(body, `archfarm_store_errors_total{operation="write"} 0`) {
		t.Error("the store's errors are not counted from 0")
	}
}

func TestOwner_DiffersAtEachStart(t *testing.T) {
	t.Parallel()
	first, _ := served(t, Config{Name: "farm", HTTP: "127.0.0.1:0"})
	second, _ := served(t, Config{Name: "farm", HTTP: "127.0.0.1:0"})
	if a, b := first.publisher.Owner, second.publisher.Owner; a == b || !strings.HasPrefix(a, "farm/") {
		t.Errorf("leases of publications are %q's and %q's", a, b)
	}
}
