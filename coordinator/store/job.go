package store

import (
	"context"
	"time"
)

// State is how far a job is.
type State string

// The states of a job. Succeeded, Failed and Cancelled are ends; Retry leads back
// to Queued from them.
const (
	Queued     State = "queued"
	Running    State = "running"
	Publishing State = "publishing"
	Succeeded  State = "succeeded"
	Failed     State = "failed"
	Cancelled  State = "cancelled"
)

// Ended tells whether nothing more happens to a job by itself.
func (s State) Ended() bool { return s == Succeeded || s == Failed || s == Cancelled }

// Job is a job as it is stored. What the store does not have to understand is in
// Spec and Sealed.
type Job struct {
	// ID sorts by the time of creation.
	ID string
	// RequestID is unique within the tenant; empty for none.
	RequestID   string
	Tenant      string
	SubmittedBy string
	// Pools that the submitter may use; none: any.
	Pools []string
	// Spec is an archfarm.v1.JobSpec, its context resolved. SpecDigest is of the one
	// that was submitted, and compared when a RequestID comes again.
	Spec       []byte
	SpecDigest string
	// Sealed holds the job's secrets, encrypted; nil when there are none, or they
	// have been erased.
	Sealed []byte
	// Context is the digest of an uploaded context; empty for none.
	Context string
	// Tags are the references to publish, resolved; Repositories theirs, without
	// tags, by which List finds the job.
	Tags         []string
	Repositories []string
	Priority     int

	State   State
	Digest  string // of what was published
	Error   string
	Retries int
	// CancelRequested tells the holder of the lease to end the job.
	CancelRequested bool
	Coordinator     string // that has, or last had, the lease
	LastSeq         int64  // of the job's events

	Created, Started, Ended time.Time // zero: not yet
	Legs                    []Leg     // in the order of the specification's platforms
}

// Leg is the part of a job for one platform. Its state is Queued, Running,
// Succeeded, Failed or Cancelled.
type Leg struct {
	Platform string
	State    State
	// Descriptor, of what the leg pushed, is an OCI descriptor in JSON.
	Descriptor []byte
	Worker     string
	Error      string
	Attempts   []Attempt
}

// Attempt is one run of a leg.
type Attempt struct {
	Number       int // from 1
	Coordinator  string
	Worker       string
	Error        string
	Began, Ended time.Time // zero: not yet
}

// Event is something that happened to a job.
type Event struct {
	Seq  int64 // from 1, without gaps, assigned by the store
	Time time.Time
	Data []byte // an archfarm.v1.JobEvent without seq and time
}

// Lease is the right to change a job. It ends by itself.
type Lease struct {
	Job string
	// Epoch grows with each lease of the job: an older one changes nothing any more.
	Epoch int64
	Owner string
	// For is how long it lasts, from when it was asked for.
	For time.Duration
	// Asked is when, by this process's monotonic clock, which is before the lease
	// began by the database's.
	Asked time.Time
}

// Claimed is a job with the lease of it.
type Claimed struct {
	Job
	Lease Lease
}

// Update is a change to a job that happens as a whole or not at all.
type Update struct {
	// State of the job; empty: unchanged. An ended one erases the lease, and
	// Succeeded and Cancelled what is sealed.
	State  State
	Digest string // empty: unchanged
	Error  string // empty: unchanged; an end without one has none
	// Legs are those that have changed, as they are now, attempts included.
	Legs []Leg
	// Events to append, their sequence numbers ignored.
	Events []Event
}

// Query selects jobs. Empty fields select all.
type Query struct {
	// Tenants may be seen; nil: all.
	Tenants    []string
	States     []State
	Repository string
	Since      time.Time // created at or after
	// Before is the ID that the last page ended with.
	Before string
	Limit  int // at most 1000
}

// Jobs are the jobs and their events.
type Jobs interface {
	// Submit creates a job in state Queued, with its first events. When the tenant's
	// RequestID has been taken, it returns that job and false: with ErrConflict when
	// the SpecDigest differs.
	Submit(ctx context.Context, job Job, events []Event) (Job, bool, error)
	// Job returns a job by its id; ErrNotFound.
	Job(ctx context.Context, id string) (Job, error)
	// JobOfRequest returns the tenant's job that has the RequestID; ErrNotFound, also
	// when that is empty.
	JobOfRequest(ctx context.Context, tenant, requestID string) (Job, error)
	// FindJobs returns the ids, at most two, that begin with a prefix.
	FindJobs(ctx context.Context, prefix string) ([]string, error)
	// List returns jobs, the newest first.
	List(ctx context.Context, q Query) ([]Job, error)
	// Events returns up to limit events after a sequence number, in order.
	Events(ctx context.Context, id string, after int64, limit int) ([]Event, error)

	// Claim leases up to n jobs that have not ended and that nobody has a lease of,
	// those of the highest priority first, then the oldest. Queued becomes Running
	// by the holder's Update, not here.
	Claim(ctx context.Context, owner string, lease time.Duration, n int) ([]Claimed, error)
	// Renew extends a lease, and returns it and whether cancelling has been asked
	// for; ErrLeaseLost.
	Renew(ctx context.Context, l Lease) (renewed Lease, cancel bool, err error)
	// Release gives a lease back: the job is there to be claimed at once.
	Release(ctx context.Context, l Lease) error
	// Update changes a job if the lease is still good, and returns the sequence
	// number of its last event; ErrLeaseLost.
	Update(ctx context.Context, l Lease, u Update) (int64, error)

	// Cancel marks a job. One that nobody has a lease of ends at once, with the
	// events, as do its legs that have not ended. One that has ended is left as it
	// is. ErrConflict for one in state Publishing.
	Cancel(ctx context.Context, id string, events []Event) (Job, error)
	// Retry puts an ended job back into the queue, with the events: legs that have
	// not succeeded, and those of the platforms, become Queued, without attempts and
	// descriptors, Digest, Error and CancelRequested are cleared. ErrConflict for one
	// that has not ended.
	Retry(ctx context.Context, id string, platforms []string, events []Event) (Job, error)

	// Purge removes jobs that ended before a time, with their events, at most limit,
	// and returns how many there were.
	Purge(ctx context.Context, before time.Time, limit int) (int, error)
	// CountJobs returns how many jobs there are in each state that is not an end.
	CountJobs(ctx context.Context) (map[State]int, error)
	// ContextInUse tells whether a job that may still run names the context.
	ContextInUse(ctx context.Context, tenant, digest string) (bool, error)
}
