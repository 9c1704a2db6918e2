package dispatch

import (
	"context"
	"sync"
	"time"

	controlapi "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/archfarm/archfarm/identity"
)

// lingering is for how long an ended build can still be asked for its progress:
// a client may open the status stream of a short build after it has ended.
const lingering = 10 * time.Second

// Builds are the builds that run, by the reference that the client chose.
type Builds struct {
	// Limit is how many builds may run at a time, those that wait for a worker or
	// for their client included; 0: any number. Set it before the first use.
	Limit int

	farm *Farm

	mu       sync.Mutex
	builds   map[string]*Build
	arrival  map[string]*arrival // builds that somebody waits for
	draining bool
	running  sync.WaitGroup
	count    int // of those that have begun and not been ended
}

// arrival is a build that has not begun yet.
type arrival struct {
	begun   chan struct{} // closed when it has
	waiting int           // guarded by Builds.mu
}

// NewBuilds returns an empty set.
func NewBuilds(farm *Farm) *Builds {
	return &Builds{farm: farm, builds: map[string]*Build{}, arrival: map[string]*arrival{}}
}

// Begin takes a request. It answers Unavailable when draining, AlreadyExists when a
// build of that reference runs, and ResourceExhausted when too many run. End must be
// called.
func (bs *Builds) Begin(ctx context.Context, req *controlapi.SolveRequest) (*Build, error) {
	if req.GetRef() == "" {
		return nil, status.Error(codes.InvalidArgument, "starting a build: the request has no Ref")
	}
	b, err := bs.farm.Begin(ctx, req)
	if err == nil {
		err = bs.admit(b)
	}
	if err != nil {
		bs.refuse(ctx, req.GetRef(), err)
		return nil, err
	}
	return b, nil
}

// admit adds a build, or lets go of it and says why.
func (bs *Builds) admit(b *Build) (err error) {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	ref := b.req.GetRef()
	switch old, taken := bs.builds[ref]; {
	case bs.draining:
		err = status.Error(codes.Unavailable, "starting a build: this coordinator is draining; try again on another, or in a while")
	case taken && !old.forgotten:
		err = status.Errorf(codes.AlreadyExists, "starting a build: job ID %s already exists", ref)
	case bs.Limit > 0 && bs.count >= bs.Limit:
		err = status.Errorf(codes.ResourceExhausted, "starting a build: %d are running or waiting, as many as this coordinator takes; try again later", bs.count)
	default:
		bs.running.Add(1)
		bs.count++
		bs.put(b)
		return nil
	}
	b.discard(err)
	return err
}

// refuse leaves an ended build in the place of one that was refused: its client
// has asked for progress already, and would wait for that in vain.
func (bs *Builds) refuse(ctx context.Context, ref string, reason error) {
	b := bs.farm.newBuild(ctx, &controlapi.SolveRequest{Ref: ref})
	b.discard(reason)
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if _, taken := bs.builds[ref]; !taken {
		bs.put(b)
		bs.forget(b)
	}
}

// put makes a build known, also to those who wait for it. bs.mu is held.
func (bs *Builds) put(b *Build) {
	ref := b.req.GetRef()
	bs.builds[ref] = b
	if waiting, ok := bs.arrival[ref]; ok {
		close(waiting.begun)
		delete(bs.arrival, ref)
	}
}

// forget removes an ended build in a while, or as soon as another one takes its
// reference. bs.mu is held.
func (bs *Builds) forget(b *Build) {
	b.forgotten = true
	time.AfterFunc(lingering, func() {
		bs.mu.Lock()
		defer bs.mu.Unlock()
		if bs.builds[b.req.GetRef()] == b {
			delete(bs.builds, b.req.GetRef())
		}
	})
}

// discard lets go of a build that never began.
func (b *Build) discard(reason error) {
	b.detach()
	b.cancel(reason)
	b.Progress.Close()
}

// End lets go of a build, in the background: its caller can be answered while
// the rest of its progress is still under way.
func (bs *Builds) End(b *Build, reason error) {
	b.detach()
	bs.mu.Lock()
	bs.count-- // now: the caller may begin another one as soon as it has its answer
	bs.mu.Unlock()
	go func() {
		defer bs.running.Done()
		b.End(reason)
		bs.mu.Lock()
		defer bs.mu.Unlock()
		bs.forget(b)
	}()
}

// Count is how many builds run or wait.
func (bs *Builds) Count() int {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	return bs.count
}

// Drain refuses new builds and waits until the running ones have ended.
func (bs *Builds) Drain(ctx context.Context) error {
	bs.mu.Lock()
	bs.draining = true
	bs.mu.Unlock()
	ended := make(chan struct{})
	go func() { // ends with the last build, at the latest when the server has been stopped
		bs.running.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Draining tells whether new builds are refused.
func (bs *Builds) Draining() bool {
	bs.mu.Lock()
	defer bs.mu.Unlock()
	return bs.draining
}

// Find returns the build of that reference. Clients ask before or after they
// start it, so it waits a while: NotFound when it does not come, and for a build of
// another tenant.
func (bs *Builds) Find(ctx context.Context, ref string, patience time.Duration) (*Build, error) {
	bs.mu.Lock()
	b, ok := bs.builds[ref]
	if ok {
		bs.mu.Unlock()
		return b.seenBy(ctx)
	}
	awaited, ok := bs.arrival[ref]
	if !ok {
		awaited = &arrival{begun: make(chan struct{})}
		bs.arrival[ref] = awaited
	}
	awaited.waiting++
	bs.mu.Unlock()

	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-awaited.begun:
	case <-timer.C:
	case <-ctx.Done():
	}
	bs.mu.Lock()
	defer bs.mu.Unlock()
	if awaited.waiting--; awaited.waiting == 0 && bs.arrival[ref] == awaited {
		delete(bs.arrival, ref)
	}
	if b, ok := bs.builds[ref]; ok {
		return b.seenBy(ctx)
	}
	return nil, noSuchJob(ref)
}

// seenBy returns the build if the caller may see it.
func (b *Build) seenBy(ctx context.Context) (*Build, error) {
	if !identity.FromContext(ctx).MaySee(b.who.Tenant) {
		return nil, noSuchJob(b.req.GetRef())
	}
	return b, nil
}

func noSuchJob(ref string) error { return status.Errorf(codes.NotFound, "no such job %s", ref) }
