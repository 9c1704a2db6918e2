package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
)

var errClosed = errors.New("the store is closed")

const (
	// batch bounds how many changes are committed together, and thereby how long the
	// first waits for the last.
	batch = 256
	// prepared bounds the statements kept per connection pool; there are fewer, but
	// for those that are put together.
	prepared = 256
)

// engine is a sqlstore.Engine with one writer.
type engine struct {
	writes *sql.DB
	reads  *sql.DB
	readBy statements
	queue  chan *change
	// stop ends the writer, which closes done.
	stop  context.CancelFunc
	done  chan struct{}
	began time.Time
	ahead time.Duration // of the time of day at began
}

// change is what a caller wants done in a transaction.
type change struct {
	do     func(sqlstore.Tx) error
	answer chan error // buffered
}

func openEngine(ctx context.Context, path string, ahead time.Duration) (*engine, error) {
	writes, err := sql.Open("sqlite", dsn(path, "rw", "busy_timeout(10000)", "journal_mode(WAL)", "synchronous(FULL)", "foreign_keys(1)",
		"secure_delete(FAST)", "cache_size(-32768)", "wal_autocheckpoint(4000)", "journal_size_limit(67108864)"))
	if err != nil {
		return nil, err
	}
	writes.SetMaxOpenConns(1)
	reads, err := sql.Open("sqlite", dsn(path, "rw", "busy_timeout(10000)", "query_only(1)", "cache_size(-8192)"))
	if err != nil {
		return nil, errors.Join(err, writes.Close())
	}
	readers := max(4, runtime.GOMAXPROCS(0))
	reads.SetMaxOpenConns(readers)
	reads.SetMaxIdleConns(readers)
	conn, err := writes.Conn(ctx)
	if err != nil {
		return nil, errors.Join(classify(err), writes.Close(), reads.Close())
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx)) // as long as the store is open
	e := &engine{
		writes: writes, reads: reads, readBy: statements{prepare: reads.PrepareContext},
		queue: make(chan *change), stop: stop, done: make(chan struct{}), began: time.Now(), ahead: ahead,
	}
	go e.write(running, conn) // until close
	return e, nil
}

func (e *engine) close() error {
	e.stop()
	<-e.done
	// The last connection to be closed merges the journal into the database.
	return errors.Join(e.readBy.close(), e.reads.Close(), e.writes.Close())
}

// now is the clock by which leases end: the time of day at the start, or what it was
// to the predecessor, going on evenly however the machine's clock is set.
func (e *engine) now() time.Time { return e.began.Add(time.Since(e.began) + e.ahead) }

// Read calls fn with a connection of its own for each statement.
func (e *engine) Read(ctx context.Context, fn func(sqlstore.Tx) error) error {
	return classify(fn(tx{ctx: ctx, engine: e, statements: &e.readBy}))
}

// Write hands fn to the writer. Once that has begun with it, the answer is waited
// for whatever happens to ctx, as fn uses what is the caller's.
func (e *engine) Write(ctx context.Context, fn func(sqlstore.Tx) error) error {
	c := &change{do: fn, answer: make(chan error, 1)}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case e.queue <- c:
		return classify(<-c.answer)
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-e.done:
		return errClosed
	}
}

// write makes the changes, until ctx ends.
func (e *engine) write(ctx context.Context, conn *sql.Conn) {
	defer close(e.done)
	defer conn.Close() //nolint:errcheck // the pool, closed next, tells
	using := statements{prepare: conn.PrepareContext}
	defer using.close() //nolint:errcheck // the connection is closed next
	writer := tx{ctx: context.WithoutCancel(ctx), engine: e, statements: &using}
	for {
		select {
		case <-ctx.Done():
			return
		case first := <-e.queue:
			together := []*change{first}
			for more := true; more && len(together) < batch; {
				select {
				case next := <-e.queue:
					together = append(together, next)
				default:
					more = false
				}
			}
			commit(writer, together)
		}
	}
}

// commit makes changes in one transaction, each in a savepoint, so that one that
// fails undoes itself only, and answers all of them.
func commit(t tx, changes []*change) {
	results := make([]error, len(changes))
	_, err := t.Exec("BEGIN IMMEDIATE")
	for i := 0; i < len(changes) && err == nil; i++ {
		results[i], err = attempt(t, changes[i])
	}
	if err == nil {
		_, err = t.Exec("COMMIT")
	}
	if err != nil {
		_, _ = t.Exec("ROLLBACK") // which SQLite may have done already
	}
	for i, c := range changes {
		if err != nil && results[i] == nil {
			results[i] = fmt.Errorf("committing: %w", err)
		}
		c.answer <- results[i]
	}
}

// attempt makes one change. A fatal error ends the whole transaction.
func attempt(t tx, c *change) (result, fatal error) {
	if _, err := t.Exec("SAVEPOINT one"); err != nil {
		return nil, err
	}
	if result = c.do(t); result != nil {
		if _, err := t.Exec("ROLLBACK TO one"); err != nil {
			return result, err
		}
	}
	_, err := t.Exec("RELEASE one")
	return result, err
}

// tx is a sqlstore.Tx.
type tx struct {
	ctx context.Context
	*engine
	*statements
}

func (t tx) Exec(query string, args ...any) (int64, error) {
	statement, done, err := t.get(t.ctx, query)
	if err != nil {
		return 0, err
	}
	defer done()
	result, err := statement.ExecContext(t.ctx, args...)
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

func (t tx) Query(row func(func(...any) error) error, query string, args ...any) (err error) {
	statement, done, err := t.get(t.ctx, query)
	if err != nil {
		return err
	}
	defer done()
	rows, err := statement.QueryContext(t.ctx, args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	for rows.Next() {
		if err := row(rows.Scan); err != nil {
			return err
		}
	}
	return rows.Err()
}

func (t tx) Now() (time.Time, error) { return t.now(), nil }

// Writers come one after the other.
func (t tx) RowLocks() bool       { return false }
func (t tx) Lock(...string) error { return nil }

// statements are prepared once.
type statements struct {
	prepare func(context.Context, string) (*sql.Stmt, error)
	mu      sync.Mutex
	known   map[string]*sql.Stmt
}

// get returns a statement, and what to call when it is not needed any more.
func (s *statements) get(ctx context.Context, query string) (*sql.Stmt, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if statement, known := s.known[query]; known {
		return statement, func() {}, nil
	}
	statement, err := s.prepare(ctx, query)
	if err != nil {
		return nil, nil, err
	}
	if len(s.known) >= prepared {
		return statement, func() { _ = statement.Close() }, nil
	}
	if s.known == nil {
		s.known = map[string]*sql.Stmt{}
	}
	s.known[query] = statement
	return statement, func() {}, nil
}

func (s *statements) close() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, statement := range s.known {
		err = errors.Join(err, statement.Close())
	}
	return err
}
