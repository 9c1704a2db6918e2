package main

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/archfarm/archfarm/e2e/farmtest"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

// lookEvery is the time between two looks at the list of workers: often enough for what takes seconds, and seldom enough
// not to be what the coordinator is busy with.
const lookEvery = 200 * time.Millisecond

// view is what the coordinator tells of its fleet.
type view struct{ fleet archfarmv1.FleetServiceClient }

// watch connects to the coordinator's own socket, at which the next coordinator is, too.
func watch(t farmtest.T, admin string) view {
	t.Helper()
	conn, err := grpc.NewClient(admin, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)), grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: lookEvery, Multiplier: 1, MaxDelay: lookEvery}, MinConnectTimeout: time.Second,
		}))
	if err != nil {
		t.Fatalf("connecting to the coordinator: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return view{archfarmv1.NewFleetServiceClient(conn)}
}

// awaitReady waits until every worker is listed as ready, and returns how long that took.
func (v view) awaitReady(ctx context.Context, t farmtest.T, a *agents, o options) time.Duration {
	t.Helper()
	begun := time.Now()
	for {
		ready, err := v.ready(ctx)
		if ready == o.Workers {
			return time.Since(begun)
		}
		if time.Since(begun) > o.Limit {
			t.Fatalf("%d of %d workers are ready after %s; last error: %v", ready, o.Workers, o.Limit, err)
		}
		a.rest(ctx, t, lookEvery)
	}
}

// ready counts the workers that take attempts; an error says that the coordinator does not answer.
func (v view) ready(ctx context.Context) (n int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	response, err := v.fleet.ListWorkers(ctx, &archfarmv1.ListWorkersRequest{})
	for _, w := range response.GetWorkers() {
		if w.GetState() == archfarmv1.Worker_STATE_READY {
			n++
		}
	}
	return n, err
}
