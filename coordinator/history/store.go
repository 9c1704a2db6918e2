package history

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
)

var (
	bucketRecords = []byte("records") // ref → BuildHistoryRecord
	bucketExtents = []byte("extents") // ref → extent
	bucketBlobs   = []byte("blobs")   // digest → how many records name it
	bucketPlaces  = []byte("places")  // digest, 0, ref → the worker that has it
)

// Leg is where a leg of a build ran: what is needed to ask its worker about it.
type Leg struct {
	Platform string `json:"platform"` // its key in the build's result
	Worker   string `json:"worker"`
	Ref      string `json:"ref"` // of the leg's own build on the worker
}

// extent is what belongs to a record.
type extent struct {
	Tenant string  `json:"tenant,omitempty"` // whose build it was
	Legs   []Leg   `json:"legs,omitempty"`
	Blobs  []blob  `json:"blobs,omitempty"`  // in this store
	Places []place `json:"places,omitempty"` // of blobs that stayed with a worker
}

type blob struct {
	Digest digest.Digest `json:"digest"`
	Size   int64         `json:"size"`
}

type place struct {
	Digest digest.Digest `json:"digest"`
	Worker string        `json:"worker"`
}

func (e *extent) digests() []digest.Digest {
	var out []digest.Digest
	for _, b := range e.Blobs {
		if !slices.Contains(out, b.Digest) {
			out = append(out, b.Digest)
		}
	}
	return out
}

// store is the history on disk. Each of its changes is one transaction.
type store struct {
	db    *bolt.DB
	blobs *blobs
}

// openStore opens the history in a folder, and puts in order what a crash has
// left. A history that cannot be read is an error that says how to proceed.
func openStore(ctx context.Context, dir string, log *slog.Logger) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the folder of the build history: %w", err)
	}
	db, err := openDB(filepath.Join(dir, "history.db"))
	if err != nil {
		return nil, err
	}
	s := &store{db: db}
	if s.blobs, err = openBlobs(ctx, filepath.Join(dir, "content"), s.names); err == nil {
		err = s.repair(ctx, log)
	}
	if err != nil {
		_ = db.Close()
		return nil, err
	}
	return s, nil
}

// openDB opens the database and reads all of it once: bbolt panics, or faults, on
// what is broken. Not by its own Check, nor without a free list on disk, as both
// panic in other goroutines.
func openDB(path string) (db *bolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("%v", cause)
		}
		if err != nil {
			err = fmt.Errorf("the build history %s cannot be read: %w; to start without it, move the folder %s away (builds and images are not affected)", path, err, filepath.Dir(path))
		}
	}()
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	if err := check(db); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

func check(db *bolt.DB) error {
	if err := db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketRecords, bucketExtents, bucketBlobs, bucketPlaces} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	return db.View(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketExtents, bucketBlobs, bucketPlaces} {
			if err := tx.Bucket(name).ForEach(func(_, _ []byte) error { return nil }); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketRecords).ForEach(func(ref, _ []byte) error {
			_, _, err := entry(tx, string(ref))
			return err
		})
	})
}

func (s *store) close() error { return s.db.Close() }

// repair removes blobs that no record names, and records that name blobs which
// are gone.
func (s *store) repair(ctx context.Context, log *slog.Logger) error {
	if err := s.blobs.sweep(ctx); err != nil {
		return fmt.Errorf("putting the build history in order: %w", err)
	}
	var broken []string
	if err := s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketExtents).ForEach(func(ref, raw []byte) error {
			var e extent
			if err := json.Unmarshal(raw, &e); err != nil {
				return err
			}
			for _, b := range e.Blobs {
				if _, err := s.blobs.Info(ctx, b.Digest); err != nil {
					broken = append(broken, string(ref))
					return nil
				}
			}
			return nil
		})
	}); err != nil {
		return fmt.Errorf("putting the build history in order: %w", err)
	}
	for _, ref := range broken {
		log.Warn("removing a build record whose content is gone", "build", ref)
		if _, _, err := s.remove(ref); err != nil {
			return fmt.Errorf("putting the build history in order: %w", err)
		}
	}
	return nil
}

// entry reads a record and its extent; nil when there is none.
func entry(tx *bolt.Tx, ref string) (*controlapi.BuildHistoryRecord, extent, error) {
	raw := tx.Bucket(bucketRecords).Get([]byte(ref))
	if raw == nil {
		return nil, extent{}, nil
	}
	record := &controlapi.BuildHistoryRecord{}
	if err := proto.Unmarshal(raw, record); err != nil {
		return nil, extent{}, fmt.Errorf("reading the record of build %q: %w", ref, err)
	}
	var e extent
	if err := json.Unmarshal(tx.Bucket(bucketExtents).Get([]byte(ref)), &e); err != nil {
		return nil, extent{}, fmt.Errorf("reading the record of build %q: %w", ref, err)
	}
	return record, e, nil
}

// get returns a record and its extent; nil when there is none.
func (s *store) get(ref string) (record *controlapi.BuildHistoryRecord, e extent, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		record, e, err = entry(tx, ref)
		return err
	})
	return record, e, err
}

// each passes all records to f, or that of ref only, in the order of their
// references.
func (s *store) each(ref string, f func(*controlapi.BuildHistoryRecord)) error {
	return s.db.View(func(tx *bolt.Tx) error {
		visit := func(key, raw []byte) error {
			record := &controlapi.BuildHistoryRecord{}
			if err := proto.Unmarshal(raw, record); err != nil {
				return fmt.Errorf("reading the record of build %q: %w", key, err)
			}
			f(record)
			return nil
		}
		if ref == "" {
			return tx.Bucket(bucketRecords).ForEach(visit)
		}
		if raw := tx.Bucket(bucketRecords).Get([]byte(ref)); raw != nil {
			return visit([]byte(ref), raw)
		}
		return nil
	})
}

