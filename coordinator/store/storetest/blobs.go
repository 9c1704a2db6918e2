package storetest

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/store"
)

func testBlobs(t *testing.T, s store.Store) {
	ctx := t.Context()
	large := bytes.Repeat([]byte("12345678"), store.MaxBlob/8)
	for _, data := range [][]byte{{}, []byte("small"), large} {
		d := digest.FromBytes(data).String()
		_, err := s.Blob(ctx, "acme", d)
		is(t, err, store.ErrNotFound)
		missing, err := s.MissingBlobs(ctx, "acme", []string{d})
		ok(t, err)
		same(t, "missing", missing, []string{d})
		for range 2 {
			ok(t, s.PutBlob(ctx, "acme", d, data))
		}
		r, err := s.Blob(ctx, "acme", d)
		ok(t, err)
		got, err := io.ReadAll(r)
		ok(t, err)
		ok(t, r.Close())
		if !bytes.Equal(got, data) {
			t.Errorf("%d bytes came back as %d others", len(data), len(got))
		}
		missing, err = s.MissingBlobs(ctx, "acme", []string{d})
		ok(t, err)
		same(t, "missing", missing, nil)
		_, err = s.Blob(ctx, "Acme", d) // another tenant
		is(t, err, store.ErrNotFound)
		missing, err = s.MissingBlobs(ctx, "Acme", []string{d})
		ok(t, err)
		same(t, "missing", missing, []string{d})
	}
	if err := s.PutBlob(ctx, "acme", digest.FromString("x").String(), append(large, 'x')); err == nil {
		t.Error("a blob that is too large was taken")
	}
	for _, bad := range []string{"", "sha256:", "sha256:../../../../etc/passwd", "sha512:" + strings.Repeat("0", 128)} {
		if err := s.PutBlob(ctx, "acme", bad, []byte("x")); err == nil {
			t.Errorf("a blob %q was taken", bad)
		}
		if _, err := s.Blob(ctx, "acme", bad); err == nil {
			t.Errorf("a blob %q was given", bad)
		}
		if _, err := s.MissingBlobs(ctx, "acme", []string{bad}); err == nil {
			t.Errorf("a blob %q was looked for", bad)
		}
	}
}

func testSweep(t *testing.T, s store.Store) {
	ctx := t.Context()
	put := func(content string) string {
		d := digest.FromString(content).String()
		ok(t, s.PutBlob(ctx, "acme", d, []byte(content)))
		return d
	}
	named, asked, again, swept, meanwhile := put("named"), put("asked"), put("again"), put("swept"), put("meanwhile")
	ok(t, s.PutBlob(ctx, "other", named, []byte("named")))
	before := later(t, s)
	fresh := put("fresh")
	put("again")
	_, err := s.MissingBlobs(ctx, "acme", []string{asked})
	ok(t, err)
	freed, err := s.SweepBlobs(ctx, before, func(tenant, d string) bool {
		if d == fresh || d == asked || d == again {
			t.Errorf("%s is not old", d)
		}
		if d == meanwhile { // asked for between being looked at and being removed
			missing, err := s.MissingBlobs(ctx, tenant, []string{d})
			ok(t, err)
			same(t, "missing while sweeping", missing, nil)
		}
		return tenant == "acme" && d == named
	})
	ok(t, err)
	same(t, "freed", freed, int64(len("swept")+len("named")))
	missing, err := s.MissingBlobs(ctx, "acme", []string{named, asked, again, swept, fresh, meanwhile})
	ok(t, err)
	same(t, "missing", missing, []string{swept})
	missing, err = s.MissingBlobs(ctx, "other", []string{named})
	ok(t, err)
	same(t, "missing of the other", missing, []string{named})
}

// later is a time after everything that has been, and before everything that comes,
// to the millisecond that file systems may count in.
func later(t testing.TB, s store.Store) time.Time {
	t.Helper()
	start, err := s.Now(t.Context())
	ok(t, err)
	for {
		now, err := s.Now(t.Context())
		ok(t, err)
		if now.Sub(start) > 2*time.Millisecond {
			return now
		}
	}
}
