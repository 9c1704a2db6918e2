package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

var discard = slog.New(slog.DiscardHandler)

func reopened(t testing.TB, dir string) *store {
	t.Helper()
	s, err := openStore(context.Background(), dir, discard)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// write puts a record that names the given contents.
func write(t testing.TB, s *store, ref string, contents ...string) {
	t.Helper()
	var e extent
	var held []digest.Digest
	for _, c := range contents {
		desc, err := s.blobs.add(context.Background(), "text/plain", []byte(c))
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, desc.Digest)
		e.Blobs = append(e.Blobs, blob{Digest: desc.Digest, Size: desc.Size})
	}
	if err := errors.Join(s.blobs.persist(context.Background(), held...), s.put(&controlapi.BuildHistoryRecord{Ref: ref}, e)); err != nil {
		t.Fatal(err)
	}
	s.blobs.release(held...)
}

func exists(s *store, text string) bool {
	_, err := s.blobs.files.Info(context.Background(), digest.FromString(text))
	return err == nil
}

func TestStore_BlobsLiveAsLongAsARecordNamesThem(t *testing.T) {
	t.Parallel()
	texts := []string{"one", "two", strings.Repeat("large", maxFresh/5+1)}
	names := rapid.SampledFrom([]string{"a", "b"})
	dirs, n := t.TempDir(), 0
	rapid.Check(t, func(r *rapid.T) {
		n++
		dir := filepath.Join(dirs, fmt.Sprint(n))
		s := reopened(t, dir)
		defer func() { _ = s.close() }()
		records := map[string][]string{}
		for range rapid.IntRange(1, 6).Draw(r, "steps") { // each waits for the disk
			s.db.NoSync = true
			ref := names.Draw(r, "ref")
			switch rapid.SampledFrom([]string{"put", "put", "remove", "reopen"}).Draw(r, "step") {
			case "put":
				records[ref] = rapid.SliceOfN(rapid.SampledFrom(texts), 0, 3).Draw(r, "content")
				write(t, s, ref, records[ref]...)
			case "remove":
				_, known := records[ref]
				if _, existed, err := s.remove(ref); err != nil || existed != known {
					r.Fatalf("removing %s: existed %v, %v", ref, existed, err)
				}
				delete(records, ref)
			case "reopen":
				_ = s.close()
				s = reopened(t, dir)
			}
			for _, text := range texts {
				wanted := slices.ContainsFunc(slices.Collect(maps.Values(records)), func(all []string) bool { return slices.Contains(all, text) })
				if exists(s, text) != wanted {
					r.Fatalf("%.10s exists: %v", text, !wanted)
				}
			}
			if len(s.blobs.fresh)+len(s.blobs.held) > 0 {
				r.Fatalf("in memory: %d blobs, %d held", len(s.blobs.fresh), len(s.blobs.held))
			}
		}
	})
}

func TestStore_ABlobThatIsHeldOutlivesTheRecordThatNamedIt(t *testing.T) {
	t.Parallel()
	s := reopened(t, t.TempDir())
	defer func() { _ = s.close() }()
	write(t, s, "a", "shared")
	s.blobs.hold(digest.FromString("shared"))
	if _, _, err := s.remove("a"); err != nil || !exists(s, "shared") {
		t.Errorf("gone although it is held; %v", err)
	}
	s.blobs.release(digest.FromString("shared"))
	if exists(s, "shared") {
		t.Error("still there although nobody wants it")
	}
}

func TestOpen_SweepsWhatACrashHasLeft(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := reopened(t, dir)
	write(t, s, "whole", "kept")
	write(t, s, "broken", "kept", "lost")
	if err := s.blobs.write(t.Context(), digest.FromString("orphan"), []byte("orphan")); err != nil {
		t.Fatal(err)
	}
	w, err := content.OpenWriter(t.Context(), s.blobs.files, content.WithRef("half"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("half a blob")); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	// Of a crash while a writer was being opened.
	if err := os.MkdirAll(filepath.Join(dir, "content", "ingest", "begun"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.blobs.files.Delete(t.Context(), digest.FromString("lost")), s.close()); err != nil {
		t.Fatal(err)
	}
	s = reopened(t, dir)
	defer func() { _ = s.close() }()
	statuses, err := s.blobs.files.ListStatuses(t.Context())
	if err != nil || len(statuses) > 0 || exists(s, "orphan") || !exists(s, "kept") {
		t.Errorf("half written: %v, %v; orphan: %v; kept: %v", statuses, err, exists(s, "orphan"), exists(s, "kept"))
	}
	for ref, want := range map[string]bool{"whole": true, "broken": false} {
		if record, _, err := s.get(ref); err != nil || (record != nil) != want {
			t.Errorf("%s: %v, %v", ref, record, err)
		}
	}
}

func TestOpen_ABrokenDatabaseIsRefusedWithAdvice(t *testing.T) {
	t.Parallel()
	damage := map[string]func(t *testing.T, path string){
		"not a database": func(t *testing.T, path string) { overwrite(t, path, 0, bytes.Repeat([]byte("garbage "), 4096)) },
		"pages broken":   func(t *testing.T, path string) { overwrite(t, path, 2*4096, bytes.Repeat([]byte{0xff}, 8*4096)) },
		"truncated": func(t *testing.T, path string) {
			if err := os.Truncate(path, 4*4096); err != nil {
				t.Fatal(err)
			}
		},
		"a record broken": func(t *testing.T, path string) {
			db, err := bolt.Open(path, 0o600, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(db.Update(func(tx *bolt.Tx) error {
				return tx.Bucket(bucketRecords).Put([]byte("a"), []byte{0xff})
			}), db.Close()); err != nil {
				t.Fatal(err)
			}
		},
	}
	for name, damage := range damage {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := reopened(t, dir)
			s.db.NoSync = true
			for i := range 100 {
				write(t, s, fmt.Sprint("ref-", i), "one text")
			}
			if err := s.close(); err != nil {
				t.Fatal(err)
			}
			damage(t, filepath.Join(dir, "history.db"))
			_, err := openStore(t.Context(), dir, discard)
			if err == nil || !strings.Contains(err.Error(), "move the folder "+dir+" away") {
				t.Errorf("%v", err)
			}
		})
	}
}

func overwrite(t *testing.T, path string, at int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestStore_KnowsWhoHasWhatWasLeftWithWorkers(t *testing.T) {
	t.Parallel()
	s := reopened(t, t.TempDir())
	defer func() { _ = s.close() }()
	layer := digest.FromString("layer")
	for ref, worker := range map[string]string{"a": "one", "b": "one", "c": "two"} {
		if err := s.put(&controlapi.BuildHistoryRecord{Ref: ref}, extent{Places: []place{{Digest: layer, Worker: worker}}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		remove string
		want   []string
	}{{"", []string{"one", "two"}}, {"a", []string{"one", "two"}}, {"b", []string{"two"}}, {"c", nil}} {
		if _, _, err := s.remove(step.remove); err != nil {
			t.Fatal(err)
		}
		got, err := s.workers(layer)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, step.want) {
			t.Errorf("after removing %q: %v, %v", step.remove, got, err)
		}
	}
	if got, err := s.workers("sha256:"); err != nil || len(got) > 0 {
		t.Errorf("of no digest: %v, %v", got, err)
	}
}
