package postgres

import (
	"testing"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/storetest"
	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
)

func openTest(t testing.TB, address string) *Store {
	t.Helper()
	s, err := Open(t.Context(), Options{URL: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s.(*Store)
}

func TestStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t testing.TB) store.Store {
		server, name := postgrestest.Database(t)
		return openTest(t, server.URL(name))
	})
}
