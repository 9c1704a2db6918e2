package sqlite

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
	"github.com/archfarm/archfarm/coordinator/store/storetest"
)

func options(dir string) Options {
	return Options{Path: filepath.Join(dir, "archfarm.db"), BlobDir: filepath.Join(dir, "blobs")}
}

func openTest(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), options(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s.(*Store)
}

func submit(t testing.TB, s store.Store, id string) {
	t.Helper()
	j := store.Job{ID: id, Tenant: "acme", Spec: bytes.Repeat([]byte("spec"), 100), Legs: []store.Leg{{Platform: "linux/amd64"}}}
	if _, _, err := s.Submit(t.Context(), j, []store.Event{{Data: []byte("submitted")}}); err != nil {
		t.Fatal(err)
	}
}

func TestStore(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t testing.TB) store.Store {
		// A name that is neither a URL's nor a shell's.
		return openTest(t, filepath.Join(t.TempDir(), "a b?c#d%41"))
	})
}

func TestOpen_OneProcessOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTest(t, dir)
	if _, err := Open(t.Context(), options(dir)); err == nil || !strings.Contains(err.Error(), "another archfarm has it open") {
		t.Errorf("opened twice: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	openTest(t, dir)
}

func TestOpen_FilesAreThisUsersOnly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTest(t, filepath.Join(dir, "state"))
	submit(t, s, "a")
	if err := s.PutBlob(t.Context(), "acme", digest.FromString("x").String(), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := s.Backup(t.Context(), filepath.Join(dir, "copy.db")); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := entry.Info()
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has the mode %v", path, info.Mode())
		}
		n++
		return err
	}); err != nil || n < 6 {
		t.Errorf("%d files, %v", n, err)
	}
}

// Leases of a coordinator that has gone need not be waited for; nothing else is lost
// when it goes without a word.
func TestOpen_AfterACrash(t *testing.T) {
	t.Parallel()
	dir, crashed := t.TempDir(), t.TempDir()
	s := openTest(t, dir)
	submit(t, s, "a")
	old, err := s.Claim(t.Context(), "one", time.Hour, 1)
	if err != nil || len(old) != 1 {
		t.Fatal(old, err)
	}
	p := store.Publication{ID: "p", Job: "a", Digest: "sha256:p", Bindings: []store.Binding{{Repository: "r", Tag: "t"}}}
	if _, _, err := s.Bind(t.Context(), p, "one", time.Hour, nil); err != nil {
		t.Fatal(err)
	}
	// As kill -9 leaves it: the journal is not merged.
	for _, name := range []string{"archfarm.db", "archfarm.db-wal"} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || len(data) == 0 {
			t.Fatalf("%s has %d bytes: %v", name, len(data), err)
		}
		if err := os.WriteFile(filepath.Join(crashed, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	again := openTest(t, crashed)
	claimed, err := again.Claim(t.Context(), "two", time.Hour, 1)
	if err != nil || len(claimed) != 1 || claimed[0].Lease.Epoch <= old[0].Lease.Epoch {
		t.Errorf("claimed %+v, %v", claimed, err)
	}
	if _, err := again.Update(t.Context(), old[0].Lease, store.Update{}); !errors.Is(err, store.ErrLeaseLost) {
		t.Errorf("with the old lease: %v", err)
	}
	if got, _, err := again.Abandoned(t.Context(), "two", time.Hour, true); err != nil || got.ID != "p" {
		t.Errorf("abandoned: %+v, %v", got, err)
	}
}

func TestOpen_DamagedDatabase(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(data []byte) []byte{
		"not a database": func(data []byte) []byte { return bytes.Repeat([]byte("x"), len(data)) },
		"cut off":        func(data []byte) []byte { return data[:len(data)/2] },
		"pages zeroed": func(data []byte) []byte {
			clear(data[2*4096 : 6*4096])
			return data
		},
		"bytes flipped": func(data []byte) []byte {
			for i := 4096; i < len(data); i += 4096 {
				for j := range 64 {
					data[i+j] ^= 0xff
				}
			}
			return data
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := openTest(t, dir)
			for i := range 200 {
				submit(t, s, fmt.Sprintf("job-%03d", i))
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "archfarm.db")
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			damaged := damage(data)
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = Open(t.Context(), options(dir))
			if !errors.Is(err, store.ErrCorrupt) {
				t.Fatalf("opened: %v", err)
			}
			for _, word := range []string{path, "archfarm backup", "move"} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("nothing of %q in: %v", word, err)
				}
			}
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, damaged) {
				t.Errorf("the file has been changed, %v", err)
			}
		})
	}
}

