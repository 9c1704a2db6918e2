// Package sqlstore is what the SQL implementations of store.Store have in common:
// the statements and the rules, over an Engine, and the migrations.
//
// Times are stored as microseconds since 1970, 0 being none. Texts are made valid
// UTF-8 without NUL, which PostgreSQL refuses.
package sqlstore

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
)

// Engine runs statements that both databases understand: placeholders $1, $2, …,
// each used in order, RETURNING, ON CONFLICT.
type Engine interface {
	// Read calls fn, whose statements see what has been committed; not
	// necessarily at one moment. It may call fn again.
	Read(ctx context.Context, fn func(Tx) error) error
	// Write calls fn in a transaction, and returns nil once that is durable. An error
	// of fn ends the transaction and is returned as it is. It may call fn again.
	Write(ctx context.Context, fn func(Tx) error) error
}

// Tx is what a call of an Engine's function may use, until it returns.
type Tx interface {
	// Exec returns how many rows it changed.
	Exec(query string, args ...any) (int64, error)
	// Query calls row for each row, with what scans it.
	Query(row func(scan func(dest ...any) error) error, query string, args ...any) error
	// Now is the database's clock: not when the transaction began, but now.
	Now() (time.Time, error)
	// RowLocks tells whether rows that are read to be changed must be locked; not
	// where writers come one after the other anyway.
	RowLocks() bool
	// Lock waits for the locks of the keys and keeps them until the transaction ends.
	Lock(keys ...string) error
}

// Store implements store.Jobs, store.Ledger, store.Secrets, store.History and the
// hints, over an Engine.
type Store struct {
	engine Engine
	wakes  *Wakes
}

// New makes a store of an engine whose schema is there. Hints go to wakes.
func New(engine Engine, wakes *Wakes) *Store { return &Store{engine: engine, wakes: wakes} }

// Now is the database's clock.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	return read(ctx, s, "reading the clock", func(tx Tx) (time.Time, error) { return tx.Now() })
}

// Wakes are hints that something may have changed.
func (s *Store) Wakes(ctx context.Context) <-chan store.Wake { return s.wakes.Subscribe(ctx) }

// read and write return what fn does; errors say what was being done, unless that is empty.
func read[T any](ctx context.Context, s *Store, doing string, fn func(Tx) (T, error)) (T, error) {
	return run(ctx, s.engine.Read, doing, fn)
}

func write[T any](ctx context.Context, s *Store, doing string, fn func(Tx) (T, error)) (T, error) {
	return run(ctx, s.engine.Write, doing, fn)
}

func run[T any](ctx context.Context, in func(context.Context, func(Tx) error) error, doing string, fn func(Tx) (T, error)) (T, error) {
	var result T
	err := in(ctx, func(tx Tx) (err error) {
		result, err = fn(tx)
		return err
	})
	if err != nil && doing != "" {
		err = fmt.Errorf("%s: %w", doing, err)
	}
	return result, err
}

// forUpdate ends a SELECT whose rows nobody else is to change until the transaction
// ends; skipLocked leaves out those that somebody else is about to change.
func forUpdate(tx Tx) string {
	if tx.RowLocks() {
		return " FOR UPDATE"
	}
	return ""
}

func skipLocked(tx Tx) string {
	if tx.RowLocks() {
		return " FOR UPDATE SKIP LOCKED"
	}
	return ""
}

// rows collects what a query answers.
func rows[T any](tx Tx, scan func(func(...any) error) (T, error), query string, args ...any) ([]T, error) {
	var all []T
	err := tx.Query(func(row func(...any) error) error {
		one, err := scan(row)
		all = append(all, one)
		return err
	}, query, args...)
	return all, err
}

// one is the first row of a query; store.ErrNotFound.
func one[T any](tx Tx, scan func(func(...any) error) (T, error), query string, args ...any) (T, error) {
	all, err := rows(tx, scan, query, args...)
	if err == nil && len(all) == 0 {
		err = store.ErrNotFound
	}
	if err != nil {
		var none T
		return none, err
	}
	return all[0], nil
}

// column scans rows of one column.
func column[T any](scan func(...any) error) (T, error) {
	var v T
	return v, scan(&v)
}

// params are the arguments of a query that is put together.
type params []any

func (p *params) add(v any) string {
	*p = append(*p, v)
	return fmt.Sprintf("$%d", len(*p))
}

// list is "$1, $2" for an IN.
func list[T any](p *params, values []T) string {
	names := make([]string, len(values))
	for i, v := range values {
		names[i] = p.add(v)
	}
	return strings.Join(names, ", ")
}

// in is the condition that a column is one of the values.
func in[T any](p *params, column string, values []T) string {
	return column + " IN (" + list(p, values) + ")"
}

// text makes a string storable in both databases.
func text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func moment(micros int64) time.Time {
	if micros == 0 {
		return time.Time{}
	}
	return time.UnixMicro(micros).UTC()
}

func stored(t time.Time) time.Time { return moment(micros(t)) }

// encode is JSON, and nothing for nothing.
func encode[T any](values []T) (string, error) {
	if len(values) == 0 {
		return "", nil
	}
	data, err := json.Marshal(values)
	return string(data), err
}

func decode[T any](data string, values *[]T) error {
	if data == "" {
		return nil
	}
	return json.Unmarshal([]byte(data), values)
}

// leased is until when a lease lasts that begins now.
func leased(now time.Time, l time.Duration) int64 { return micros(now.Add(l)) }

// page bounds what a caller asks for.
func page(limit int) int { return min(cmp.Or(max(limit, 0), maxPage), maxPage) }

const maxPage = 1000
