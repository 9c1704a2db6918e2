package postgres

import (
	"flag"
	"testing"

	"go.uber.org/goleak"

	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
)

func TestMain(m *testing.M) {
	// A step takes a hundred times as long as in a model without a database; SQLite's
	// tests go through more of them. The command line overrides it.
	_ = flag.Set("rapid.checks", "20")
	goleak.VerifyTestMain(postgrestest.M{Tests: m})
}
