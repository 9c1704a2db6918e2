package publish

import (
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/store"
)

// judge tells why a tag may not be bound, given what it means by the ledger: it is
// immutable and means something else, or an older commit would replace a newer one.
// Errors are FailedPrecondition.
func judge(wanted store.Binding, current *store.Binding, overwriteNewer bool) error {
	switch {
	case current == nil, current.Digest == wanted.Digest:
		return nil
	case wanted.Immutable:
		return status.Errorf(codes.FailedPrecondition,
			"publishing %s:%s as %s: the tag is immutable, and has been %s since %s, when %s bound it: choose another tag, or have the operator's tag policy make it mutable",
			wanted.Repository, wanted.Tag, wanted.Digest, current.Digest, moment(current.Bound), origin(wanted, *current))
	case !overwriteNewer && older(wanted.Source, current.Source):
		return status.Errorf(codes.FailedPrecondition,
			"publishing %s:%s as %s: it is of commit %s of %s, older than commit %s of %s that the tag means now (%s, by %s): build the newer commit, or ask for overwriting newer ones",
			wanted.Repository, wanted.Tag, wanted.Digest, wanted.Source.Commit, moment(wanted.Source.CommitTime),
			current.Source.Commit, moment(current.Source.CommitTime), current.Digest, origin(wanted, *current))
	}
	return nil
}

// older tells whether a commit is known to be older than another of the same
// repository.
func older(a, b store.Source) bool {
	return a.URL == b.URL && !a.CommitTime.IsZero() && !b.CommitTime.IsZero() && a.CommitTime.Before(b.CommitTime)
}

// foreign tells why an immutable tag may not be pushed when the registry has
// another digest behind it that nobody here has put there.
func foreign(wanted store.Binding, found string) error {
	return status.Errorf(codes.FailedPrecondition,
		"publishing %s:%s as %s: the tag is immutable, and is %s in the registry, where somebody else than this farm has put it: choose another tag, or remove that one from the registry",
		wanted.Repository, wanted.Tag, wanted.Digest, found)
}

// origin names what a binding comes from. Another tenant's is not named.
func origin(wanted, current store.Binding) string {
	switch {
	case wanted.Tenant != current.Tenant:
		return "another tenant's build"
	case current.Job != "":
		return "job " + current.Job
	case current.Build != "":
		return "build " + current.Build
	}
	return "a build"
}

func moment(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// aside is a refusal as a warning, where the policy is to warn.
func aside(err error) string {
	return fmt.Sprintf("tag policy: %s (published all the same: the policy for this repository is to warn)", status.Convert(err).Message())
}
