package job

import (
	"cmp"
	"context"
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/google/uuid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/archfarm/archfarm/coordinator/job/spec"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/identity"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// server is the JobService.
type server struct {
	archfarmv1.UnimplementedJobServiceServer
	Options
	feed      *feed
	cancelled func(job string) // for the runner here, if it has the job
	metrics   *metrics
}

func newServer(o Options, f *feed, cancelled func(string), m *metrics) *server {
	return &server{Options: o, feed: f, cancelled: cancelled, metrics: m}
}

// FindMissing implements archfarmv1.JobServiceServer.
func (s *server) FindMissing(ctx context.Context, req *archfarmv1.FindMissingRequest) (*archfarmv1.FindMissingResponse, error) {
	return s.Contexts.FindMissing(ctx, req)
}

// UploadContext implements archfarmv1.JobServiceServer.
func (s *server) UploadContext(stream grpc.ClientStreamingServer[archfarmv1.UploadContextRequest, archfarmv1.UploadContextResponse]) error {
	return s.Contexts.UploadContext(stream)
}

// Get implements archfarmv1.JobServiceServer.
func (s *server) Get(ctx context.Context, req *archfarmv1.GetRequest) (*archfarmv1.GetResponse, error) {
	j, err := s.find(ctx, req.GetId())
	if err != nil {
		return nil, err
	}
	return &archfarmv1.GetResponse{Job: message(j)}, nil
}

// prefix is the beginning of an id, or all of it.
var prefix = regexp.MustCompile(`^[0-9a-f-]{4,36}$`)

// find returns the job that an id, or the beginning of one, names, if the caller may
// see it.
func (s *server) find(ctx context.Context, id string) (store.Job, error) {
	none := status.Errorf(codes.NotFound, "there is no job %q", id)
	if id == "" {
		return store.Job{}, status.Error(codes.InvalidArgument, "the id of a job is required")
	}
	if !prefix.MatchString(id) {
		return store.Job{}, none
	}
	if len(id) < 36 {
		ids, err := s.Store.FindJobs(ctx, id)
		switch {
		case err != nil:
			return store.Job{}, unavailable("looking for the job", err)
		case len(ids) == 0:
			return store.Job{}, none
		case len(ids) > 1:
			return store.Job{}, status.Errorf(codes.InvalidArgument, "more than one id may begin with %q: give more of it", id)
		}
		id = ids[0]
	}
	j, err := s.Store.Job(ctx, id)
	switch {
	case errors.Is(err, store.ErrNotFound):
		return store.Job{}, none
	case err != nil:
		return store.Job{}, unavailable("looking for the job", err)
	case !identity.FromContext(ctx).MaySee(j.Tenant):
		return store.Job{}, none
	}
	return j, nil
}

const (
	defaultPage = 100
	maxPage     = 1000
	// maxAnswer bounds a page in bytes: clients of gRPC take 4 MiB unless told otherwise.
	maxAnswer = 3 << 20
)

func pageSize(asked int32) (int, error) {
	if asked < 0 || asked > maxPage {
		return 0, status.Errorf(codes.InvalidArgument, "page_size: %d is not between 1 and %d, or 0 for %d", asked, maxPage, defaultPage)
	}
	return int(cmp.Or(asked, defaultPage)), nil
}

// seen are the tenants whose jobs a caller sees; nil: all.
func seen(ctx context.Context) []string {
	who := identity.FromContext(ctx)
	if who.Operates() {
		return nil
	}
	return []string{who.Tenant}
}

// List implements archfarmv1.JobServiceServer.
func (s *server) List(ctx context.Context, req *archfarmv1.ListRequest) (*archfarmv1.ListResponse, error) {
	q, err := query(ctx, req)
	if err != nil {
		return nil, err
	}
	jobs, err := s.Store.List(ctx, q)
	if err != nil {
		return nil, unavailable("listing jobs", err)
	}
	resp, size := &archfarmv1.ListResponse{}, 0
	for i, j := range jobs {
		m := message(j)
		if size += proto.Size(m); size > maxAnswer && i > 0 {
			resp.NextPageToken = jobs[i-1].ID
			return resp, nil
		}
		resp.Jobs = append(resp.Jobs, m)
	}
	if len(jobs) == q.Limit {
		resp.NextPageToken = jobs[len(jobs)-1].ID
	}
	return resp, nil
}

func query(ctx context.Context, req *archfarmv1.ListRequest) (q store.Query, err error) {
	q = store.Query{Tenants: seen(ctx), Before: req.GetPageToken()}
	if q.Limit, err = pageSize(req.GetPageSize()); err != nil {
		return q, err
	}
	if q.Before != "" && uuid.Validate(q.Before) != nil {
		return q, status.Error(codes.InvalidArgument, "page_token: it is none that List returned")
	}
	for _, wanted := range req.GetStates() {
		found := false
		for s, m := range jobStates {
			if m == wanted {
				q.States, found = append(q.States, s), true
			}
		}
		if !found {
			return q, status.Errorf(codes.InvalidArgument, "states: there is no state %v", wanted)
		}
	}
	if q.Repository = req.GetRepository(); q.Repository != "" {
		if q.Repository, err = repositoryName(q.Repository); err != nil {
			return q, err
		}
	}
	if t := req.GetSince(); t != nil {
		if !t.IsValid() {
			return q, status.Error(codes.InvalidArgument, "since: it is no time")
		}
		q.Since = t.AsTime()
	}
	return q, nil
}

// repositoryName is a repository as it is stored.
func repositoryName(text string) (string, error) {
	named, err := reference.ParseNormalizedNamed(text)
	if err != nil {
		return "", status.Errorf(codes.InvalidArgument, "repository: %q: %v", text, err)
	}
	if !reference.IsNameOnly(named) {
		return "", status.Errorf(codes.InvalidArgument, "repository: %q has a tag or digest: leave it out", text)
	}
	return named.Name(), nil
}

// Cancel implements archfarmv1.JobServiceServer.
func (s *server) Cancel(ctx context.Context, req *archfarmv1.CancelRequest) (*archfarmv1.CancelResponse, error) {
	j, err := s.mine(ctx, req.GetId(), "cancelling a job")
	if err != nil {
		return nil, err
	}
	after := j // what it becomes if nobody runs it
	after.State, after.Error = store.Cancelled, ""
	after.Legs = slices.Clone(j.Legs)
	for i, l := range after.Legs {
		if !l.State.Ended() {
			after.Legs[i].State, after.Legs[i].Attempts = store.Cancelled, closed(l.Attempts, "", time.Now())
		}
	}
	events, err := stored(jobEvent(after))
	if err != nil {
		return nil, status.Errorf(codes.Internal, "cancelling job %s: %v", j.ID, err)
	}
	id := j.ID
	j, err = s.Store.Cancel(ctx, id, events)
	switch {
	case errors.Is(err, store.ErrConflict):
		return nil, status.Errorf(codes.FailedPrecondition, "job %s cannot be cancelled any more: its tags are being pushed", id)
	case errors.Is(err, store.ErrNotFound):
		return nil, status.Errorf(codes.NotFound, "there is no job %q", id)
	case err != nil:
		return nil, unavailable("cancelling the job", err)
	}
	s.feed.wake(j.ID)
	if !j.State.Ended() {
		s.cancelled(j.ID)
	}
	s.Log.Info("cancelling asked for", "job", j.ID, "by", identity.FromContext(ctx).String())
	return &archfarmv1.CancelResponse{Job: message(j)}, nil
}

// mine finds a job that the caller may change.
func (s *server) mine(ctx context.Context, id, doing string) (store.Job, error) {
	if who := identity.FromContext(ctx); !who.Builds() {
		return store.Job{}, status.Errorf(codes.PermissionDenied, "%s: %s may not build", doing, who)
	}
	return s.find(ctx, id)
}

// Retry implements archfarmv1.JobServiceServer.
func (s *server) Retry(ctx context.Context, req *archfarmv1.RetryRequest) (*archfarmv1.RetryResponse, error) {
	j, err := s.mine(ctx, req.GetId(), "retrying a job")
	if err != nil {
		return nil, err
	}
	platforms, err := legsOf(j, req.GetPlatforms())
	if err != nil {
		return nil, err
	}
	if !j.State.Ended() {
		return nil, status.Errorf(codes.FailedPrecondition, "job %s cannot be retried: it is %s; cancel it first", j.ID, j.State)
	}
	if err := s.complete(ctx, j); err != nil {
		return nil, err
	}
	events, err := stored(jobEvent(retried(j, platforms)))
	if err != nil {
		return nil, status.Errorf(codes.Internal, "retrying job %s: %v", j.ID, err)
	}
	id := j.ID
	j, err = s.Store.Retry(ctx, id, platforms, events)
	switch {
	case errors.Is(err, store.ErrConflict):
		return nil, status.Errorf(codes.FailedPrecondition, "job %s cannot be retried: %v", id, err)
	case errors.Is(err, store.ErrNotFound):
		return nil, status.Errorf(codes.NotFound, "there is no job %q", id)
	case err != nil:
		return nil, unavailable("retrying the job", err)
	}
	s.feed.wake(j.ID)
	s.Log.Info("job retried", "job", j.ID, "by", identity.FromContext(ctx).String(), "platforms", platforms)
	return &archfarmv1.RetryResponse{Job: message(j)}, nil
}

// legsOf are the platforms as the job's legs have them.
func legsOf(j store.Job, asked []string) ([]string, error) {
	var out, have []string
	for _, l := range j.Legs {
		have = append(have, l.Platform)
	}
	for _, name := range asked {
		platform, err := spec.Platform(name)
		if err != nil || !slices.Contains(have, platform) {
			return nil, status.Errorf(codes.InvalidArgument, "platforms: job %s has no leg for %q, only for %s", j.ID, name, strings.Join(have, ", "))
		}
		if !slices.Contains(out, platform) {
			out = append(out, platform)
		}
	}
	return out, nil
}

// retried is the job as store.Jobs.Retry makes it.
func retried(j store.Job, platforms []string) store.Job {
	j.State, j.Digest, j.Error, j.CancelRequested = store.Queued, "", "", false
	j.Started, j.Ended = time.Time{}, time.Time{}
	j.Retries++
	j.Legs = slices.Clone(j.Legs)
	for i, l := range j.Legs {
		if l.State != store.Succeeded || slices.Contains(platforms, l.Platform) {
			j.Legs[i] = store.Leg{Platform: l.Platform, State: store.Queued}
		}
	}
	return j
}

// complete makes sure that a job still has what it needs.
func (s *server) complete(ctx context.Context, j store.Job) error {
	what := &archfarmv1.JobSpec{}
	if err := proto.Unmarshal(j.Spec, what); err != nil {
		return status.Errorf(codes.DataLoss, "retrying job %s: its specification: %v", j.ID, err)
	}
	own := strings.HasSuffix(j.SpecDigest, credentialed)
	for _, ref := range what.GetSecrets() {
		own = own || ref.GetName() == ""
	}
	if own && len(j.Sealed) == 0 {
		return status.Errorf(codes.FailedPrecondition, "job %s cannot be retried: its secrets and credentials were erased when it had %s; submit it again", j.ID, j.State)
	}
	if j.Context == "" {
		return nil
	}
	return s.uploaded(ctx, j.Tenant, j.Context, codes.FailedPrecondition)
}
