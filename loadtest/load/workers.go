// Package load is what load tests of jobs share: clients that submit many, workers whose BuildKit builds nothing, and
// what the kernel tells of a process. The agents are the real ones.
package load

import (
	"context"
	"fmt"
	"sync"

	"github.com/archfarm/archfarm/address"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/worker"
)

// StartWorkers starts agents before one BuildKit, each for all the platforms. They end with t, or ctx.
func StartWorkers(ctx context.Context, t farmtest.T, buildkit address.Address, coordinator string, number, slots int, platforms ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	for i := range number {
		dir, stop := farmtest.Folder(t), make(chan struct{})
		context.AfterFunc(ctx, func() { close(stop) }) // at once: nothing is waited for
		running.Go(func() {                            // ends with ctx
			err := worker.Run(ctx, worker.Config{
				Name: fmt.Sprintf("stub-%03d", i), BuildKit: buildkit, DataDir: dir, Slots: slots, Coordinators: []string{coordinator},
				Platforms: platforms, Version: "load test", Stop: stop,
			})
			if err != nil && ctx.Err() == nil {
				t.Errorf("a worker ended: %v", err)
			}
		})
	}
}
