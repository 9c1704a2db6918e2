package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
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
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"pgregory.net/rapid"

	"github.com/archfarm/archfarm/coordinator/store"
)

var discard = slog.New(slog.DiscardHandler)

// reopened opens the records in a folder, until the function that it returns is called.
func reopened(t testing.TB, dir string) (*records, func()) {
	t.Helper()
	db := database(t, dir)
	s, err := openRecords(context.Background(), db, filepath.Join(dir, "history"), discard)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() { _ = db.Close() }
}

// write puts a record that names the given contents.
func write(t testing.TB, s *records, ref string, contents ...string) {
	t.Helper()
	var e extent
	h := s.blobs.hold()
	for _, c := range contents {
		desc, err := h.add("text/plain", []byte(c))
		if err != nil {
			t.Fatal(err)
		}
		e.Blobs = append(e.Blobs, blob{Digest: desc.Digest, Size: desc.Size})
	}
	if err := errors.Join(h.persist(context.Background(), e.digests()...), s.put(context.Background(), &controlapi.BuildHistoryRecord{Ref: ref}, e)); err != nil {
		t.Fatal(err)
	}
	h.release(context.Background())
}

func exists(s *records, text string) bool {
	_, err := s.blobs.Info(context.Background(), digest.FromString(text))
	return err == nil
}

func TestRecords_BlobsLiveAsLongAsARecordNamesThem(t *testing.T) {
	t.Parallel()
	texts := []string{"one", "two", strings.Repeat("large", maxFresh/5+1)}
	names := rapid.SampledFrom([]string{"a", "b"})
	dirs, n := t.TempDir(), 0
	rapid.Check(t, func(r *rapid.T) {
		n++
		dir := filepath.Join(dirs, fmt.Sprint(n))
		s, end := reopened(t, dir)
		defer func() { end() }()
		records := map[string][]string{}
		for range rapid.IntRange(1, 6).Draw(r, "steps") { // each waits for the disk
			ref := names.Draw(r, "ref")
			switch rapid.SampledFrom([]string{"put", "put", "remove", "reopen"}).Draw(r, "step") {
			case "put":
				records[ref] = rapid.SliceOfN(rapid.SampledFrom(texts), 0, 3).Draw(r, "content")
				write(t, s, ref, records[ref]...)
			case "remove":
				_, known := records[ref]
				if _, existed, err := s.remove(t.Context(), ref); err != nil || existed != known {
					r.Fatalf("removing %s: existed %v, %v", ref, existed, err)
				}
				delete(records, ref)
			case "reopen":
				end()
				s, end = reopened(t, dir)
			}
			for _, text := range texts {
				wanted := slices.ContainsFunc(slices.Collect(maps.Values(records)), func(all []string) bool { return slices.Contains(all, text) })
				if exists(s, text) != wanted {
					r.Fatalf("%.10s exists: %v", text, !wanted)
				}
			}
			if len(s.blobs.fresh) > 0 {
				r.Fatalf("not released: %d blobs", len(s.blobs.fresh))
			}
		}
	})
}

func TestRecords_ABlobThatIsHeldOutlivesTheRecordThatNamedIt(t *testing.T) {
	t.Parallel()
	s, end := reopened(t, t.TempDir())
	defer end()
	write(t, s, "a", "shared")
	h := s.blobs.hold()
	if size, err := h.find(t.Context(), digest.FromString("shared")); err != nil || size != 6 {
		t.Errorf("found %d bytes, %v", size, err)
	}
	if _, _, err := s.remove(t.Context(), "a"); err != nil || !exists(s, "shared") {
		t.Errorf("gone although it is held; %v", err)
	}
	h.release(t.Context())
	if exists(s, "shared") {
		t.Error("still there although nobody wants it")
	}
}

