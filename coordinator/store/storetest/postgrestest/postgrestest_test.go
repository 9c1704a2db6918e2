package postgrestest

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(M{Tests: m}) }

func TestServer_StartsRestartsAndLeavesNothing(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, err := Start(ctx)
	Require(t, err)
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(s.Dir()); !errors.Is(err, fs.ErrNotExist) {
			t.Error("the folder is still there:", err)
		}
	})
	name, err := s.Database(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{s.URL(name), s.TCPURL(name)} {
		conn, err := pgx.Connect(ctx, address)
		if err != nil {
			t.Fatal(err)
		}
		var durable string
		if err := conn.QueryRow(ctx, "SHOW fsync").Scan(&durable); err != nil || durable != "on" {
			t.Errorf("fsync is %s, %v", durable, err)
		}
		if err := s.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		if conn.Ping(ctx) == nil {
			t.Error("the connection has survived the restart")
		}
		_ = conn.Close(ctx)
	}
	if err := s.Drop(ctx, name); err != nil {
		t.Error(err)
	}
}
