package job

import (
	"context"
	"time"
)

const (
	countEvery = 5 * time.Second
	purgeEvery = time.Minute
	// purgeSome jobs at a time, so that nobody waits long for the store.
	purgeSome = 100
)

// keeper counts jobs and removes old ones.
type keeper struct {
	Options
	metrics *metrics
}

func (k *keeper) run(ctx context.Context) {
	count, purge := time.NewTicker(countEvery), time.NewTicker(purgeEvery)
	defer count.Stop()
	defer purge.Stop()
	k.count(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-count.C:
			k.count(ctx)
		case <-purge.C:
			k.purge(ctx)
		}
	}
}

func (k *keeper) count(ctx context.Context) {
	jobs, err := k.Store.CountJobs(ctx)
	if err != nil {
		k.warn(ctx, "counting jobs", err)
		return
	}
	k.metrics.count(jobs)
}

// purge removes jobs that ended long ago, by the store's clock.
func (k *keeper) purge(ctx context.Context) {
	now, err := k.Store.Now(ctx)
	if err != nil {
		k.warn(ctx, "removing old jobs", err)
		return
	}
	removed := 0
	for ctx.Err() == nil {
		n, err := k.Store.Purge(ctx, now.Add(-k.Retention), purgeSome)
		removed += n
		if err != nil {
			k.warn(ctx, "removing old jobs", err)
		}
		if err != nil || n < purgeSome {
			break
		}
	}
	if removed > 0 {
		k.Log.Info("old jobs removed", "jobs", removed)
	}
}

func (k *keeper) warn(ctx context.Context, doing string, err error) {
	if ctx.Err() == nil {
		k.Log.Warn("jobs are not kept in order", "doing", doing, "error", err)
	}
}