func TestBlobs_CanBeReadBeforeAndAfterTheyAreStored(t *testing.T) {
	t.Parallel()
	s, end := reopened(t, t.TempDir())
	defer end()
	for _, size := range []int{0, 10, maxFresh + 1, 3*store.BuildChunk + 7} {
		data := bytes.Repeat([]byte("0123456789a"), size/11+1)[:size]
		h := s.blobs.hold()
		desc, err := h.add("text/plain", data)
		if err != nil {
			t.Fatal(err)
		}
		early, err := s.blobs.ReaderAt(t.Context(), desc)
		if err != nil {
			t.Fatal(err)
		}
		write(t, s, fmt.Sprint(size), string(data))
		h.release(t.Context())
		late, err := s.blobs.ReaderAt(t.Context(), desc)
		if err != nil {
			t.Fatal(err)
		}
		for name, ra := range map[string]content.ReaderAt{"before": early, "after": late} {
			whole, err := io.ReadAll(content.NewReader(ra))
			if err != nil || !bytes.Equal(whole, data) || ra.Size() != int64(size) {
				t.Errorf("%d bytes, %s: %d came back, %v", size, name, len(whole), err)
			}
			if part := make([]byte, 20); size > 20 {
				if n, err := ra.ReadAt(part, int64(size-7)); n != 7 || !errors.Is(err, io.EOF) || !bytes.Equal(part[:7], data[size-7:]) {
					t.Errorf("%d bytes, %s: of the end %d came, %v", size, name, n, err)
				}
			}
			if err := ra.Close(); err != nil {
				t.Error(err)
			}
		}
		if len(s.blobs.fresh) > 0 {
			t.Errorf("not released: %d blobs", len(s.blobs.fresh))
		}
	}
	if _, err := s.blobs.ReaderAt(t.Context(), ocispecs.Descriptor{Digest: digest.FromString("none")}); err == nil {
		t.Error("a blob that is not there can be read")
	}
}

func TestOpen_SweepsWhatACrashHasLeft(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, end := reopened(t, dir)
	write(t, s, "whole", "kept")
	crashed := s.blobs.hold()
	desc, err := crashed.add("text/plain", []byte("orphan"))
	if err != nil {
		t.Fatal(err)
	}
	if err := crashed.persist(t.Context(), desc.Digest); err != nil {
		t.Fatal(err)
	}
	end()
	if err := os.WriteFile(filepath.Join(dir, "history", "history.db"), nil, 0o600); err != nil { // an older version's
		t.Fatal(err)
	}
	s, end = reopened(t, dir)
	defer end()
	left, err := os.ReadDir(filepath.Join(dir, "history"))
	if err != nil || len(left) > 0 || exists(s, "orphan") || !exists(s, "kept") {
		t.Errorf("files: %v, %v; orphan: %v; kept: %v", left, err, exists(s, "orphan"), exists(s, "kept"))
	}
	if record, _, err := s.get(t.Context(), "whole"); err != nil || record == nil {
		t.Errorf("%v, %v", record, err)
	}
}

func TestRecords_ABrokenOneIsPassedOverAndCanBeRemoved(t *testing.T) {
	t.Parallel()
	s, end := reopened(t, t.TempDir())
	defer end()
	for i := range 2*page + 1 {
		write(t, s, fmt.Sprintf("ref-%03d", i))
	}
	if err := s.db.ChangeBuild(t.Context(), "ref-100", func(b *store.Build) error { b.Record, b.Extent = []byte{0xff}, []byte("{"); return nil }); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := s.each(t.Context(), "", func(r *controlapi.BuildHistoryRecord, _ string) {
		if n++; r.GetRef() == "ref-100" {
			t.Error("the broken one was given")
		}
	}); err != nil || n != 2*page {
		t.Errorf("there are %d, %v", n, err)
	}
	if _, _, err := s.get(t.Context(), "ref-100"); err == nil || !strings.Contains(err.Error(), "ref-100") {
		t.Errorf("by its name: %v", err)
	}
	if _, existed, err := s.remove(t.Context(), "ref-100"); !existed || err != nil {
		t.Errorf("removing it: %v, %v", existed, err)
	}
}

func TestRecords_KnowWhoHasWhatWasLeftWithWorkers(t *testing.T) {
	t.Parallel()
	s, end := reopened(t, t.TempDir())
	defer end()
	layer := digest.FromString("layer")
	for ref, worker := range map[string]string{"a": "one", "b": "one", "c": "two"} {
		if err := s.put(t.Context(), &controlapi.BuildHistoryRecord{Ref: ref}, extent{Places: []place{{Digest: layer, Worker: worker}}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		remove string
		want   []string
	}{{"", []string{"one", "two"}}, {"a", []string{"one", "two"}}, {"b", []string{"two"}}, {"c", nil}} {
		if _, _, err := s.remove(t.Context(), step.remove); err != nil {
			t.Fatal(err)
		}
		got, err := s.workers(t.Context(), layer)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, step.want) {
			t.Errorf("after removing %q: %v, %v", step.remove, got, err)
		}
	}
	if got, err := s.workers(t.Context(), "sha256:"); err != nil || len(got) > 0 {
		t.Errorf("of no digest: %v, %v", got, err)
	}
}
