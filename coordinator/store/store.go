// Package store is the contract of the coordinator's durable state: jobs with
// their events, the ledger of tags, secrets, contexts and the build history. Its
// implementations are store/sqlite and store/postgres; store/storetest is the
// suite that both pass.
//
// A method has happened once it returned nil, whatever happens to the process or
// the machine after that. One that returned an error may have happened.
package store

import (
	"context"
	"errors"
	"io"
	"time"
)

// What methods answer, besides what the engine itself cannot do.
var (
	ErrNotFound = errors.New("not found")
	// ErrConflict: what is there contradicts the change.
	ErrConflict = errors.New("conflict")
	// ErrLeaseLost: somebody else has the job, or the publication, by now.
	ErrLeaseLost = errors.New("the lease was lost")
	// ErrBusy: somebody else's publication holds the tag; it ends, or its lease does.
	ErrBusy = errors.New("held by another publication")
	// ErrCorrupt: the database is damaged.
	ErrCorrupt = errors.New("the database is damaged")
)

// Store is the whole of it. All methods may be called concurrently, by several
// coordinators where the engine allows several.
type Store interface {
	Jobs
	Ledger
	Secrets
	Blobs
	History
	// Now is the database's clock, by which leases end.
	Now(ctx context.Context) (time.Time, error)
	// Wakes sends hints that something may have changed, until ctx ends. Hints can
	// be lost or needless: who waits polls too. A slow receiver misses some.
	Wakes(ctx context.Context) <-chan Wake
	// Shared tells whether other coordinators may have the same store open.
	Shared() bool
	Close() error
}

// Backuper is a store that can copy itself while it is in use.
type Backuper interface {
	// Backup writes a copy of the database as of one moment to a new file.
	Backup(ctx context.Context, path string) error
}

// Wake says what may have changed.
type Wake struct {
	// Job whose events or state changed; empty: there may be jobs to claim.
	Job string
}

// Secrets are sealed by the caller: the store sees no plain text.
type Secrets interface {
	// PutSecret creates or replaces.
	PutSecret(ctx context.Context, tenant, name string, sealed []byte) error
	// Secret returns ErrNotFound when there is none.
	Secret(ctx context.Context, tenant, name string) ([]byte, error)
	// ListSecrets returns them by name, without their contents.
	ListSecrets(ctx context.Context, tenant string) ([]SecretInfo, error)
	DeleteSecret(ctx context.Context, tenant, name string) error
	// ChangeSecrets replaces each secret, of all tenants, by what change returns, or
	// removes it for nil; each for itself. An error of change ends it, and is returned
	// as it is. It must not call the store, and may be called more than once.
	ChangeSecrets(ctx context.Context, change func(tenant, name string, sealed []byte) ([]byte, error)) error
}

// SecretInfo is what may be told of a secret.
type SecretInfo struct {
	Name    string
	Updated time.Time
}

// MaxBlob bounds a blob, in bytes.
const MaxBlob = 8 << 20

// Blobs are the chunks of contexts and their manifests, by digest ("sha256:…"),
// each tenant's for itself. One that nothing has named for a while is swept.
type Blobs interface {
	// MissingBlobs returns those of the digests that are not there, and keeps the
	// others from being swept for as long as a new blob.
	MissingBlobs(ctx context.Context, tenant string, digests []string) ([]string, error)
	// PutBlob stores data, whose digest the caller has computed. Putting it again
	// changes nothing but the time by which it is swept.
	PutBlob(ctx context.Context, tenant, digest string, data []byte) error
	// Blob opens one; ErrNotFound.
	Blob(ctx context.Context, tenant, digest string) (io.ReadCloser, error)
	// SweepBlobs removes blobs that were last put or asked for before a time, unless
	// named returns true for them; it returns how many bytes that freed. Named is
	// called without a transaction open.
	SweepBlobs(ctx context.Context, before time.Time, named func(tenant, digest string) bool) (int64, error)
}
