package postgres

import (
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/archfarm/archfarm/coordinator/store/storetest"
	"github.com/archfarm/archfarm/coordinator/store/storetest/postgrestest"
)

var update = flag.Bool("update", false, "write the dump of the newest schema")

// TestMigrate opens a database of every schema there has been.
func TestMigrate(t *testing.T) {
	t.Parallel()
	steps, err := fs.Sub(migrations, "migrations")
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		dumpNewest(t, steps)
	}
	for _, name := range storetest.CheckDumps(t, os.DirFS("testdata"), steps) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dump, err := os.ReadFile(filepath.Join("testdata", name))
			if err != nil {
				t.Fatal(err)
			}
			server, database := postgrestest.Database(t)
			if err := server.Load(t.Context(), database, dump); err != nil {
				t.Fatal(err)
			}
			s := openTest(t, server.URL(database))
			storetest.CheckFilled(t, s)
			if name == "schema-001.sql" { // the history came with the second
				storetest.FillBuilds(t, s)
			}
			storetest.CheckFilledBuilds(t, s)
		})
	}
}

func dumpNewest(t *testing.T, steps fs.FS) {
	server, database := postgrestest.Database(t)
	s := openTest(t, server.URL(database))
	storetest.Fill(t, s)
	storetest.FillBuilds(t, s)
	all, err := fs.Glob(steps, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	dump, err := server.Dump(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("testdata", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join("testdata", fmt.Sprintf("schema-%03d.sql", len(all))), dump, 0o644); err != nil {
		t.Fatal(err)
	}
}
