package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/archfarm/archfarm/client"
	"github.com/archfarm/archfarm/e2e/farmtest"
	"github.com/archfarm/archfarm/loadtest/load"
	archfarmv1 "github.com/archfarm/archfarm/proto/archfarm/v1"
)

const (
	// goalDelivery, in milliseconds, is for 99 of 100 deliveries of an event.
	goalDelivery = 100
	// watcherConnections are what the watchers share, and lineEvery the time between two lines of the build's log.
	watcherConnections = 8
	lineEvery          = 200 * time.Millisecond
)

// fanOut lets many watch a job on a stub worker that prints a line now and then. It is told twice: from when the
// coordinator recorded an event, before it was durable, and from when the build printed the line.
func fanOut(ctx context.Context, t farmtest.T, o options) (all []figure) {
	t.Helper()
	one, oneLine := delivered(ctx, t, 1, o.Window)
	many, manyLine := delivered(ctx, t, o.Watchers, o.Window)
	return []figure{
		{
			name: fmt.Sprintf("an event reaches %d watchers, p99", o.Watchers), got: many, unit: "ms", goal: goalDelivery,
			beside: "1 watcher", peer: one, note: fmt.Sprintf("from its time, made durable meanwhile; %d connections", watcherConnections),
		},
		{
			name: fmt.Sprintf("a line of the log reaches %d watchers, p99", o.Watchers), got: manyLine, unit: "ms",
			beside: "1 watcher", peer: oneLine, note: "from the worker's print on, 50 ms of which lines are gathered",
		},
	}
}

// delivered returns the 99th percentiles, in milliseconds, of the delays of events and of lines.
func delivered(ctx context.Context, t farmtest.T, watchers int, d time.Duration) (event, line float64) {
	t.Helper()
	farmtest.Within(t, func(t farmtest.T) {
		p := &printer{lines: int(d / lineEvery), begin: make(chan struct{})}
		buildkit := load.NewBuildKit()
		buildkit.Run = p.run
		farm := farmtest.StartFarm(t, farmtest.FindFarmTools(t), farmtest.FarmOptions{})
		load.StartWorkers(ctx, t, buildkit.Serve(t), strings.TrimPrefix(farm.Addr, "tcp://"), 1, 1, "linux/amd64")
		clients := load.Clients(t, farm.Addr, watcherConnections)
		spec := load.Spec(load.Upload(ctx, t, clients[0]), []string{"linux/amd64"}, nil)
		job, _, err := clients[0].Submit(ctx, &archfarmv1.SubmitRequest{Spec: spec})
		if err != nil {
			t.Fatalf("submitting a job: %v", err)
		}
		w := watch(ctx, clients, job.GetId(), watchers)
		farmtest.Eventually(t, time.Minute, "everybody watches", func() (string, bool) {
			n := w.there.Load()
			return fmt.Sprint(n), n == int64(watchers)
		})
		close(p.begin)
		w.running.Wait()
		if len(w.failed) > 0 {
			t.Fatalf("%d of %d watchers failed: %v", len(w.failed), watchers, w.failed[0])
		}
		if want := watchers * p.lines; len(w.lines) != want {
			t.Fatalf("%d lines were delivered, not %d", len(w.lines), want)
		}
		event, line = percentile(w.events, 99), percentile(w.lines, 99)
		t.Logf("%d watchers: events p50 %.0f ms, p99 %.0f ms, lines p50 %.0f ms, p99 %.0f ms, %d deliveries", watchers,
			percentile(w.events, 50), event, percentile(w.lines, 50), line, len(w.events))
	})
	return event, line
}

// percentile of at least one duration, in milliseconds.
func percentile(of []time.Duration, p int) float64 {
	sorted := slices.Sorted(slices.Values(of))
	return float64(sorted[(len(sorted)-1)*p/100].Microseconds()) / 1000
}

// printer is a build that prints the time of day.
type printer struct {
	lines int
	begin chan struct{}
}

func (p *printer) run(ctx context.Context, tell load.Tell) error {
	vertex, now := digest.FromString("printing").String(), time.Now()
	tell(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: vertex, Name: "printing", Started: timestamppb.New(now)}}})
	select {
	case <-p.begin:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	tick := time.NewTicker(lineEvery)
	defer tick.Stop()
	for range p.lines {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		now := time.Now()
		tell(&controlapi.StatusResponse{Logs: []*controlapi.VertexLog{{
			Vertex: vertex, Stream: 1, Timestamp: timestamppb.New(now), Msg: []byte(strconv.FormatInt(now.UnixNano(), 10) + "\n"),
		}}})
	}
	tell(&controlapi.StatusResponse{Vertexes: []*controlapi.Vertex{{Digest: vertex, Name: "printing", Started: timestamppb.New(now), Completed: timestamppb.Now()}}})
	return nil
}

// watching are those who watch, and how late they were told.
type watching struct {
	running sync.WaitGroup
	there   atomic.Int64 // who has been told that the build runs

	mu            sync.Mutex
	events, lines []time.Duration
	failed        []error
}

func watch(ctx context.Context, clients []*client.Client, job string, number int) *watching {
	w := &watching{}
	for i := range number {
		w.running.Go(func() { w.follow(ctx, clients[i%len(clients)], job) }) // ends with the job, or ctx
	}
	return w
}

func (w *watching) follow(ctx context.Context, c *client.Client, job string) {
	var events, lines []time.Duration
	var failed error
	there := false
	for e, err := range c.Watch(ctx, job, 0) {
		now := time.Now()
		if failed = err; err != nil {
			break
		}
		for _, l := range e.GetProgress().GetLogs() {
			nanos, err := strconv.ParseInt(strings.TrimSpace(string(l.GetMsg())), 10, 64)
			if failed = err; err != nil {
				break
			}
			lines = append(lines, now.Sub(time.Unix(0, nanos)))
		}
		if there { // what came before is old to those who came late
			events = append(events, now.Sub(e.GetTime().AsTime()))
		}
		if !there && len(e.GetProgress().GetVertexes()) > 0 {
			there = true
			w.there.Add(1)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events, w.lines = append(w.events, events...), append(w.lines, lines...)
	if failed != nil {
		w.failed = append(w.failed, failed)
	}
}
