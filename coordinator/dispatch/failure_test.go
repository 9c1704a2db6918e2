package dispatch

import (
	"errors"
	"testing"

	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestWithVertex_NamesTheStepAsTheProgressDoes(t *testing.T) {
	t.Parallel()
	theirs, ours := digest.FromString("worker"), digest.FromString("client")
	source := &errdefs.Source{Info: &pb.SourceInfo{Filename: "Dockerfile"}}
	worker := grpcerrors.ToGRPC(t.Context(), errdefs.WithSource(errdefs.WrapVertex(errors.New("exit code: 1"), theirs), source))
	got := withVertex(worker, func(d string) string {
		if d != theirs.String() {
			t.Errorf("asked to translate %s", d)
		}
		return ours.String()
	})
	var vertex *errdefs.VertexError
	var src *errdefs.SourceError
	err := grpcerrors.FromGRPC(got)
	if !errors.As(err, &vertex) || vertex.GetDigest() != ours.String() {
		t.Errorf("the vertex is %v", vertex)
	}
	if !errors.As(err, &src) {
		t.Error("the source is lost")
	}
	if status.Convert(got).Message() != status.Convert(worker).Message() || status.Code(got) != status.Code(worker) {
		t.Errorf("error %v became %v", worker, got)
	}
}

func TestWithVertex_LeavesOtherErrorsAlone(t *testing.T) {
	t.Parallel()
	never := func(d string) string { t.Errorf("asked to translate %s", d); return d }
	for _, err := range []error{nil, errors.New("plain"), status.Error(codes.NotFound, "no details")} {
		if got := withVertex(err, never); got != err { //nolint:errorlint // this very error
			t.Errorf("%v became %v", err, got)
		}
	}
}