// What the check at the start has not come to is found when it is read.
func TestDamageFoundLater(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTest(t, dir)
	for i := range 500 {
		submit(t, s, fmt.Sprintf("job-%03d", i))
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openTest(t, dir)
	s.engine.reads.SetMaxIdleConns(0) // what was read at the start is forgotten
	f, err := os.OpenFile(filepath.Join(dir, "archfarm.db"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, int(info.Size())-20*4096), 20*4096)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.List(t.Context(), store.Query{Limit: 1000}); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("listed: %v", err)
	}
}

func TestBackup_WhileInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openTest(t, dir)
	submit(t, s, "before")
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() { // until stop
			for n := 0; ctx.Err() == nil; n++ {
				submit(t, s, fmt.Sprintf("job-%d-%06d", i, n))
			}
		})
	}
	copies := filepath.Join(dir, "copies")
	for _, name := range []string{"one", "two"} {
		path := filepath.Join(copies, name, "archfarm.db")
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := s.Backup(t.Context(), path); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	wg.Wait()
	if err := s.Backup(t.Context(), filepath.Join(copies, "one", "archfarm.db")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file was overwritten: %v", err)
	}
	restored := openTest(t, filepath.Join(copies, "two"))
	if _, err := restored.Job(t.Context(), "before"); err != nil {
		t.Error(err)
	}
	jobs, err := restored.List(t.Context(), store.Query{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	for _, j := range jobs { // as of one moment: no job without its event
		if events, err := restored.Events(t.Context(), j.ID, 0, 10); err != nil || len(events) != 1 {
			t.Errorf("%s has the events %v, %v", j.ID, events, err)
		}
	}
	submit(t, restored, "after")
}

// One change that fails, or never ends its part of a commit well, is not the others' fault.
func TestWrite_TogetherButEachForItself(t *testing.T) {
	t.Parallel()
	s := openTest(t, t.TempDir())
	var wg sync.WaitGroup
	refusal := errors.New("refused")
	for i := range 64 {
		wg.Go(func() {
			p := store.Publication{ID: fmt.Sprint("p", i), Digest: "sha256:x", Bindings: []store.Binding{{Repository: "r", Tag: fmt.Sprint("t", i)}}}
			_, _, err := s.Bind(t.Context(), p, "me", time.Hour, func(store.Binding, *store.Binding) error {
				if i%2 == 0 {
					return refusal
				}
				return nil
			})
			if (i%2 == 0) != errors.Is(err, refusal) {
				t.Errorf("binding %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	bound, err := s.Bindings(t.Context(), nil, "r", "", 0, 100)
	if err != nil || len(bound) != 32 {
		t.Errorf("%d bindings, %v", len(bound), err)
	}
}

func TestOpen_SchemaOfAnotherProgram(t *testing.T) {
	t.Parallel()
	for statement, want := range map[string]string{
		"INSERT INTO schema_migrations (version, name, hash, applied) VALUES (99, '099_later.sql', 'x', 0)": "newer archfarm has brought it to version 99",
		"UPDATE schema_migrations SET hash = 'other'":                                                       "another 001_jobs.sql",
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			db, err := sql.Open("sqlite", dsn(options(dir).Path, "rwc"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = db.Close() })
			if err := openTest(t, dir).Close(); err != nil {
				t.Fatal(err)
			}
			if _, err := db.ExecContext(t.Context(), statement); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(t.Context(), options(dir)); !errors.Is(err, sqlstore.ErrSchema) || !strings.Contains(err.Error(), want) {
				t.Errorf("opened: %v", err)
			}
		})
	}
}
