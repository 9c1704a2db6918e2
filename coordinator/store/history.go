package store

import (
	"context"
	"io"
	"time"
)

// BuildChunk is how much of a blob of the history is written and read at a time, in
// bytes.
const BuildChunk = 1 << 20

// Build is what the history remembers of a build at the endpoint that has ended.
type Build struct {
	Ref    string
	Tenant string
	// Record and Extent are the history's own, and not interpreted.
	Record, Extent []byte
	Pinned         bool
	Completed      time.Time
	// Size is that of the record with what it names, in bytes.
	Size int64
	// Blobs are the digests of what the record names, and is here. Builds, Build and
	// the others that return a record leave them out, and Places too.
	Blobs []string
	// Places tell which workers have what else it names.
	Places []Place
}

// Place is that a worker has a blob.
type Place struct {
	Digest, Worker string
}

// BuildBlob is a blob that is there.
type BuildBlob struct {
	Digest string
	Size   int64 // in bytes
}

// History is the records of builds, and the blobs that they name, by digest
// ("sha256:…"). A blob is there as long as a record names it or somebody holds it. A
// hold ends by itself an hour after its last use: whoever has it may have died.
type History interface {
	// PutBuild creates or replaces a record, and removes what only its predecessor
	// named. ErrNotFound when a blob that it names is not there.
	PutBuild(ctx context.Context, b Build) error
	// ChangeBuild replaces a record by what change makes of it; Blobs and Places that
	// are set there replace those it had, nil ones stay. An error of change ends the
	// transaction and is returned as it is. It must not call the store, and may be
	// called more than once. ErrNotFound.
	ChangeBuild(ctx context.Context, ref string, change func(*Build) error) error
	// RemoveBuild removes a record, and what only it named, and returns it; ErrNotFound.
	RemoveBuild(ctx context.Context, ref string) (Build, error)
	// Build returns a record; ErrNotFound.
	Build(ctx context.Context, ref string) (Build, error)
	// Builds returns records in the order of their references, those after a reference.
	Builds(ctx context.Context, after string, limit int) ([]Build, error)
	// BuildSizes returns all records, without Record and Extent, in no order.
	BuildSizes(ctx context.Context) ([]Build, error)
	// BuildPlaces returns the workers that have a blob, each once.
	BuildPlaces(ctx context.Context, digest string) ([]string, error)

	// PutBuildBlob stores a blob, whose digest the caller has computed, unless it is
	// there; it is the holder's from now on.
	PutBuildBlob(ctx context.Context, holder string, b BuildBlob, data io.ReaderAt) error
	// HoldBuildBlob makes a blob that is there the holder's; ErrNotFound.
	HoldBuildBlob(ctx context.Context, holder, digest string) (BuildBlob, error)
	// ReleaseBuildBlobs ends all that a holder has, and removes what nobody names.
	ReleaseBuildBlobs(ctx context.Context, holder string) error
	// BuildBlob tells of a blob; ErrNotFound.
	BuildBlob(ctx context.Context, digest string) (BuildBlob, error)
	// BuildBlobData returns a blob's nth chunk, from 0 on: BuildChunk bytes, the last
	// one fewer; ErrNotFound.
	BuildBlobData(ctx context.Context, digest string, n int64) ([]byte, error)
	// BuildBlobs returns blobs in the order of their digests, those after a digest.
	BuildBlobs(ctx context.Context, after string, limit int) ([]BuildBlob, error)
	// SweepBuildBlobs removes what nobody names or holds any more.
	SweepBuildBlobs(ctx context.Context) error
}
