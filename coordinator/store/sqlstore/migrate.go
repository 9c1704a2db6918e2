package sqlstore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
)

// ErrSchema is of a database and a program that do not go together.
var ErrSchema = errors.New("the database's schema is not this program's")

// Migration is a step from one schema to the next.
type Migration struct {
	Version int // from 1, without gaps
	Name    string
	SQL     string
	Hash    string // of SQL
}

// Migrations reads files like 001_jobs.sql. A released one is never changed: its
// hash is in the databases that it made.
func Migrations(files fs.FS) ([]Migration, error) {
	names, err := fs.Glob(files, "*.sql")
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	var all []Migration
	for i, name := range names {
		number, _, _ := strings.Cut(name, "_")
		if version, err := strconv.Atoi(number); err != nil || version != i+1 {
			return nil, fmt.Errorf("migration %s: it should begin with %03d_", name, i+1)
		}
		data, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		hash := sha256.Sum256(data)
		all = append(all, Migration{Version: i + 1, Name: name, SQL: string(data), Hash: hex.EncodeToString(hash[:])})
	}
	return all, nil
}

// Migrate brings the schema to the last of the migrations, each in a transaction
// that begins with a lock, as another coordinator may be doing the same. It never
// goes back: a database that a newer program has changed is ErrSchema.
func Migrate(ctx context.Context, engine Engine, migrations []Migration) error {
	err := engine.Write(ctx, func(tx Tx) error {
		if err := tx.Lock("schema"); err != nil { // creating a table at the same time fails
			return err
		}
		_, err := tx.Exec(`CREATE TABLE IF NOT EXISTS schema_migrations (
			version INTEGER PRIMARY KEY,
			name TEXT NOT NULL,
			hash TEXT NOT NULL,
			applied BIGINT NOT NULL
		)`)
		return err
	})
	for done := false; err == nil && !done; {
		err = engine.Write(ctx, func(tx Tx) (err error) {
			done, err = step(tx, migrations)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("bringing the database's schema up to date: %w", err)
	}
	return nil
}

// step applies the next migration, unless all have been.
func step(tx Tx, migrations []Migration) (done bool, err error) {
	if err := tx.Lock("schema"); err != nil {
		return false, err
	}
	applied, err := rows(tx, func(scan func(...any) error) (m Migration, err error) {
		return m, scan(&m.Version, &m.Name, &m.Hash)
	}, "SELECT version, name, hash FROM schema_migrations ORDER BY version")
	if err != nil {
		return false, err
	}
	for i, had := range applied {
		switch {
		case had.Version > len(migrations):
			return false, fmt.Errorf("%w: a newer archfarm has brought it to version %d (%s), this one knows %d: run the newer one, or restore a copy from before",
				ErrSchema, applied[len(applied)-1].Version, applied[len(applied)-1].Name, len(migrations))
		case had.Version != i+1:
			return false, fmt.Errorf("%w: migration %d has not been applied, but later ones have", ErrSchema, i+1)
		case had.Hash != migrations[i].Hash:
			return false, fmt.Errorf("%w: it was made with another %s (%s) than this program's (%s): run the program that made it",
				ErrSchema, had.Name, had.Hash, migrations[i].Hash)
		}
	}
	if len(applied) == len(migrations) {
		return true, nil
	}
	next := migrations[len(applied)]
	for _, statement := range statements(next.SQL) {
		if _, err := tx.Exec(statement); err != nil {
			return false, fmt.Errorf("migration %s: %w", next.Name, err)
		}
	}
	now, err := tx.Now()
	if err != nil {
		return false, err
	}
	_, err = tx.Exec("INSERT INTO schema_migrations (version, name, hash, applied) VALUES ($1, $2, $3, $4)",
		next.Version, next.Name, next.Hash, micros(now))
	return false, err
}

// statements are those of a migration, which end with ";" at the end of a line.
func statements(sql string) []string {
	var all []string
	for statement := range strings.SplitSeq(sql, ";\n") {
		if statement = strings.TrimSpace(statement); statement != "" {
			all = append(all, statement)
		}
	}
	return all
}
