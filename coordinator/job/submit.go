package job

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/distribution/reference"
	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/gitref"
	"github.com/archfarm/archfarm/coordinator/job/spec"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/fault"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Resolve finds the commit of a git context: gitref.Resolve.
type Resolve func(ctx context.Context, git *archfarmv1.GitContext, auth gitref.Auth) (*archfarmv1.Source, error)

// Submit implements archfarmv1.JobServiceServer.
func (s *server) Submit(ctx context.Context, req *archfarmv1.SubmitRequest) (resp *archfarmv1.SubmitResponse, err error) {
	defer func() { s.metrics.submitted.WithLabelValues(status.Code(err).String()).Inc() }()
	who := identity.FromContext(ctx)
	if !who.Builds() {
		return nil, status.Errorf(codes.PermissionDenied, "submitting a job: %s may not build", who)
	}
	if err := spec.Validate(req); err != nil {
		return nil, err
	}
	digest, err := digestOf(req)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "submitting a job: %v", err)
	}
	tenant := tenantOf(who)
	if there, err := s.earlier(ctx, tenant, req.GetRequestId(), digest); err != nil || there != nil {
		return there, err
	}
	j, err := s.prepare(ctx, who, req)
	if err != nil {
		return nil, err
	}
	j.SpecDigest = digest
	events, err := stored(jobEvent(j))
	if err != nil {
		return nil, status.Errorf(codes.Internal, "submitting a job: %v", err)
	}
	j, created, err := s.Store.Submit(ctx, j, events)
	if errors.Is(err, store.ErrConflict) {
		return nil, taken(req.GetRequestId(), j.ID)
	}
	if err != nil {
		return nil, unavailable("storing the job", err)
	}
	fault.Point(fault.JobSubmitted)
	if created {
		s.Log.Info("job submitted", "job", j.ID, "tenant", j.Tenant, "by", j.SubmittedBy, "tags", j.Tags)
	}
	return &archfarmv1.SubmitResponse{Job: message(j), Existed: !created}, nil
}

// credentialed ends the digest of a submission that credentials came with: Retry
// asks for it once they have been erased.
const credentialed = "+credentials"

// digestOf is what a repeated submission is compared by. What is secret is no part of it.
func digestOf(req *archfarmv1.SubmitRequest) (string, error) {
	digest, err := spec.SpecDigest(req.GetSpec())
	if len(req.GetCredentials()) > 0 {
		digest += credentialed
	}
	return digest, err
}

// earlier is the answer to a request that has made a job already, nil when it has
// not: what its git reference means by now does not matter.
func (s *server) earlier(ctx context.Context, tenant, request, digest string) (*archfarmv1.SubmitResponse, error) {
	j, err := s.Store.JobOfRequest(ctx, tenant, request)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return nil, nil
	case err != nil:
		return nil, unavailable("looking for an earlier submission", err)
	case j.SpecDigest != digest:
		return nil, taken(request, j.ID)
	}
	return &archfarmv1.SubmitResponse{Job: message(j), Existed: true}, nil
}

func taken(request, job string) error {
	return status.Errorf(codes.AlreadyExists, "submitting a job: the request id %q made job %s, of another specification: choose a new one", request, job)
}

// prepare makes a job of a valid request.
func (s *server) prepare(ctx context.Context, who identity.Identity, req *archfarmv1.SubmitRequest) (store.Job, error) {
	now := time.Now()
	id, err := uuid.NewV7()
	if err != nil {
		return store.Job{}, status.Errorf(codes.Internal, "submitting a job: %v", err)
	}
	j := store.Job{
		ID: id.String(), RequestID: req.GetRequestId(), Tenant: tenantOf(who), SubmittedBy: who.Name, Pools: who.Pools,
		Priority: int(req.GetSpec().GetPriority()), State: store.Queued,
	}
	what := spec.Normalize(req.GetSpec())
	if err := s.pin(ctx, j.Tenant, what, req.GetSecrets()); err != nil {
		return j, err
	}
	j.Context = what.GetContext().GetDigest()
	if j.Tags, err = spec.Tags(what, what.GetContext().GetSource(), now); err != nil {
		return j, err
	}
	for _, tag := range j.Tags {
		named, err := reference.ParseNormalizedNamed(tag)
		if err != nil {
			return j, status.Errorf(codes.InvalidArgument, "submitting a job: the tag %q: %v", tag, err)
		}
		if !slices.Contains(j.Repositories, named.Name()) {
			j.Repositories = append(j.Repositories, named.Name())
		}
	}
	for _, platform := range what.GetPlatforms() {
		j.Legs = append(j.Legs, store.Leg{Platform: platform, State: store.Queued})
	}
	if j.Sealed, err = sealed(s.Key, j.Tenant, j.ID, req); err != nil {
		return j, status.Errorf(codes.Internal, "submitting a job: %v", err)
	}
	j.Spec, err = proto.Marshal(what)
	if err != nil {
		return j, status.Errorf(codes.Internal, "submitting a job: %v", err)
	}
	return j, nil
}

// pin makes sure that what the job needs is there, and what it names is the same
// whenever it runs: secrets, an uploaded context, the commit of a git context.
func (s *server) pin(ctx context.Context, tenant string, what *archfarmv1.JobSpec, own map[string][]byte) error {
	available, err := stocked(ctx, s.Key, s.Store, tenant, what)
	var none *noSecretError
	switch {
	case errors.As(err, &none):
		return violation(fmt.Sprintf("spec.secrets[%d].name", none.index), none.Error())
	case isSealed(err):
		return status.Errorf(codes.FailedPrecondition, "submitting a job: %v", err)
	case err != nil:
		return unavailable("submitting a job", err)
	}
	for id, value := range own {
		available[id] = value
	}
	if git := what.GetContext().GetGit(); git != nil {
		return s.resolve(ctx, what.GetContext(), available)
	}
	return s.uploaded(ctx, tenant, what.GetContext().GetDigest(), codes.InvalidArgument)
}

func (s *server) resolve(ctx context.Context, from *archfarmv1.BuildContext, secrets map[string][]byte) error {
	auth, err := gitref.AuthFor(from.GetGit().GetUrl(), secrets)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "submitting a job: %v", err)
	}
	from.Source, err = s.Resolve(ctx, from.GetGit(), auth)
	return err
}

// uploaded makes sure that a context is there and is kept.
func (s *server) uploaded(ctx context.Context, tenant, digest string, code codes.Code) error {
	err := s.Contexts.Exists(ctx, tenant, digest)
	switch {
	case errors.Is(err, store.ErrNotFound) && code == codes.InvalidArgument:
		return violation("spec.context.digest", err.Error())
	case errors.Is(err, store.ErrNotFound):
		return status.Error(code, err.Error())
	case err != nil:
		return unavailable("looking for the context", err)
	}
	return nil
}

// violation is InvalidArgument because of one field.
func violation(field, text string) error {
	st, err := status.New(codes.InvalidArgument, "reading the job: "+field+": "+text).WithDetails(
		&errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: text}}})
	return cmp.Or(err, st.Err())
}

// unavailable is an error of the store: it may be there again.
func unavailable(doing string, err error) error {
	code := codes.Unavailable
	switch {
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, store.ErrCorrupt):
		code = codes.DataLoss
	}
	return status.Errorf(code, "%s: %v", doing, err)
}

// tenantOf is whose jobs a caller's are.
func tenantOf(who identity.Identity) string { return cmp.Or(who.Tenant, identity.DefaultTenant) }