// tenants tells whose builds the records are of, by reference.
func (s *store) tenants() (map[string]string, error) {
	out := map[string]string{}
	return out, s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketExtents).ForEach(func(key, raw []byte) error {
			var e extent
			if err := json.Unmarshal(raw, &e); err != nil {
				return fmt.Errorf("reading the record of build %q: %w", key, err)
			}
			out[string(key)] = e.Tenant
			return nil
		})
	})
}

// sizes lists all records as the limits see them.
func (s *store) sizes() (all []kept, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketRecords).ForEach(func(key, raw []byte) error {
			record, e, err := entry(tx, string(key))
			if err != nil {
				return err
			}
			k := kept{ref: string(key), completed: record.GetCompletedAt().AsTime(), pinned: record.GetPinned(), size: int64(len(raw))}
			for _, b := range e.Blobs {
				k.size += b.Size
			}
			all = append(all, k)
			return nil
		})
	})
	return all, err
}

// put writes a record, and removes what only its predecessor named.
func (s *store) put(record *controlapi.BuildHistoryRecord, e extent) error {
	raw, err := proto.Marshal(record)
	if err != nil {
		return err
	}
	rawExtent, err := json.Marshal(e)
	if err != nil {
		return err
	}
	ref := []byte(record.GetRef())
	var old extent
	if err := s.db.Update(func(tx *bolt.Tx) error {
		if _, old, err = entry(tx, record.GetRef()); err != nil {
			return err
		}
		if err := count(tx, e.digests(), +1); err != nil {
			return err
		}
		if err := count(tx, old.digests(), -1); err != nil {
			return err
		}
		if err := forgetPlaces(tx, record.GetRef(), old.Places); err != nil {
			return err
		}
		for _, p := range e.Places {
			if err := tx.Bucket(bucketPlaces).Put(placeKey(p.Digest, record.GetRef()), []byte(p.Worker)); err != nil {
				return err
			}
		}
		return errors.Join(tx.Bucket(bucketRecords).Put(ref, raw), tx.Bucket(bucketExtents).Put(ref, rawExtent))
	}); err != nil {
		return fmt.Errorf("writing the record of build %q: %w", record.GetRef(), err)
	}
	s.blobs.forget(old.digests()...)
	return nil
}

// change rewrites a record that is there. It returns the new one, or
// os.ErrNotExist.
func (s *store) change(ref string, f func(*controlapi.BuildHistoryRecord, *extent)) (*controlapi.BuildHistoryRecord, error) {
	record, e, err := s.get(ref)
	if err != nil {
		return nil, err
	}
	if record == nil {
		return nil, fmt.Errorf("changing the build record %s: %w", ref, os.ErrNotExist)
	}
	f(record, &e)
	return record, s.put(record, e)
}

// remove deletes a record and what only it named. It tells whether there was one.
func (s *store) remove(ref string) (e extent, existed bool, err error) {
	if err := s.db.Update(func(tx *bolt.Tx) error {
		var record *controlapi.BuildHistoryRecord
		if record, e, err = entry(tx, ref); err != nil || record == nil {
			return err
		}
		existed = true
		return errors.Join(
			count(tx, e.digests(), -1), forgetPlaces(tx, ref, e.Places),
			tx.Bucket(bucketRecords).Delete([]byte(ref)), tx.Bucket(bucketExtents).Delete([]byte(ref)),
		)
	}); err != nil {
		return extent{}, false, fmt.Errorf("removing the record of build %q: %w", ref, err)
	}
	s.blobs.forget(e.digests()...)
	return e, existed, nil
}

// count notes that one record more, or one less, names blobs.
func count(tx *bolt.Tx, digests []digest.Digest, by int) error {
	bucket := tx.Bucket(bucketBlobs)
	for _, dgst := range digests {
		n := by
		if raw := bucket.Get([]byte(dgst)); len(raw) == 8 {
			n += int(binary.BigEndian.Uint64(raw))
		}
		if n <= 0 {
			if err := bucket.Delete([]byte(dgst)); err != nil {
				return err
			}
			continue
		}
		if err := bucket.Put([]byte(dgst), binary.BigEndian.AppendUint64(nil, uint64(n))); err != nil {
			return err
		}
	}
	return nil
}

// names tells whether a record names a blob of this store.
func (s *store) names(dgst digest.Digest) (named bool, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		named = tx.Bucket(bucketBlobs).Get([]byte(dgst)) != nil
		return nil
	})
	return named, err
}

func placeKey(dgst digest.Digest, ref string) []byte { return []byte(string(dgst) + "\x00" + ref) }

func forgetPlaces(tx *bolt.Tx, ref string, places []place) error {
	for _, p := range places {
		if err := tx.Bucket(bucketPlaces).Delete(placeKey(p.Digest, ref)); err != nil {
			return err
		}
	}
	return nil
}

// workers lists who has a blob that a record names.
func (s *store) workers(dgst digest.Digest) (names []string, err error) {
	prefix := placeKey(dgst, "")
	err = s.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketPlaces).Cursor()
		for k, v := c.Seek(prefix); len(k) >= len(prefix) && string(k[:len(prefix)]) == string(prefix); k, v = c.Next() {
			if !slices.Contains(names, string(v)) {
				names = append(names, string(v))
			}
		}
		return nil
	})
	return names, err
}
