package coordinator

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/archfarm/archfarm/coordinator/dispatch"
	"github.com/archfarm/archfarm/coordinator/endpoint"
	"github.com/archfarm/archfarm/coordinator/fleet"
	"github.com/archfarm/archfarm/coordinator/history"
	"github.com/archfarm/archfarm/coordinator/store"
	"github.com/archfarm/archfarm/coordinator/trace"
)

// openHistory opens the build history, and what keeps the builds' traces.
func openHistory(ctx context.Context, cfg Config, data *dataDir, records store.History, workers *fleet.Fleet) (*history.History, *trace.Traces, error) {
	traces, err := trace.New(ctx)
	if err != nil {
		return nil, nil, err
	}
	h, err := history.Open(ctx, history.Options{
		Store: records, Dir: filepath.Join(data.own, "history"), Disabled: cfg.HistoryDisabled,
		Limits:  history.Limits{MaxEntries: cfg.HistoryMaxEntries, MaxAge: cfg.HistoryMaxAge, MaxSize: cfg.HistoryMaxSize},
		Workers: endpoint.Workers{Fleet: workers}, Spans: traces, Log: cfg.Logger,
	})
	if err != nil {
		return nil, nil, errors.Join(err, traces.Shutdown(ctx))
	}
	return h, traces, nil
}

// finishHistory lets the last records become complete, and ends those who listen.
func (c *coordinator) finishHistory(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell) // ctx has ended: that is why
	defer cancel()
	if err := c.history.Finish(ctx); err != nil {
		c.log.Warn("builds still run, or their records are still written", "error", err)
	}
}

// closeHistory writes what is still to be written.
func (c *coordinator) closeHistory(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), farewell) // ctx has ended: that is why
	defer cancel()
	if err := errors.Join(c.history.Finish(ctx), c.traces.Shutdown(ctx)); err != nil {
		return fmt.Errorf("closing the build history: %w", err)
	}
	return nil
}

// legsOf tells where the legs of a build ran.
func legsOf(b *dispatch.Build) []history.Leg {
	var out []history.Leg
	for _, l := range b.Legs() {
		out = append(out, history.Leg{Platform: l.Platform, Worker: l.Worker, Ref: l.Ref})
	}
	return out
}
