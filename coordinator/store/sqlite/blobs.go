package sqlite

import (
	"context"
	"encoding/base32"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/store/sqlstore"
	"github.com/archfarm/archfarm/file"
)

// blobs are files, TENANT/sha256/AB/ABCD…; the time of modification is when one was
// last put or asked for.
type blobs struct {
	dir string
	now func() time.Time
	// sweeping excludes that a blob is removed between being found and being kept.
	sweeping sync.RWMutex
}

// folders hold tenants' names, which may differ by case only, on file systems that
// know no case.
var folders = base32.HexEncoding.WithPadding(base32.NoPadding)

func (b *blobs) path(tenant, blob string) (string, error) {
	if err := sqlstore.CheckBlob(tenant, blob, nil); err != nil {
		return "", err
	}
	d := digest.Digest(blob)
	return filepath.Join(b.dir, strings.ToLower(folders.EncodeToString([]byte(tenant))), "sha256", d.Encoded()[:2], d.Encoded()), nil
}

// MissingBlobs returns those that are not there, and keeps the others.
func (b *blobs) MissingBlobs(ctx context.Context, tenant string, digests []string) ([]string, error) {
	var missing []string
	for _, d := range digests {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		path, err := b.path(tenant, d)
		if err != nil {
			return nil, err
		}
		there, err := b.keep(path)
		if err != nil {
			return nil, err
		}
		if !there {
			missing = append(missing, d)
		}
	}
	return missing, nil
}

// keep tells whether a blob is there, and keeps it from being swept.
func (b *blobs) keep(path string) (bool, error) {
	b.sweeping.RLock()
	defer b.sweeping.RUnlock()
	now := b.now()
	err := os.Chtimes(path, now, now)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// PutBlob stores one, unless it is there.
func (b *blobs) PutBlob(_ context.Context, tenant, blob string, data []byte) error {
	path, err := b.path(tenant, blob)
	if err = errors.Join(err, sqlstore.CheckBlob(tenant, blob, data)); err != nil {
		return err
	}
	if there, err := b.keep(path); there || err != nil {
		return err
	}
	if err := b.makeFolders(filepath.Dir(path)); err != nil {
		return fmt.Errorf("blob %s: %w", blob, err)
	}
	if err := file.Replace(path, data, 0o600); err != nil {
		return err
	}
	_, err = b.keep(path) // by the store's clock
	return err
}

// makeFolders makes a folder within the blobs' so that it is still there after a
// crash. None is ever removed.
func (b *blobs) makeFolders(dir string) error {
	if _, err := os.Stat(dir); err == nil || dir == b.dir {
		return err
	}
	if err := b.makeFolders(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// Blob opens one.
func (b *blobs) Blob(_ context.Context, tenant, blob string) (io.ReadCloser, error) {
	path, err := b.path(tenant, blob)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("blob %s: %w", blob, store.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// SweepBlobs removes old ones that are not named.
func (b *blobs) SweepBlobs(ctx context.Context, before time.Time, named func(tenant, digest string) bool) (int64, error) {
	var freed int64
	err := filepath.WalkDir(b.dir, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil || !entry.Type().IsRegular():
			return err
		}
		info, err := entry.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !info.ModTime().Before(before) {
			return nil
		}
		tenant, blob, known := b.name(path)
		if half := strings.HasPrefix(entry.Name(), "."); err == nil && (half || known && !named(tenant, blob)) { // half of one: from before a crash
			var size int64
			size, err = b.remove(path, before)
			freed += size
		}
		return err
	})
	if err != nil {
		err = fmt.Errorf("sweeping blobs: %w", err)
	}
	return freed, err
}

// name is whose and which blob a file is.
func (b *blobs) name(path string) (tenant, blob string, ok bool) {
	relative, err := filepath.Rel(b.dir, path)
	parts := strings.Split(relative, string(filepath.Separator))
	if err != nil || len(parts) != 4 {
		return "", "", false
	}
	name, err := folders.DecodeString(strings.ToUpper(parts[0]))
	d := digest.NewDigestFromEncoded(digest.SHA256, parts[3])
	return string(name), d.String(), err == nil && d.Validate() == nil
}

// remove removes a blob, unless it has been asked for meanwhile, and returns its size.
func (b *blobs) remove(path string, before time.Time) (int64, error) {
	b.sweeping.Lock()
	defer b.sweeping.Unlock()
	info, err := os.Stat(path)
	if err == nil && info.ModTime().Before(before) {
		err = os.Remove(path)
		if err == nil {
			return info.Size(), nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return 0, err
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
