package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/store"
)

// holding is how long a blob stays that somebody holds.
const holding = time.Hour

func scanBuildBlob(scan func(...any) error) (b store.BuildBlob, err error) {
	return b, scan(&b.Digest, &b.Size)
}

// PutBuildBlob stores a blob, unless it is there: a small one at once, a large one
// chunk by chunk while it is held.
func (s *Store) PutBuildBlob(ctx context.Context, holder string, b store.BuildBlob, data io.ReaderAt) error {
	if d := digest.Digest(b.Digest); d.Validate() != nil || d.Algorithm() != digest.SHA256 || b.Size < 0 {
		return fmt.Errorf("blob %q of %d bytes: its digest should be sha256: and 64 hexadecimal digits", b.Digest, b.Size)
	}
	doing := "storing " + b.Digest
	first, err := chunk(b, data, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	small := b.Size <= store.BuildChunk
	complete, err := write(ctx, s, doing, func(tx Tx) (bool, error) { return beginBlob(tx, holder, b, first, small) })
	if err != nil || complete {
		return err
	}
	for n := int64(1); n*store.BuildChunk < b.Size; n++ {
		part, err := chunk(b, data, n)
		if err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
		if _, err := write(ctx, s, doing, func(tx Tx) (struct{}, error) { return struct{}{}, putChunk(tx, b.Digest, n, part) }); err != nil {
			return err
		}
	}
	_, err = write(ctx, s, doing, func(tx Tx) (int64, error) {
		n, err := tx.Exec("UPDATE build_blobs SET complete = TRUE WHERE digest = $1", b.Digest)
		if err == nil && n == 0 { // it took longer than a hold lasts
			err = store.ErrNotFound
		}
		return n, err
	})
	return err
}

// chunk is the nth of a blob.
func chunk(b store.BuildBlob, data io.ReaderAt, n int64) ([]byte, error) {
	part := make([]byte, min(store.BuildChunk, b.Size-n*store.BuildChunk))
	got, err := data.ReadAt(part, n*store.BuildChunk)
	if got < len(part) {
		return nil, errors.Join(err, io.ErrUnexpectedEOF)
	}
	return part, nil
}

// beginBlob makes a blob the holder's, writes its first chunk, and tells whether all
// of it is there.
func beginBlob(tx Tx, holder string, b store.BuildBlob, first []byte, small bool) (bool, error) {
	if err := lockBlobs(tx, []string{b.Digest}); err != nil {
		return false, err
	}
	if _, err := tx.Exec("INSERT INTO build_blobs (digest, size, complete) VALUES ($1, $2, FALSE) ON CONFLICT (digest) DO NOTHING", b.Digest, b.Size); err != nil {
		return false, err
	}
	if err := hold(tx, holder, b.Digest); err != nil {
		return false, err
	}
	complete, err := one(tx, column[bool], "SELECT complete FROM build_blobs WHERE digest = $1", b.Digest)
	if err != nil || complete {
		return complete, err
	}
	if err := putChunk(tx, b.Digest, 0, first); err != nil || !small {
		return false, err
	}
	_, err = tx.Exec("UPDATE build_blobs SET complete = TRUE WHERE digest = $1", b.Digest)
	return true, err
}

func putChunk(tx Tx, digest string, n int64, data []byte) error {
	_, err := tx.Exec("INSERT INTO build_chunks (digest, num, data) VALUES ($1, $2, $3) ON CONFLICT (digest, num) DO NOTHING", digest, n, data)
	return err
}

func hold(tx Tx, holder, digest string) error {
	now, err := tx.Now()
	if err != nil {
		return err
	}
	_, err = tx.Exec(`INSERT INTO build_holds (holder, digest, until) VALUES ($1, $2, $3)
		ON CONFLICT (holder, digest) DO UPDATE SET until = excluded.until`, text(holder), digest, leased(now, holding))
	return err
}

// HoldBuildBlob makes a blob that is there the holder's.
func (s *Store) HoldBuildBlob(ctx context.Context, holder, digest string) (store.BuildBlob, error) {
	return write(ctx, s, "content "+digest, func(tx Tx) (store.BuildBlob, error) {
		if err := lockBlobs(tx, []string{digest}); err != nil {
			return store.BuildBlob{}, err
		}
		b, err := buildBlob(tx, digest)
		if err == nil {
			err = hold(tx, holder, digest)
		}
		return b, err
	})
}

// ReleaseBuildBlobs ends all that a holder has.
func (s *Store) ReleaseBuildBlobs(ctx context.Context, holder string) error {
	_, err := write(ctx, s, "releasing what the build history holds", func(tx Tx) (struct{}, error) {
		held, err := rows(tx, column[string], "SELECT digest FROM build_holds WHERE holder = $1", text(holder))
		if err != nil || len(held) == 0 {
			return struct{}{}, err
		}
		if err := lockBlobs(tx, held); err != nil {
			return struct{}{}, err
		}
		if _, err := tx.Exec("DELETE FROM build_holds WHERE holder = $1", text(holder)); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, dropBlobs(tx, held)
	})
	return err
}

func buildBlob(tx Tx, digest string) (store.BuildBlob, error) {
	return one(tx, scanBuildBlob, "SELECT digest, size FROM build_blobs WHERE complete AND digest = $1", text(digest))
}

// BuildBlob tells of a blob.
func (s *Store) BuildBlob(ctx context.Context, digest string) (store.BuildBlob, error) {
	return read(ctx, s, "content "+digest, func(tx Tx) (store.BuildBlob, error) { return buildBlob(tx, digest) })
}

// BuildBlobData returns a chunk of a blob.
func (s *Store) BuildBlobData(ctx context.Context, digest string, n int64) ([]byte, error) {
	return read(ctx, s, "content "+digest, func(tx Tx) ([]byte, error) {
		return one(tx, column[[]byte], "SELECT data FROM build_chunks WHERE digest = $1 AND num = $2", text(digest), n)
	})
}

// BuildBlobs returns blobs in the order of their digests.
func (s *Store) BuildBlobs(ctx context.Context, after string, limit int) ([]store.BuildBlob, error) {
	return read(ctx, s, "listing the build history's content", func(tx Tx) ([]store.BuildBlob, error) {
		return rows(tx, scanBuildBlob, "SELECT digest, size FROM build_blobs WHERE complete AND digest > $1 ORDER BY digest LIMIT $2", text(after), page(limit))
	})
}
