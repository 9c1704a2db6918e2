// Package sqlite keeps the coordinator's state in one file, for one coordinator, and
// while one takes over from another (Options.Succeeds) for both: they come to blows
// over nothing but who writes first, as all rules are conditions of the statements.
//
// All changes are made by one goroutine, which commits what has come together
// meanwhile at once: many callers share one flush of the disk. Readers have their own
// connections, and see what has been committed (https://www.sqlite.org/wal.html).
package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	sqlite3 "modernc.org/sqlite"
	sqlite3lib "modernc.org/sqlite/lib"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
	"github.com/archfarm/archfarm/file"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Options say where the state is.
type Options struct {
	// Path of the database. Beside it are Path-wal and Path-shm while it is open or
	// after a crash, which belong to it, and Path.lock.
	Path string
	// BlobDir is the folder for blobs.
	BlobDir string
	// Succeeds tells that the process that has the database open shares it (Store.Share):
	// its leases and holds stay.
	Succeeds bool
	// Failed is told when the database has failed, by "read" or "write"; may be nil, and
	// called concurrently.
	Failed func(operation string)
	// Log may be nil.
	Log *slog.Logger
}

// Store is the state in a SQLite database, and a folder of blobs.
type Store struct {
	*sqlstore.Store
	blobs
	path   string
	lock   *file.Lock
	engine *engine
	close  func() error // once
}

var (
	_ store.Store    = (*Store)(nil)
	_ store.Backuper = (*Store)(nil)
)

// Open makes the database if it is not there, and brings its schema up to date.
// Only one process can have it open, but for a successor. One that is damaged is
// store.ErrCorrupt, and the error says what to do.
//
// Unless it succeeds, leases, and holds of blobs, that are left in it are ended:
// whoever had them was this database's only coordinator, and has gone.
func Open(ctx context.Context, o Options) (store.Store, error) {
	s, err := open(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("opening the database %s: %w", o.Path, advice(err, o.Path))
	}
	return s, nil
}

// advice tells how to go on with a damaged database.
func advice(err error, path string) error {
	if !errors.Is(err, store.ErrCorrupt) {
		return err
	}
	return fmt.Errorf("%w; nothing has been changed: move %s, %s-wal and %s-shm away, all three, put a copy that `archfarm backup` made in the place of the first, and start again",
		err, path, path, path)
}

func open(ctx context.Context, o Options) (_ *Store, err error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Path, err = filepath.Abs(o.Path); err != nil {
		return nil, err
	}
	for _, dir := range []string{filepath.Dir(o.Path), o.BlobDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	lock, err := file.TakeLock(lockFile(o.Path), o.Succeeds)
	if errors.Is(err, file.ErrLocked) {
		err = errors.New("another archfarm has it open: stop that one first")
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, lock.Close())
		}
	}()
	if err := create(o.Path); err != nil {
		return nil, err
	}
	var ahead time.Duration
	if o.Succeeds {
		if ahead, err = readClock(lockFile(o.Path)); err != nil {
			return nil, err
		}
	}
	e, err := openEngine(ctx, o.Path, ahead)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.close())
		}
	}()
	if err := prepare(ctx, e, o); err != nil {
		return nil, err
	}
	wakes := &sqlstore.Wakes{}
	return &Store{
		Store: sqlstore.New(sqlstore.Watched(e, o.Failed), wakes), blobs: blobs{dir: o.BlobDir, now: e.now},
		path: o.Path, lock: lock, engine: e, close: sync.OnceValue(func() error {
			wakes.Close()
			return errors.Join(e.close(), lock.Close())
		}),
	}, nil
}

// create makes an empty file that only this user can read, unless it is there;
// SQLite gives its other files the same mode.
func create(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), syncDir(filepath.Dir(path)))
}

// prepare checks a database, brings its schema up to date and ends leases, unless a
// predecessor has them. That goes on writing as it knows the schema: migrations of a
// release that takes over in place only add, tables or columns that have a default,
// and take seconds, as its changes wait for them (busy_timeout).
func prepare(ctx context.Context, e *engine, o Options) error {
	if err := quickCheck(ctx, e.reads, o.Log); err != nil {
		return err
	}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	steps, err := sqlstore.Migrations(files)
	if err != nil {
		return err
	}
	if err := sqlstore.Migrate(ctx, e, steps); err != nil || o.Succeeds {
		return err
	}
	return e.Write(ctx, func(tx sqlstore.Tx) error {
		_, err := tx.Exec("UPDATE jobs SET lease_until = 0 WHERE ended = 0 AND lease_until > 0")
		if err == nil {
			_, err = tx.Exec("UPDATE publications SET lease_until = 0 WHERE pending > 0 AND lease_until > 0")
		}
		if err == nil {
			_, err = tx.Exec("DELETE FROM build_holds")
		}
		return err
	})
}

// checking bounds how long the start of a coordinator waits for the check of its
// database. A second is some hundred megabytes: all of it for most, a sample of one
// with a million jobs. What the check does not come to is found by SQLite when it is
// read, as store.ErrCorrupt.
const checking = time.Second

func quickCheck(ctx context.Context, db *sql.DB, log *slog.Logger) error {
	began := time.Now()
	bounded, stop := context.WithTimeout(ctx, checking)
	defer stop()
	var found string
	err := db.QueryRowContext(bounded, "PRAGMA quick_check(1)").Scan(&found)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case bounded.Err() != nil:
		log.Debug("the database is too large to be checked as a whole at every start", "checked", time.Since(began))
	case err != nil:
		return classify(err)
	case found != "ok":
		return fmt.Errorf("%w: %s", store.ErrCorrupt, strings.ReplaceAll(found, "\n", " "))
	}
	return nil
}

// dsn is how a connection to the file is opened, with pragmas like "foreign_keys(1)".
func dsn(path, mode string, pragmas ...string) string {
	query := url.Values{"mode": {mode}, "_pragma": pragmas}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: query.Encode()}).String()
}

// classify makes damage store.ErrCorrupt.
func classify(err error) error {
	var failure *sqlite3.Error
	if errors.As(err, &failure) {
		switch failure.Code() & 0xff {
		case sqlite3lib.SQLITE_CORRUPT, sqlite3lib.SQLITE_NOTADB:
			return fmt.Errorf("%w: %w", store.ErrCorrupt, err)
		}
	}
	return err
}

// Shared tells whether a predecessor or a successor may have this open, too.
func (s *Store) Shared() bool { return s.lock.Shared() }

// Close waits for changes under way.
func (s *Store) Close() error { return s.close() }

// Backup writes a copy of the database as of one moment, without the blobs, to a
// new file. Changes go on meanwhile.
func (s *Store) Backup(ctx context.Context, path string) error { return Backup(ctx, s.path, path) }

// Backup copies the database at path, which may be in use by another process, to a
// new file.
func Backup(ctx context.Context, path, to string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("copying the database %s to %s: %w", path, to, err)
		}
	}()
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			err = errors.Join(err, os.Remove(to))
		}
	}()
	db, err := sql.Open("sqlite", dsn(path, "rw", "busy_timeout(10000)")) // rw: a read-only one could not read the journal that a crash has left
	if err != nil {
		return err
	}
	defer db.Close() //nolint:errcheck // nothing of it is needed any more
	// Into an empty file, which only this user can read.
	if _, err := db.ExecContext(ctx, "VACUUM INTO $1", to); err != nil {
		return classify(err)
	}
	return errors.Join(f.Sync(), syncDir(filepath.Dir(to)))
}
