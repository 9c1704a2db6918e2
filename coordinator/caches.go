package coordinator

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	controlapi "github.com/moby/buildkit/api/services/control"
	ocispecs "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/archfarm/archfarm/coordinator/cache"
	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/progress"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/session"
	"github.com/archfarm/archfarm/coordinator/split"
)

// mergeCaches makes of the caches that the legs exported the ones that the client asked
// for. No tag of an image has moved by then, so one that fails leaves none behind.
func (c *coordinator) mergeCaches(ctx context.Context, b *dispatch.Build, req *controlapi.SolveRequest, exported *dispatch.Exported) error {
	var told dispatch.Cache
	for _, merging := range exported.Caches {
		if len(merging.Shares) == 0 { // as BuildKit's exporters do with an empty one
			continue
		}
		step := b.Progress.Step(merging.Step)
		desc, err := c.mergeCache(ctx, b, req, merging, cacheObserver{step})
		step.Done(err)
		if err != nil && !merging.IgnoreError {
			return fmt.Errorf("%s: %w", merging.Step, err)
		}
		if err != nil || told.Store != "" && merging.Store == "" {
			continue
		}
		// There is room for one: that of a folder, which the client lists there, else the last.
		raw, err := json.Marshal(desc)
		if err != nil {
			return err
		}
		told, exported.Response[dispatch.CacheManifest] = merging, string(raw)
	}
	return nil
}

func (c *coordinator) mergeCache(ctx context.Context, b *dispatch.Build, req *controlapi.SolveRequest, merging dispatch.Cache, tell cache.Observer) (ocispecs.Descriptor, error) {
	if merging.Ref != "" {
		registry := publish.Registry{Sessions: c.farm.Sessions.Manager(), Session: req.GetSession(), Insecure: merging.Insecure}
		return cache.Merge(ctx, cache.InRegistry(registry, merging.Ref), merging.Shares, merging.Format, tell)
	}
	store, err := b.ClientStore(ctx, merging.Store)
	if err != nil {
		return ocispecs.Descriptor{}, err
	}
	return cache.Merge(ctx, cache.AtClient(store), merging.Shares, merging.Format, tell)
}

// cacheObserver shows a merging as the step that it is.
type cacheObserver struct{ *progress.Step }

func (o cacheObserver) Status(text string) { o.Step.Status("cache", text) }

func (o cacheObserver) Warn(text string) {
	o.Step.Warn(&controlapi.VertexWarning{Level: 1, Short: []byte(text)})
}

// indexer reads the indexes of images whose caches builds import.
func indexer(sessions *session.Registry) func(context.Context, string, split.ImportedCache) (ocispecs.Index, error) {
	return func(ctx context.Context, id string, c split.ImportedCache) (index ocispecs.Index, err error) {
		registry := publish.Registry{Sessions: sessions.Manager(), Session: id, Insecure: c.Insecure}
		d, err := registry.Resolve(ctx, c.Ref)
		if err != nil || !images.IsIndexType(d.MediaType) {
			return index, err
		}
		content, err := registry.Fetch(ctx, c.Ref, d)
		if err == nil {
			err = json.Unmarshal(content.Blob, &index)
		}
		return index, err
	}
}
