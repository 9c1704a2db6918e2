package history

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/store"
)

// Leg is where a leg of a build ran: what is needed to ask its worker about it.
type Leg struct {
	Platform string `json:"platform"` // its key in the build's result
	Worker   string `json:"worker"`
	Ref      string `json:"ref"` // of the leg's own build on the worker
}

// extent is what belongs to a record.
type extent struct {
	Tenant string  `json:"-"` // whose build it was
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

// records is the history in the store.
type records struct {
	db    store.History
	blobs *blobs
	log   *slog.Logger
}

// openRecords opens the history in a store, with a folder for what is on its way
// there, and puts in order what a crash has left.
func openRecords(ctx context.Context, db store.History, dir string, log *slog.Logger) (*records, error) {
	if _, err := os.Stat(filepath.Join(dir, "history.db")); err == nil {
		log.Warn("the build records that an older archfarm has left are dropped: they are in the store from now on", "folder", dir)
	}
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return nil, fmt.Errorf("making the folder of the build history: %w", err)
	}
	if err := db.SweepBuildBlobs(ctx); err != nil {
		return nil, err
	}
	return &records{db: db, blobs: &blobs{db: db, dir: dir, log: log, fresh: map[digest.Digest]*fresh{}}, log: log}, nil
}

// stored is a record with its extent as the store has it.
func stored(record *controlapi.BuildHistoryRecord, e extent) (b store.Build, err error) {
	b = store.Build{
		Ref: record.GetRef(), Tenant: e.Tenant, Pinned: record.GetPinned(), Completed: record.GetCompletedAt().AsTime(),
		Blobs: []string{}, Places: []store.Place{},
	}
	var err1, err2 error
	b.Record, err1 = proto.Marshal(record)
	b.Extent, err2 = json.Marshal(e)
	b.Size = int64(len(b.Record))
	for _, one := range e.Blobs {
		b.Size += one.Size
	}
	for _, dgst := range e.digests() {
		b.Blobs = append(b.Blobs, dgst.String())
	}
	for _, p := range e.Places {
		b.Places = append(b.Places, store.Place{Digest: p.Digest.String(), Worker: p.Worker})
	}
	return b, errors.Join(err1, err2)
}

func restored(b store.Build) (*controlapi.BuildHistoryRecord, extent, error) {
	record := &controlapi.BuildHistoryRecord{}
	var e extent
	if err := errors.Join(proto.Unmarshal(b.Record, record), json.Unmarshal(b.Extent, &e)); err != nil {
		return nil, extent{}, fmt.Errorf("reading the record of build %q: %w", b.Ref, err)
	}
	e.Tenant = b.Tenant
	return record, e, nil
}

// get returns a record and its extent; nil when there is none.
func (s *records) get(ctx context.Context, ref string) (*controlapi.BuildHistoryRecord, extent, error) {
	b, err := s.db.Build(ctx, ref)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, extent{}, nil
	case err != nil:
		return nil, extent{}, err
	}
	return restored(b)
}

// page is how many records are read at a time.
const page = 100

// each passes all records and whose they are to f, or that of ref only, in the order
// of their references. One that cannot be read is passed over.
func (s *records) each(ctx context.Context, ref string, f func(record *controlapi.BuildHistoryRecord, tenant string)) error {
	visit := func(b store.Build) {
		record, _, err := restored(b)
		if err != nil {
			s.log.Error("a build record is passed over", "error", err)
			return
		}
		f(record, b.Tenant)
	}
	if ref != "" {
		b, err := s.db.Build(ctx, ref)
		if errors.Is(err, store.ErrNotFound) {
			return nil
		}
		if err == nil {
			visit(b)
		}
		return err
	}
	for after := ""; ; {
		some, err := s.db.Builds(ctx, after, page)
		if err != nil {
			return err
		}
		for _, b := range some {
			visit(b)
		}
		if len(some) < page {
			return nil
		}
		after = some[len(some)-1].Ref
	}
}

// sizes lists all records as the limits see them.
func (s *records) sizes(ctx context.Context) (all []kept, err error) {
	found, err := s.db.BuildSizes(ctx)
	for _, b := range found {
		all = append(all, kept{ref: b.Ref, completed: b.Completed, pinned: b.Pinned, size: b.Size})
	}
	return all, err
}

// put writes a record, and removes what only its predecessor named.
func (s *records) put(ctx context.Context, record *controlapi.BuildHistoryRecord, e extent) error {
	b, err := stored(record, e)
	if err != nil {
		return err
	}
	return s.db.PutBuild(ctx, b)
}

// change rewrites a record that is there. It returns the new one and whose it is, or
// os.ErrNotExist. It may call f more than once.
func (s *records) change(ctx context.Context, ref string, f func(*controlapi.BuildHistoryRecord, *extent)) (record *controlapi.BuildHistoryRecord, tenant string, err error) {
	err = s.db.ChangeBuild(ctx, ref, func(b *store.Build) error {
		var e extent
		if record, e, err = restored(*b); err != nil {
			return err
		}
		f(record, &e)
		tenant = e.Tenant
		*b, err = stored(record, e)
		return err
	})
	if errors.Is(err, store.ErrNotFound) {
		err = fmt.Errorf("changing the build record %s: %w", ref, os.ErrNotExist)
	}
	return record, tenant, err
}

// remove deletes a record and what only it named. It tells whether there was one.
func (s *records) remove(ctx context.Context, ref string) (e extent, existed bool, err error) {
	b, err := s.db.RemoveBuild(ctx, ref)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return extent{}, false, nil
	case err != nil:
		return extent{}, false, err
	}
	if json.Unmarshal(b.Extent, &e) != nil { // its legs' own records remain, until their workers' limits
		e = extent{}
	}
	e.Tenant = b.Tenant
	return e, true, nil
}

// workers lists who has a blob that a record names.
func (s *records) workers(ctx context.Context, dgst digest.Digest) ([]string, error) {
	return s.db.BuildPlaces(ctx, dgst.String())
}
