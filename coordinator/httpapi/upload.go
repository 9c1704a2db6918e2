package httpapi

import (
	"errors"
	"io/fs"
	"net/http"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/contextpack"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// upload stores an archive as a context. A Dockerfile that is not called so is named
// by the query: what a context lacks is better told before a job is made of it.
func (a *api) upload(w http.ResponseWriter, r *http.Request) {
	select {
	case a.uploads <- struct{}{}:
		defer func() { <-a.uploads }()
	default:
		fail(w, status.Errorf(codes.ResourceExhausted, "%d archives are being uploaded already: try again", cap(a.uploads)))
		return
	}
	answer, err := a.store(r)
	if err != nil {
		fail(w, tooLarge(r, err))
		return
	}
	body, err := answers.Marshal(answer)
	if err != nil {
		fail(w, status.Errorf(codes.Internal, "writing the answer: %v", err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(body, '\n')) // whoever does not read it has gone
}

func (a *api) store(r *http.Request) (*archfarmv1.UploadContextResponse, error) {
	for name := range r.URL.Query() {
		if name != "dockerfile" {
			return nil, status.Errorf(codes.InvalidArgument, "there is no parameter %.80q: dockerfile is possible", name)
		}
	}
	// Whether the caller may upload at all, before gigabytes have been sent.
	if _, err := a.jobs.FindMissing(r.Context(), &archfarmv1.FindMissingRequest{}); err != nil {
		return nil, err
	}
	source, err := contextpack.Tarball(r.Body, contextpack.Options{Dockerfile: r.URL.Query().Get("dockerfile")})
	if err != nil {
		if disk := (*fs.PathError)(nil); errors.As(err, &disk) {
			return nil, &runtime.HTTPStatusError{HTTPStatus: http.StatusInsufficientStorage, Err: status.Errorf(codes.Internal, "keeping the archive in the coordinator's temporary folder: %v", disk.Err)}
		}
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	defer source.Close() //nolint:errcheck // a temporary file that was only read
	digest, stats, err := contextpack.Upload(r.Context(), a.jobs, source, nil)
	if err != nil {
		return nil, err
	}
	return &archfarmv1.UploadContextResponse{Digest: digest, Size: stats.Size, Stored: stats.Sent}, nil
}
