package endpoint_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/history"
)

// record makes a build of one leg, which has ended.
func (f *farm) record(t *testing.T, ref string, legs ...history.Leg) {
	t.Helper()
	b := f.begin(t, ref)
	rec := f.history.Begin(t.Context(), &controlapi.SolveRequest{Ref: ref}, nil, b.Progress)
	b.Progress.Publish(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: "sha256:1", Name: "a step of " + ref}}})
	rec.Built(t.Context(), legs, nil)
	rec.Complete(legs, nil)
	b.Progress.Close()
}

// listen returns the records that a client gets.
func (f *farm) listen(ctx context.Context, t *testing.T, req *controlapi.BuildHistoryRequest) (out []*controlapi.BuildHistoryRecord) {
	t.Helper()
	stream, err := f.control().ListenBuildHistory(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	if header, err := stream.Header(); err != nil || len(header.Get("buildkit-current-timestamp")) != 1 {
		t.Errorf("header %v, %v", header, err)
	}
	for {
		event, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, event.GetRecord())
	}
}

func TestHistory_ClientsReadRecordsAndWhatTheyName(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		provenance := []byte(`{"provenance":1}`)
		desc := ocispecs.Descriptor{MediaType: "application/vnd.in-toto+json", Digest: digest.FromBytes(provenance), Size: int64(len(provenance))}
		w := f.worker(t, "w", &controlapi.BuildHistoryRecord{Ref: "another"}, &controlapi.BuildHistoryRecord{Ref: "leg", Result: &controlapi.BuildResultInfo{
			Attestations: []*controlapi.Descriptor{{MediaType: desc.MediaType, Digest: desc.Digest.String(), Size: desc.Size}},
		}})
		if err := content.WriteBlob(t.Context(), w.content, "x", bytes.NewReader(provenance), desc); err != nil {
			t.Fatal(err)
		}
		f.record(t, "b", history.Leg{Worker: "w", Ref: "leg"})
		got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{Ref: "b", EarlyExit: true})
		if len(got) != 1 || len(got[0].GetResult().GetAttestations()) != 1 {
			t.Fatalf("got %v", got)
		}
		store := proxy.NewContentStore(contentapi.NewContentClient(f.cc))
		if raw, err := content.ReadBlob(t.Context(), store, desc); err != nil || !bytes.Equal(raw, provenance) {
			t.Errorf("the provenance: %q, %v", raw, err)
		}
		unnamed := digest.FromString("unnamed").String()
		for name, call := range map[string]struct {
			want codes.Code
			err  error
		}{
			"unnamed": {codes.NotFound, second(contentapi.NewContentClient(f.cc).Info(t.Context(), &contentapi.InfoRequest{Digest: unnamed}))},
			"invalid": {codes.InvalidArgument, second(contentapi.NewContentClient(f.cc).Info(t.Context(), &contentapi.InfoRequest{Digest: "x"}))},
			"delete":  {codes.Unknown, second(contentapi.NewContentClient(f.cc).Delete(t.Context(), &contentapi.DeleteContentRequest{Digest: desc.Digest.String()}))},
		} {
			if status.Code(call.err) != call.want {
				t.Errorf("%s: %v", name, call.err)
			}
		}
	})
}

func second[T any](_ T, err error) error { return err }

func TestHistory_StatusOfAnEndedBuildIsReplayed(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.record(t, "b")
		time.Sleep(time.Hour) // nobody remembers the build itself
		stream, err := f.control().Status(t.Context(), &controlapi.StatusRequest{Ref: "b"})
		if err != nil {
			t.Fatal(err)
		}
		got, err := stream.Recv()
		if err != nil || got.GetVertexes()[0].GetName() != "a step of b" {
			t.Errorf("got %v, %v", got, err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	})
}

func TestHistory_ClientsChangeRecords(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.record(t, "b")
		if _, err := f.control().UpdateBuildHistory(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b", Pinned: true}); err != nil {
			t.Error(err)
		}
		if got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{EarlyExit: true}); len(got) != 1 || !got[0].GetPinned() {
			t.Errorf("pinned: %v", got)
		}
		var errs []error
		for range 2 {
			_, err := f.control().UpdateBuildHistory(t.Context(), &controlapi.UpdateBuildHistoryRequest{Ref: "b", Delete: true})
			errs = append(errs, err)
		}
		if errs[0] != nil || errs[1] == nil {
			t.Errorf("deleting twice: %v", errs)
		}
	})
}

func TestHistory_ListeningGoesOnUntilTheClientLeaves(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		stream, err := f.control().ListenBuildHistory(ctx, &controlapi.BuildHistoryRequest{Ref: "b", ActiveOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		f.record(t, "another")
		f.record(t, "b")
		var got []controlapi.BuildHistoryEventType
		begun := time.Now()
		for {
			event, err := stream.Recv()
			if err != nil {
				if status.Code(err) != codes.DeadlineExceeded || time.Since(begun) != time.Hour {
					t.Errorf("got %v after %v", err, time.Since(begun))
				}
				break
			}
			got = append(got, event.GetType())
		}
		if !slices.Equal(got, []controlapi.BuildHistoryEventType{controlapi.BuildHistoryEventType_STARTED, controlapi.BuildHistoryEventType_COMPLETE}) {
			t.Errorf("heard %v", got)
		}
	})
}

func TestHistory_TheProbeOfTheFeatureGetsAnEmptyStream(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		f.record(t, "b")
		if got := f.listen(t.Context(), t, &controlapi.BuildHistoryRequest{Ref: "buildx-test-history-api-feature", ActiveOnly: true, EarlyExit: true}); len(got) > 0 {
			t.Errorf("got %v", got)
		}
	})
}
