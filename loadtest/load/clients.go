package load

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/contextpack"
	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// Clients connects as many clients, each with a connection of its own, until t ends.
func Clients(t farmtest.T, farm string, number int) []*client.Client {
	t.Helper()
	all := make([]*client.Client, number)
	for i := range all {
		c, err := client.Dial(client.Config{Farm: farm})
		if err != nil {
			t.Fatalf("connecting to the farm: %v", err)
		}
		t.Cleanup(func() { _ = c.Close() })
		all[i] = c
	}
	return all
}

// Upload sends a tiny context, and returns what jobs name it by.
func Upload(ctx context.Context, t farmtest.T, c *client.Client) *archfarmv1.BuildContext {
	t.Helper()
	dir := farmtest.Folder(t)
	farmtest.WriteFile(t, dir, "Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")
	source, err := contextpack.Folder(dir, contextpack.Options{})
	if err != nil {
		t.Fatalf("packing a context: %v", err)
	}
	defer source.Close() //nolint:errcheck // it is only read
	made, err := c.Upload(ctx, source, nil)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return made
}

// Spec is a job of the usual kind. Without tags it publishes nothing.
func Spec(from *archfarmv1.BuildContext, platforms, tags []string) *archfarmv1.JobSpec {
	return &archfarmv1.JobSpec{
		Context: from, Platforms: platforms, Tags: tags,
		BuildArgs: map[string]string{"VERSION": "1.2.3", "CGO_ENABLED": "0"}, Labels: map[string]string{"org.opencontainers.image.title": "load"},
		Metadata: map[string]string{"pipeline": "https://ci.example.com/team/app/pipelines/" + strings.Repeat("7", 8)},
	}
}

// Submit submits jobs 0 to number-1, each client one at a time, until all are durable or ctx ends: the latter is no
// error. It returns the ids of those that are, by number, and how long that took. Done, unless nil, is called with each.
func Submit(ctx context.Context, t farmtest.T, clients []*client.Client, number int, spec func(i int) *archfarmv1.JobSpec, done func(i int, id string)) (ids map[int]string, took time.Duration) {
	t.Helper()
	ids = map[int]string{} // number may be beyond what fits into memory
	var next atomic.Int64
	var mu sync.Mutex
	var failed error
	var running sync.WaitGroup
	begun := time.Now()
	for _, c := range clients {
		running.Go(func() { // ends with the jobs, or ctx
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= number {
					return
				}
				job, existed, err := c.Submit(ctx, &archfarmv1.SubmitRequest{Spec: spec(i)})
				if err == nil && existed {
					err = fmt.Errorf("job %s is said to have existed", job.GetId())
				}
				mu.Lock()
				if err == nil {
					ids[i] = job.GetId()
				} else if ctx.Err() == nil {
					failed = fmt.Errorf("submitting job %d: %w", i, err)
				}
				mu.Unlock()
				if err != nil {
					return
				}
				if done != nil {
					done(i, job.GetId())
				}
			}
		})
	}
	running.Wait()
	took = time.Since(begun)
	if failed != nil {
		t.Fatalf("%v", failed)
	}
	return ids, took
}
