package sqlstore

import (
	"context"
	"errors"
	"time"
)

// Watched is an Engine that tells, by "read" or "write", when the database has failed:
// not when the rules over it have said no, nor when its caller has gone. Failed may be
// called concurrently; nil: nobody wants to know.
func Watched(engine Engine, failed func(operation string)) Engine {
	if failed == nil {
		return engine
	}
	return watched{engine, failed}
}

type watched struct {
	engine Engine
	failed func(operation string)
}

func (w watched) Read(ctx context.Context, fn func(Tx) error) error {
	return w.run(ctx, "read", w.engine.Read, fn)
}

func (w watched) Write(ctx context.Context, fn func(Tx) error) error {
	return w.run(ctx, "write", w.engine.Write, fn)
}

func (w watched) run(ctx context.Context, operation string, in func(context.Context, func(Tx) error) error, fn func(Tx) error) error {
	refused := false // by fn, all of whose statements have succeeded
	err := in(ctx, func(tx Tx) error {
		t := &watchedTx{Tx: tx}
		err := fn(t)
		refused = err != nil && !t.failed
		return err
	})
	if err != nil && !refused && !errors.Is(ctx.Err(), context.Canceled) {
		w.failed(operation)
	}
	return err
}

// watchedTx knows whether one of its statements has failed.
type watchedTx struct {
	Tx
	failed bool
}

func (t *watchedTx) note(err error) error {
	t.failed = t.failed || err != nil
	return err
}

func (t *watchedTx) Exec(query string, args ...any) (int64, error) {
	n, err := t.Tx.Exec(query, args...)
	return n, t.note(err)
}

func (t *watchedTx) Query(row func(func(...any) error) error, query string, args ...any) error {
	return t.note(t.Tx.Query(row, query, args...))
}

func (t *watchedTx) Now() (time.Time, error) {
	now, err := t.Tx.Now()
	return now, t.note(err)
}

func (t *watchedTx) Lock(keys ...string) error { return t.note(t.Tx.Lock(keys...)) }
