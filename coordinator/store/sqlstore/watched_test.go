package sqlstore_test

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
)

// flaky is an engine each of whose parts can be out of order.
type flaky struct{ begin, statement, commit error }

func (f flaky) Read(_ context.Context, fn func(sqlstore.Tx) error) error {
	return errors.Join(f.begin, fn(f))
}

func (f flaky) Write(_ context.Context, fn func(sqlstore.Tx) error) error {
	if f.begin != nil {
		return f.begin
	}
	if err := fn(f); err != nil {
		return err
	}
	return f.commit
}

func (f flaky) Exec(string, ...any) (int64, error) { return 0, f.statement }
func (f flaky) Query(func(func(...any) error) error, string, ...any) error {
	return f.statement
}
func (f flaky) Now() (time.Time, error) { return time.Time{}, f.statement }
func (flaky) RowLocks() bool            { return false }
func (f flaky) Lock(...string) error    { return f.statement }

func TestWatched_TellsWhatIsTheDatabasesFault(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	fine := func(sqlstore.Tx) error { return nil }
	uses := map[string]func(sqlstore.Tx) error{
		"exec":  func(tx sqlstore.Tx) error { _, err := tx.Exec(""); return err },
		"query": func(tx sqlstore.Tx) error { return tx.Query(nil, "") },
		"now":   func(tx sqlstore.Tx) error { _, err := tx.Now(); return err },
		"lock":  func(tx sqlstore.Tx) error { return tx.Lock("a") },
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	late, stop := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer stop()
	check := func(what string, ctx context.Context, engine flaky, fn func(sqlstore.Tx) error, fails bool, want ...string) {
		t.Helper()
		var told []string
		err := sqlstore.Watched(engine, func(operation string) { told = append(told, operation) }).Write(ctx, fn)
		if (err != nil) != fails || !slices.Equal(told, want) {
			t.Errorf("%s: told %q (%v), want %q", what, told, err, want)
		}
	}
	check("a change", t.Context(), flaky{}, fine, false)
	check("no connection", t.Context(), flaky{begin: broken}, fine, true, "write")
	check("a commit", t.Context(), flaky{commit: broken}, fine, true, "write")
	check("a refusal", t.Context(), flaky{}, func(sqlstore.Tx) error { return store.ErrNotFound }, true)
	check("a caller that has gone", gone, flaky{begin: broken}, fine, true)
	check("a caller that has waited enough", late, flaky{begin: broken}, fine, true, "write")
	for name, use := range uses {
		check(name, t.Context(), flaky{statement: broken}, use, true, "write")
		check(name+" in order", t.Context(), flaky{}, use, false)
	}
	var told []string
	watched := sqlstore.Watched(flaky{statement: broken}, func(operation string) { told = append(told, operation) })
	if err := watched.Read(t.Context(), uses["query"]); !errors.Is(err, broken) || !slices.Equal(told, []string{"read"}) {
		t.Errorf("reading: %v, told %q", err, told)
	}
}
