// Package postgres keeps the coordinator's state in a PostgreSQL database, version 12
// or later, which several coordinators may share.
//
// Whoever changes a row has it locked; tags, which may have no row yet, are locked by
// advisory locks. Leases end by the server's clock.
package postgres

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
)

//go:embed migrations/*.sql
var migrations embed.FS

const (
	// oldest is the first version that is known to have what is used here.
	oldest = 120000
	// connections to the server, unless the URL says pool_max_conns.
	connections = 16
)

// Options say where the state is.
type Options struct {
	// URL is postgres://USER:PASSWORD@HOST/DATABASE?…, as libpq knows it, or key=value
	// words. It is never part of an error or a log.
	URL string
	// Failed is told when the database has failed, by "read" or "write"; may be nil, and
	// called concurrently.
	Failed func(operation string)
	// Log may be nil.
	Log *slog.Logger
}

// Store is the state in a PostgreSQL database.
type Store struct {
	*sqlstore.Store
	engine *engine
	db     sqlstore.Engine // the same, watched
	wakes  *sqlstore.Wakes
	hints  *hints
}

var _ store.Store = (*Store)(nil)

// Open connects to a database, and brings its schema up to date.
func Open(ctx context.Context, o Options) (store.Store, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	cfg, err := configure(o.URL)
	if err != nil {
		return nil, err
	}
	s, err := open(ctx, cfg, o)
	if err != nil {
		c := cfg.ConnConfig
		return nil, fmt.Errorf("opening the database %s at %s: %w", c.Database, net.JoinHostPort(c.Host, strconv.Itoa(int(c.Port))), err)
	}
	return s, nil
}

// configure reads a URL. What is wrong with it is not told in the parser's words,
// which may hold parts of it.
func configure(address string) (*pgxpool.Config, error) {
	cfg, err := pgxpool.ParseConfig(address)
	if err != nil {
		return nil, errors.New("the address of the database is malformed: it should be like postgres://user:password@host:5432/database?sslmode=verify-full, special characters in the password as %XX")
	}
	if !strings.Contains(address, "pool_max_conns") {
		cfg.MaxConns = connections
	}
	c := cfg.ConnConfig
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = answers
	}
	c.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}}).DialContext
	// The server forgets a coordinator that has vanished with rows locked.
	for name, value := range map[string]string{
		"application_name":                    "archfarm",
		"idle_in_transaction_session_timeout": "4000",
		"tcp_keepalives_idle":                 "5",
		"tcp_keepalives_interval":             "2",
		"tcp_keepalives_count":                "3",
	} {
		if _, set := c.RuntimeParams[name]; !set {
			c.RuntimeParams[name] = value
		}
	}
	cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		// Whatever the server's default is: what has been answered is durable.
		_, err := conn.Exec(ctx, "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'")
		return err
	}
	return cfg, nil
}

func open(ctx context.Context, cfg *pgxpool.Config, o Options) (_ *Store, err error) {
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, err
	}
	e := &engine{pool: pool}
	defer func() {
		if err != nil {
			pool.Close()
		}
	}()
	if err := e.Read(ctx, version); err != nil {
		return nil, err
	}
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	steps, err := sqlstore.Migrations(files)
	if err != nil {
		return nil, err
	}
	if err := sqlstore.Migrate(ctx, e, steps); err != nil {
		return nil, err
	}
	wakes := &sqlstore.Wakes{}
	hints := exchange(ctx, e, wakes, o.Log)
	wakes.Elsewhere = hints.tell
	db := sqlstore.Watched(e, o.Failed)
	return &Store{Store: sqlstore.New(db, wakes), engine: e, db: db, wakes: wakes, hints: hints}, nil
}

// version refuses servers that are too old.
func version(t sqlstore.Tx) error {
	return t.Query(func(scan func(...any) error) error {
		var number int
		var name string
		err := scan(&number, &name)
		if err == nil && number < oldest {
			err = fmt.Errorf("the server is PostgreSQL %s, use %d or later", name, oldest/10000)
		}
		return err
	}, "SELECT current_setting('server_version_num')::int, current_setting('server_version')")
}

// classify makes damage store.ErrCorrupt.
func classify(err error) error {
	var failure *pgconn.PgError
	if errors.As(err, &failure) && (failure.Code == "XX001" || failure.Code == "XX002") {
		return fmt.Errorf("%w: %w; restore the database from its backups", store.ErrCorrupt, err)
	}
	return err
}

// Shared tells that other coordinators may have this open.
func (s *Store) Shared() bool { return true }

// Close waits for calls under way.
func (s *Store) Close() error {
	s.hints.close()
	s.wakes.Close()
	s.engine.close()
	return nil
}

// IsURL tells whether the setting of a store is the address of a PostgreSQL server.
func IsURL(setting string) bool {
	u, err := url.Parse(setting)
	if err != nil { // as with a special character in the password
		return strings.HasPrefix(setting, "postgres://") || strings.HasPrefix(setting, "postgresql://")
	}
	return u.Scheme == "postgres" || u.Scheme == "postgresql"
}
