package postgres

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
)

func TestFailed_TellsOfADatabaseThatIsAway(t *testing.T) {
	t.Parallel()
	server, err := postgrestest.Start(t.Context())
	postgrestest.Require(t, err)
	defer func() {
		if err := server.Stop(); err != nil {
			t.Error(err)
		}
	}()
	name, err := server.Database(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var told []string
	failed := func(operation string) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, operation)
	}
	s, err := Open(t.Context(), Options{URL: server.URL(name), Failed: failed})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	ctx := context.WithoutCancel(t.Context())
	if _, err := s.Secret(ctx, "acme", "none"); !errors.Is(err, store.ErrNotFound) || len(told) != 0 {
		t.Errorf("an answer: %v, told %q", err, told)
	}
	if err := server.Halt(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Secret(ctx, "acme", "none"); err == nil {
		t.Error("it reads")
	}
	if err := s.PutSecret(ctx, "acme", "npm", []byte("sealed")); err == nil {
		t.Error("it writes")
	}
	if _, err := s.MissingBlobs(ctx, "acme", nil); err == nil {
		t.Error("it looks for blobs")
	}
	if want := []string{"read", "write", "write"}; !slices.Equal(told, want) {
		t.Errorf("told %q, want %q", told, want)
	}
}
