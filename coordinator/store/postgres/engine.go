package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
)

const (
	// answers is how long a server may take for one try, be it unreachable or busy.
	answers = 10 * time.Second
	// tries of a change or a question: with the waits between, they go on for some
	// three seconds, in which a server has restarted.
	tries     = 10
	firstWait = 10 * time.Millisecond
	lastWait  = time.Second
)

// engine is a sqlstore.Engine over connections to a server.
type engine struct {
	pool   *pgxpool.Pool
	closed atomic.Bool
}

// farewell is how long connections have for their last words. To a server that has
// become silent each would take 15 s.
const farewell = 2 * time.Second

func (e *engine) close() {
	e.closed.Store(true)
	closed := make(chan struct{})
	go func() { // ends by itself, later than close where the server is silent
		defer close(closed)
		e.pool.Close()
	}()
	select {
	case <-closed:
	case <-time.After(farewell):
	}
}

// Read calls fn, again when a connection breaks.
func (e *engine) Read(ctx context.Context, fn func(sqlstore.Tx) error) error {
	return e.try(ctx, func(ctx context.Context, conn *pgxpool.Conn) (bool, error) {
		return true, fn(tx{ctx, conn})
	})
}

// Write calls fn in a transaction, again when a connection breaks before it is
// committed, and when the server asks for it.
func (e *engine) Write(ctx context.Context, fn func(sqlstore.Tx) error) error {
	return e.try(ctx, func(ctx context.Context, conn *pgxpool.Conn) (bool, error) {
		began, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite})
		if err != nil {
			return true, err
		}
		if err := fn(tx{ctx, began}); err != nil {
			// Also when ctx has ended: the connection goes back to the pool.
			undo, stop := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer stop()
			_ = began.Rollback(undo)
			return true, err
		}
		if err := began.Commit(ctx); err != nil {
			return false, fmt.Errorf("committing, which may have happened: %w", err)
		}
		return true, nil
	})
}

// try calls do with a connection until it succeeds, or fails in a way that will not
// change. When the connection breaks, it is called again only if it says that this
// is harmless.
func (e *engine) try(ctx context.Context, do func(context.Context, *pgxpool.Conn) (harmless bool, err error)) error {
	wait := firstWait
	for left := tries - 1; ; left-- {
		again, err := e.once(ctx, do)
		if err == nil || !again || left == 0 || ctx.Err() != nil || e.closed.Load() {
			return classify(err)
		}
		select {
		case <-ctx.Done():
			return classify(err)
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, lastWait)
	}
}

func (e *engine) once(ctx context.Context, do func(context.Context, *pgxpool.Conn) (bool, error)) (again bool, err error) {
	ctx, stop := context.WithTimeoutCause(ctx, answers, fmt.Errorf("the database has not answered for %s: %w", answers, context.DeadlineExceeded))
	defer stop()
	defer func() {
		if err != nil && ctx.Err() != nil {
			again, err = false, errors.Join(err, context.Cause(ctx))
		}
	}()
	conn, err := e.pool.Acquire(ctx)
	if err != nil {
		var refused *pgconn.PgError // wrong password, no such database, …
		return !errors.As(err, &refused) || transient(refused), err
	}
	defer conn.Release()
	harmless, err := do(ctx, conn)
	var failure *pgconn.PgError
	switch {
	case err == nil:
		return false, nil
	case errors.As(err, &failure):
		return transient(failure) && (harmless || rolledBack(failure)), err
	default:
		return harmless && conn.Conn().IsClosed(), err
	}
}

// rolledBack tells whether a transaction has certainly not happened, and may if it
// is tried again (https://www.postgresql.org/docs/current/mvcc-serialization-failure-handling.html).
func rolledBack(err *pgconn.PgError) bool {
	return err.Code == "40001" || err.Code == "40P01"
}

// transient tells whether trying again may help: also when the server stops, starts
// or has no connection left (https://www.postgresql.org/docs/current/errcodes-appendix.html).
func transient(err *pgconn.PgError) bool {
	return rolledBack(err) || strings.HasPrefix(err.Code, "08") || strings.HasPrefix(err.Code, "57P0") ||
		err.Code == "53300" || err.Code == "25P03"
}

// runner is a connection, or a transaction.
type runner interface {
	Exec(ctx context.Context, query string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, query string, args ...any) (pgx.Rows, error)
}

// tx is a sqlstore.Tx.
type tx struct {
	ctx context.Context
	runner
}

func (t tx) Exec(query string, args ...any) (int64, error) {
	tag, err := t.runner.Exec(t.ctx, query, args...)
	return tag.RowsAffected(), err
}

func (t tx) Query(row func(func(...any) error) error, query string, args ...any) error {
	rows, err := t.runner.Query(t.ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

func (t tx) Now() (now time.Time, err error) {
	var micros int64
	err = t.Query(func(scan func(...any) error) error { return scan(&micros) },
		"SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")
	return time.UnixMicro(micros), err
}

func (t tx) RowLocks() bool { return true }

// Lock takes the locks in the order of their numbers, so that two callers cannot
// wait for each other.
func (t tx) Lock(keys ...string) error {
	_, err := t.Exec(`SELECT pg_advisory_xact_lock(number) FROM (
		SELECT DISTINCT hashtextextended('archfarm ' || key, 0) AS number FROM unnest($1::text[]) AS keys (key) ORDER BY number) AS numbers`, keys)
	return err
}
