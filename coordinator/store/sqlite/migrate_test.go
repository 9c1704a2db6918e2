package sqlite

import (
	"database/sql"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/archfarm/archfarm/coordinator/store/storetest"
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
		all, err := fs.Glob(steps, "*.sql")
		if err != nil {
			t.Fatal(err)
		}
		dumpTo(t, filepath.Join("testdata", fmt.Sprintf("schema-%03d.sql", len(all))))
	}
	for _, name := range storetest.CheckDumps(t, os.DirFS("testdata"), steps) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dump, err := os.ReadFile(filepath.Join("testdata", name))
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			db := raw(t, options(dir).Path)
			if _, err := db.ExecContext(t.Context(), string(dump)); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			s := openTest(t, dir)
			storetest.CheckFilled(t, s)
			if name == "schema-001.sql" { // the history came with the second
				storetest.FillBuilds(t, s)
			}
			storetest.CheckFilledBuilds(t, s)
		})
	}
}

func raw(t *testing.T, path string) *sql.DB {
	t.Helper()
	db, err := sql.Open("sqlite", dsn(path, "rwc"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return db
}

// dumpTo writes what makes a database with something of everything.
func dumpTo(t *testing.T, path string) {
	dir := t.TempDir()
	s := openTest(t, dir)
	storetest.Fill(t, s)
	storetest.FillBuilds(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	db := raw(t, options(dir).Path)
	column := func(query string) (all []string) {
		rows, err := db.QueryContext(t.Context(), query)
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close() //nolint:errcheck // Err tells
		for rows.Next() {
			var value string
			if err := rows.Scan(&value); err != nil {
				t.Fatal(err)
			}
			all = append(all, value)
		}
		if err := rows.Err(); err != nil {
			t.Fatal(err)
		}
		return all
	}
	dump := column("SELECT sql || ';' FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY type DESC, rowid")
	for _, table := range append(column("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY rowid"), "sqlite_sequence") {
		columns := column("SELECT name FROM pragma_table_info('" + table + "')")
		values := "quote(" + strings.Join(columns, ") || ', ' || quote(") + ")"
		if table == "sqlite_sequence" { // inserting has made rows in it
			dump = append(dump, "DELETE FROM sqlite_sequence;")
		}
		for _, row := range column("SELECT " + values + " FROM " + table) {
			dump = append(dump, fmt.Sprintf("INSERT INTO %s (%s) VALUES (%s);", table, strings.Join(columns, ", "), row))
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Join(dump, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}
