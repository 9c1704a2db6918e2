package publish

import (
	"bytes"
	"net/http"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

func TestRegistry_BlobsThereAndBack(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{User: "me", Password: "it is me"})
	me := WithCredentials([]*archfarmv1.RegistryCredential{{Host: g.host, Username: "me", Password: "it is me"}}, false)
	blob := bytes.Repeat([]byte("cache "), 1000)
	d := ocispecs.Descriptor{MediaType: "application/vnd.buildkit.cacheconfig.v0", Digest: digest.FromBytes(blob), Size: int64(len(blob))}
	repository := g.host + "/app:ignored"

	if _, err := me.FetchBlob(t.Context(), repository, d); status.Code(err) != codes.NotFound {
		t.Errorf("before it is there: %v", err)
	}
	if err := me.PushBlob(t.Context(), repository, d, blob); err != nil {
		t.Fatal(err)
	}
	g.misbehave(nil)
	if err := me.PushBlob(t.Context(), repository, d, blob); err != nil {
		t.Fatal(err)
	}
	for _, r := range g.asked() {
		if strings.HasPrefix(r, http.MethodPost) || strings.HasPrefix(r, http.MethodPut) {
			t.Errorf("%s of a blob that is there", r)
		}
	}
	got, err := me.FetchBlob(t.Context(), repository, d)
	if err != nil || !bytes.Equal(got, blob) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	anybody := WithCredentials(nil, false)
	if _, err := anybody.FetchBlob(t.Context(), repository, d); status.Code(err) != codes.PermissionDenied {
		t.Errorf("anybody: %v", err)
	}
	if err := anybody.PushBlob(t.Context(), repository, d, blob); status.Code(err) != codes.PermissionDenied {
		t.Errorf("anybody: %v", err)
	}
	for name, other := range map[string]ocispecs.Descriptor{
		"too large": {Digest: d.Digest, Size: 5 << 20}, "a negative size": {Digest: d.Digest, Size: -1}, "no digest": {Digest: "x", Size: 1},
	} {
		if _, err := me.FetchBlob(t.Context(), repository, other); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRegistry_BlobThatIsAnotherIsRefused(t *testing.T) {
	t.Parallel()
	g := newRig(t, farmtest.RegistryOptions{})
	g.misbehave(func(w http.ResponseWriter, r *http.Request, _ func()) bool {
		if strings.Contains(r.URL.Path, "/blobs/") || strings.Contains(r.URL.Path, "/manifests/") {
			_, _ = w.Write([]byte("other"))
			return true
		}
		return false
	})
	anybody := WithCredentials(nil, false)
	d := ocispecs.Descriptor{MediaType: "x/y", Digest: digest.FromString("right"), Size: 5}
	if _, err := anybody.FetchBlob(t.Context(), g.host+"/app", d); status.Code(err) != codes.DataLoss {
		t.Errorf("blob: %v", err)
	}
	if _, err := anybody.FetchManifest(t.Context(), g.host+"/app", d.Digest); status.Code(err) != codes.DataLoss {
		t.Errorf("manifest: %v", err)
	}
}
