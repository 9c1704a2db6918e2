package job

import (
	"context"

	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Leg is one attempt at the part of a job that is for one platform.
type Leg struct {
	Job     string
	Attempt int
	// Ref is the reference of its build at the endpoint, in the history and logs.
	Ref string
	// Who submitted the job: the build belongs to their tenant, and runs in their pools.
	Who      identity.Identity
	Spec     *archfarmv1.JobSpec
	Platform string
	// Repositories to push to, by digest only; none: nothing is pushed.
	Repositories []string
	// Dir is the unpacked context; empty: the context is a git commit.
	Dir string
	// Secrets by id, and the credentials of registries. Not to be logged or kept.
	Secrets     map[string][]byte
	Credentials []*archfarmv1.RegistryCredential
}

// Report takes what a leg's build tells: pieces of its progress, in order, and the
// worker that it runs on once that is known. Either may be empty.
type Report func(worker string, progress *archfarmv1.Progress)

// Builder builds legs.
type Builder interface {
	// Build returns the descriptor of what the leg pushed, which is empty when it
	// pushes nothing. Errors carry the code of the build: Unavailable,
	// ResourceExhausted and Aborted are worth another attempt, others are the
	// build's own.
	Build(ctx context.Context, leg Leg, report Report) (ocispecs.Descriptor, error)
}
