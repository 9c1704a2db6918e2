package dispatch_test

import (
	"fmt"
	"strings"
	"testing"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/manifest"
)

// ListenBuildHistory tells of an image for each of the attempt's exporters, unless
// the daemon keeps no history.
func (d *daemon) ListenBuildHistory(req *controlapi.BuildHistoryRequest, stream controlapi.Control_ListenBuildHistoryServer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	j, ok := d.jobs[req.GetRef()]
	if !ok || d.Forgetful {
		return nil
	}
	results := map[int64]*controlapi.Descriptor{}
	for i := range j.req.GetExporters() {
		blob := fmt.Appendf(nil, `{"schemaVersion":2,"made by":%q,"for":%d}`, d.name, i)
		dgst := digest.FromBytes(blob)
		d.blobs[dgst.String()] = blob
		results[int64(i)] = &controlapi.Descriptor{MediaType: ocispecs.MediaTypeImageIndex, Digest: dgst.String(), Size: int64(len(blob))}
	}
	return stream.Send(&controlapi.BuildHistoryEvent{Type: controlapi.BuildHistoryEventType_COMPLETE, Record: &controlapi.BuildHistoryRecord{
		Ref: req.GetRef(), Result: &controlapi.BuildResultInfo{Results: results},
	}})
}

// images asks for images of these names, to be pushed where there is a name.
func images(req *controlapi.SolveRequest, names ...string) *controlapi.SolveRequest {
	for _, name := range names {
		e := &controlapi.Exporter{Type: "image", Attrs: map[string]string{}}
		if name != "" {
			e.Attrs["name"], e.Attrs["push"] = name, "true"
		}
		req.Exporters = append(req.Exporters, e)
	}
	return req
}

func TestBuild_EachImageExporterHasItsOwnIndexes(t *testing.T) {
	bubble(t, func(t *testing.T, f *farm) {
		amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
		b, end := f.begin(t.Context(), t, images(request("b", both, ""), "r/a:1", "", "r/b:1", "r/c:1"))
		out := must(b.Export(t.Context(), built(t, b)))(t)
		if len(out.Images) != 3 { // of the one that is neither pushed nor described, nobody learns
			t.Fatalf("images %v", out.Images)
		}
		for i, exporter := range []int{0, 2, 3} {
			image := out.Images[i]
			if image.Exporter != exporter || len(image.Legs) != 2 {
				t.Fatalf("image %d: %+v", i, image)
			}
			for leg, name := range []string{"amd", "arm"} {
				want := fmt.Sprintf(`"made by":%q,"for":%d`, name, exporter)
				if exporter == 3 { // described by the answer
					want = fmt.Sprintf(`"made by":%q}`, name)
				}
				if blob := string(image.Legs[leg].Blob); !strings.Contains(blob, want) {
					t.Errorf("image %d of %s is %s, want %s", i, name, blob, want)
				}
			}
		}
		end(nil)
		f.idle(t, amd, arm)
	})
}

func TestBuild_AWorkerWithoutHistoryCannotTellImagesApart(t *testing.T) {
	for name, test := range map[string]struct {
		names []string
		code  codes.Code
	}{
		"two that are pushed":     {[]string{"r/a:1", "r/b:1"}, codes.FailedPrecondition},
		"the last one is pushed":  {[]string{"", "r/b:1"}, codes.OK},
		"there is only one image": {[]string{"r/b:1"}, codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, f *farm) {
				amd, arm := f.worker(t, "amd", 1, amd64), f.worker(t, "arm", 1, arm64)
				amd.Forgetful, arm.Forgetful = true, true
				b, end := f.begin(t.Context(), t, images(request("b", both, ""), test.names...))
				_, err := b.Export(t.Context(), built(t, b))
				if status.Code(err) != test.code || err != nil && !strings.Contains(err.Error(), "[history]") {
					t.Errorf("got %v", err)
				}
				end(err)
				f.idle(t, amd, arm)
			})
		})
	}
}

func TestImage_IsCreatedWhenTheLastLegWasDone(t *testing.T) {
	t.Parallel()
	image := dispatch.Image{}
	if image.Created() != "" {
		t.Error("an image without legs was created")
	}
	for _, at := range []string{"2026-01-02T03:04:05Z", "2026-01-02T03:04:07Z", ""} {
		image.Legs = append(image.Legs, legMade(at))
	}
	if got := image.Created(); got != "2026-01-02T03:04:07Z" {
		t.Errorf("created %s", got)
	}
}

// legMade is a leg's image with a note of when it was made.
func legMade(at string) (leg manifest.Leg) {
	if at != "" {
		leg.Descriptor.Annotations = map[string]string{ocispecs.AnnotationCreated: at}
	}
	return leg
}
