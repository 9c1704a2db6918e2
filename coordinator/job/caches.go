package job

import (
	"context"
	"fmt"

	"github.com/containerd/platforms"
	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/coordinator/build"
	"github.com/archfarm/archfarm/coordinator/cache"
	jobspec "github.com/archfarm/archfarm/coordinator/job/spec"
	"github.com/archfarm/archfarm/coordinator/publish"
	"github.com/archfarm/archfarm/coordinator/split"
	"github.com/archfarm/archfarm/coordinator/store"
)

// mergeCaches makes one cache of what several legs exported to a registry, each to a tag
// of its own (legbuild), before anything is published. One that fails is an error, unless
// its ignore-error says otherwise.
func (w *work) mergeCaches(ctx context.Context) error {
	if len(w.job.Legs) < 2 {
		return nil
	}
	list, err := jobspec.FillCaches(w.spec.GetCacheTo(), w.with.secrets)
	if err != nil {
		return err
	}
	options := &controlapi.CacheOptions{}
	for _, e := range list {
		options.Exports = append(options.Exports, &controlapi.CacheOptionsEntry{Type: e.GetType(), Attrs: e.GetAttrs()})
	}
	for _, e := range split.PlanCaches(options).Merged() {
		if e.Ref == "" {
			continue
		}
		err := w.mergeCache(ctx, e)
		if err != nil && !e.IgnoreError {
			return err
		}
		if err != nil {
			w.notice(fmt.Sprintf("%s: %s", e.Step, build.Message(err)))
		}
	}
	return nil
}

func (w *work) mergeCache(ctx context.Context, e split.CacheExport) error {
	registry := publish.WithCredentials(w.with.credentials, e.Insecure)
	var shares []cache.Share
	for _, l := range w.job.Legs {
		share, err := shareOf(ctx, registry, e, l)
		if err != nil {
			return err
		}
		if share.Manifest != "" {
			shares = append(shares, share)
		}
	}
	if len(shares) == 0 { // no leg had anything to export
		return nil
	}
	w.notice(e.Step + " " + e.Ref)
	_, err := cache.Merge(ctx, cache.InRegistry(registry, e.Ref), shares, e.Format, observer{w})
	return err
}

// shareOf is what a leg exported; without a manifest when that was nothing.
func shareOf(ctx context.Context, registry publish.Registry, e split.CacheExport, l store.Leg) (cache.Share, error) {
	platform, err := platforms.Parse(l.Platform)
	if err != nil {
		return cache.Share{}, err
	}
	d, err := registry.Resolve(ctx, split.Leg{Platform: platforms.Normalize(platform)}.CacheRef(e.Ref))
	if status.Code(err) == codes.NotFound {
		return cache.Share{}, nil
	}
	return cache.Share{Platform: l.Platform, Manifest: d.Digest}, err
}

// Status implements cache.Observer.
func (o observer) Status(text string) { o.notice(text) }
