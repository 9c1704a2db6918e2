package store

import (
	"context"
	"time"
)

// BindingState is how far a binding is.
type BindingState string

// A binding is Pending from its transaction on; then the tag has been pushed and
// read back, or it has not and never will be.
const (
	Pending   BindingState = "pending"
	Published BindingState = "published"
	Undone    BindingState = "undone"
)

// Publication is an index, or a single image, on its way to its tags.
type Publication struct {
	ID     string
	Tenant string
	// Job or Build, which one it is, names where it comes from: a job's id, or the
	// reference of a build at the endpoint.
	Job, Build string
	// MediaType and Blob are the content, whose digest is Digest.
	Digest    string
	MediaType string
	Blob      []byte
	Insecure  bool // plain HTTP and unknown certificates are allowed
	Source    Source
	Bindings  []Binding
	Created   time.Time
}

// Source is the commit that was built; all of it may be unknown.
type Source struct {
	URL        string
	Commit     string
	Branch     string
	Tag        string
	CommitTime time.Time
}

// Binding is what a tag was bound to.
type Binding struct {
	// ID grows with time.
	ID          int64
	Publication string
	Repository  string // normalized, with the host
	Tag         string
	Digest      string
	Immutable   bool
	State       BindingState
	Bound       time.Time
	Ended       time.Time // published or undone; zero: pending

	Job, Build string // as the publication's
	Tenant     string
	Source     Source
}

// Decide tells whether a tag may be bound, given what it is bound to now (nil: to
// nothing), what was published last. An error ends the transaction and is returned
// as it is. It must not call the store, and may be called more than once.
type Decide func(wanted Binding, current *Binding) error

// Ledger remembers, for every tag, which digest it means, and since when.
type Ledger interface {
	// Bind creates a publication and its bindings, all Pending, in one transaction,
	// under a lease like that of a job (Lease.Job is the publication's ID). ErrBusy,
	// wrapped in a *BusyError, when another publication's pending binding holds one of
	// the tags, whether or not its lease has ended. Binding a publication again whose ID is
	// there returns it as it is, with a new lease, unless another owner's has not
	// ended (ErrLeaseLost).
	Bind(ctx context.Context, p Publication, owner string, lease time.Duration, decide Decide) (Publication, Lease, error)
	// RenewPublication extends a lease; ErrLeaseLost.
	RenewPublication(ctx context.Context, l Lease) (Lease, error)
	// Settle ends bindings, by their IDs, that are pending; once none is, the
	// publication's lease and Blob are erased. ErrLeaseLost.
	Settle(ctx context.Context, l Lease, states map[int64]BindingState) error
	// Abandoned leases a publication that has pending bindings and no lease;
	// ErrNotFound when there is none. Jobs: whether to return a job's, or a build's.
	Abandoned(ctx context.Context, owner string, lease time.Duration, jobs bool) (Publication, Lease, error)
	// Takeover leases one publication whose lease has ended; ErrLeaseLost when it has
	// not, ErrNotFound when nothing of it is pending.
	Takeover(ctx context.Context, id, owner string, lease time.Duration) (Publication, Lease, error)
	// PublicationOf returns the latest publication of a job, its bindings included; ErrNotFound.
	PublicationOf(ctx context.Context, job string) (Publication, error)
	// Bindings returns those of a repository, or of one tag of it, the newest first,
	// before an ID (0: from the start).
	Bindings(ctx context.Context, tenants []string, repository, tag string, before int64, limit int) ([]Binding, error)
	// Current returns the binding that was published last; ErrNotFound.
	Current(ctx context.Context, repository, tag string) (Binding, error)
}

// BusyError is ErrBusy, naming who holds the tag.
type BusyError struct {
	Holder Binding
}

func (e *BusyError) Error() string {
	return e.Holder.Repository + ":" + e.Holder.Tag + " is being published by another build: " + ErrBusy.Error()
}

// Unwrap makes it ErrBusy.
func (e *BusyError) Unwrap() error { return ErrBusy }
